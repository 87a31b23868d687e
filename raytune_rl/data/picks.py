"""The parts of a data set that are read, and how its rows are prepared: as the user says, else as its entry
in `registered` says, else as it comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raytune_rl.data.columns import is_part
from raytune_rl.data.compression import bare_name
from raytune_rl.data.example import BadRow, Row
from raytune_rl.data.registered import Entry, Subset, entry_of
from raytune_rl.data.rules import PLACEHOLDERS, Context, Identity, Rule
from raytune_rl.data.specs import DatasetSpec
from raytune_rl.errors import DataError

Announce = Callable[[str], None]

_HUB_CACHE = re.compile(r"datasets--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+/?$")


@dataclass(frozen=True)
class Pick:
    """One subset to read.

    Attributes:
        subset: Its name on the hub or in the folder; "all": all of them; None: the default one.
        splits: Names of splits; empty: what is for training.
        if_there: Of `splits`, those that there are: the user did not name them.
        rule: How its rows are prepared.
    """

    subset: str | None = None
    splits: tuple[str, ...] = ()
    if_there: bool = False
    rule: Rule | None = None


@dataclass(frozen=True)
class Preparing:
    """The user's settings of the preparation of rows.

    Attributes:
        columns: Value of `--columns`. Where it assigns what a rule would, rows are left as they are.
        identity: Name and author that stand for their placeholders in self-cognition.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    identity: Identity = field(default_factory=Identity)


def picks_of(
    spec: DatasetSpec, preparing: Preparing, announce: Announce, there: Iterable[str] | None = None
) -> list[Pick]:
    """A part of a data set to read.

    Args:
        spec: The data set.
        preparing: The user's word.
        announce: Told what is done to the rows of a data set that is registered.
        there: Subsets that a local folder has; None for a hub's data set.

    Raises:
        DataError: It is not clear which subset is meant.
    """
    entry = _registered(spec)
    if entry is None:
        return [Pick(name, spec.splits) for name in spec.subsets] or [Pick(None, spec.splits)]
    picks = []
    notices: dict[str, None] = {}
    for subset in _chosen(spec, entry, None if there is None else set(there)):
        rule = subset.rule or entry.rule
        if rule is not None and (named := _by_hand(rule, preparing.columns)):
            notices[f"{spec.text}: --columns names {named!r}, so rows are read as they are"] = None
            rule = None
        splits = spec.splits or subset.splits or entry.splits
        picks.append(Pick(subset.on_hub, splits, if_there=not spec.splits, rule=rule))
        if rule is not None:
            notices[f"{spec.text} is a registered data set: {rule.says}"] = None
        if splits not in ((), ("train",)) and not spec.splits:
            notices[f"{spec.text}: the splits {', '.join(splits)} are read, where there, as in ms-swift"] = (
                None
            )
    for sentence in notices:
        announce(sentence)
    return picks


def leaves_identity_open(spec: DatasetSpec) -> bool:
    """Whether rows of the data set ask for the model's name and author."""
    entry = _registered(spec)
    return entry is not None and any(subset.rule and subset.rule.identity for subset in entry.subsets)


def _by_hand(rule: Rule, columns: Mapping[str, str]) -> str | None:
    """A name in `--columns` that the rule would see to: what it reads, or what it makes."""
    if rule.identity:
        return None
    needs = {name.lower() for name in rule.needs}
    read = (source for source in columns if source.lower() in needs)
    return next(read, None) or next((target for target in columns.values() if is_part(target)), None)


def prepared(
    rows: Iterable[Row | BadRow], spec: DatasetSpec, pick: Pick, preparing: Preparing, announce: Announce
) -> Iterator[Row | BadRow]:
    """The rows as the rule of their subset makes them; what it leaves out or cannot use is counted.

    Raises:
        DataError: A row says a name or an author that the user did not give.
    """
    rule = pick.rule
    if rule is None:
        yield from rows
        return
    left_out = unlike = 0
    try:
        for row in rows:
            if isinstance(row, BadRow):
                yield row
                continue
            if not rule.fits(row.fields):
                unlike += 1
                _check_identity(rule, row, row.fields)
                yield row
                continue
            try:
                written = row.written()
                made = rule.make(written, Context(row.line, preparing.identity))
            except Exception as error:  # noqa: BLE001 (what a row may hold no rule foresees)
                reason = f"not as rows of this data set are ({type(error).__name__}: {error})"
                yield BadRow(row.source, row.line, reason, repr(row.fields)[:2000])
                continue
            if made is None:
                left_out += 1
                continue
            _check_identity(rule, row, made)
            kept = {name for name in made if name in written and written[name] is made[name]}
            yield replace(
                row,
                fields={name: row.fields[name] if name in kept else value for name, value in made.items()},
                present={name: one for name, one in row.present.items() if name in kept},
                parts={name: name for name in made if is_part(name) and name not in kept},
            )
    finally:
        if left_out:
            announce(f"{spec.text}: {left_out} rows left out, as in ms-swift: {rule.leaves_out}")
        if unlike:
            announce(f"{spec.text}: {unlike} rows lack {' or '.join(rule.needs)} and are read as they are")


def _check_identity(rule: Rule, row: Row, fields: Mapping[str, Any]) -> None:
    """A placeholder must never be trained on."""
    if rule.identity and any(mark in str(value) for value in fields.values() for mark in PLACEHOLDERS):
        raise DataError(
            f"{row.source}:{row.line}: the row leaves the model's name or author open. Give --model_name and "
            "--model_author, each once, or twice: in Chinese, then in English"
        )


def _registered(spec: DatasetSpec) -> Entry | None:
    """The entry under the data set's id; of a local one, under the names of its folder."""
    if spec.path is None:
        return entry_of(spec.hub_id)
    path = spec.path.absolute()
    cached = _HUB_CACHE.search(path.as_posix())
    if cached is not None:
        return entry_of(f"{cached['owner']}/{cached['name']}")
    places = [path, path.parent] if _is_file(path) else [path]
    names = ["/".join(place.parts[-2:]) for place in places]
    last = bare_name(path).replace("_", "-") if _is_file(path) else path.name
    return next((entry for name in (*names, last) if (entry := entry_of(name)) is not None), None)


def _is_file(path: Path) -> bool:
    return not path.is_dir()


def _chosen(spec: DatasetSpec, entry: Entry, there: set[str] | None) -> list[Subset]:
    """The subsets of an entry that are meant. A local folder may have some of them, or none: then it is
    taken whole."""
    known = {subset.name: subset for subset in entry.subsets}

    def found(subset: Subset) -> Subset:
        if (
            there is None
            or subset.on_hub in there
            or (subset.on_hub == subset.name and subset.name != "default")
        ):
            return subset
        return replace(subset, hub=None, whole=True)

    present = [s for s in entry.subsets if there is None or s.on_hub in there]
    if spec.subsets == ("all",) and "all" not in known:
        return [s for s in present if not s.weak] or [Subset("all")]
    if spec.subsets:
        return [found(known[name]) if name in known else Subset(name) for name in spec.subsets]
    if not entry.subsets:
        return [Subset("default", whole=True)]
    default = known.get("default", entry.subsets[0] if len(entry.subsets) == 1 else None)
    if default is not None:
        return [
            default if there is None or default.on_hub in there else replace(default, hub=None, whole=True)
        ]
    if len(present) > 1:
        raise DataError(
            f"data set {spec.text!r} has several subsets and none is the default: "
            f"{', '.join(s.name for s in present)}. Name one (`{spec.text}:{present[0].name}`), several with "
            "a slash between, or `:all`"
        )
    return present or [replace(entry.subsets[0], hub=None, whole=True)]
