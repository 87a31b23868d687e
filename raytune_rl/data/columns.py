"""Which column of a row plays which part. Names are matched without regard to case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

#: Accepted names of each part: those of ms-swift, and a few of other trainers.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt"),
    "query": ("query", "prompt", "input", "instruction", "question", "problem", "context_messages"),
    "response": (
        "response",
        "answer",
        "output",
        "targets",
        "target",
        "answer_key",
        "answers",
        "solution",
        "text",
        "completion",
        "content",
    ),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    "audios": ("audios", "audio"),
    "messages": ("messages", "conversation", "conversations"),
    "tools": ("tools", "functions"),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "history": ("history",),
}

#: Parts that `columns` may assign besides the above: the fields of the instruction format.
_ALPACA_PARTS = ("instruction", "input", "output")


class ColumnError(ValueError):
    """The columns of a row do not say clearly what is what; the message names them."""


@dataclass(frozen=True)
class ColumnMap:
    """The user's `--columns`: source name to target name, an explicit word that wins over every guess. All
    are renamed at once, so that two columns may change places."""

    renames: Mapping[str, str]

    def apply(self, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The row under its new names; and part to column, for the targets that are parts.

        Raises:
            ColumnError: Two columns would have one name.
        """
        if not self.renames:
            return dict(fields), {}
        renames = self.plain_renames(fields)
        explicit = self.explicit_parts(fields)
        taken = set(renames.values())
        # A column that plays a part keeps its name, unless another is to have it.
        for part, column in explicit.items():
            if column in taken:
                if part in taken or (part in fields and part not in (*renames, *explicit.values())):
                    raise ColumnError(
                        f"--columns renames {column!r} to {part!r}, but the row has a {part!r} already"
                    )
                renames[column] = part
        renamed = {renames.get(name, name): value for name, value in fields.items()}
        return renamed, {part: renames.get(column, column) for part, column in explicit.items()}

    def inner(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted source to what lies there: `reward_model.ground_truth` is an entry of a column's objects, a
        number one of a list's items. Without those that are columns, or not there."""
        found = {}
        for source in self.renames:
            value: Any = None if source in fields or "." not in source else fields
            for step in source.split("."):
                if isinstance(value, Mapping):
                    value = value.get(step)
                elif isinstance(value, list | tuple) and step.isdecimal():
                    value = value[int(step)] if int(step) < len(value) else None
                else:
                    value = None
            if value is not None:
                found[source] = value
        return found

    def explicit_parts(self, names: Iterable[str]) -> dict[str, str]:
        """Part to column, for the targets that are parts and whose source is among `names`."""
        parts: dict[str, str] = {}
        for source, target in self._present(names):
            part = target.lower()
            if part not in SYNONYMS and part not in _ALPACA_PARTS:
                continue
            if part in parts:
                raise ColumnError(f"--columns maps both {parts[part]!r} and {source!r} to {target!r}")
            parts[part] = source
        return parts

    def plain_renames(self, names: Iterable[str]) -> dict[str, str]:
        """Column to new name, for the other targets (a column that a reward wants under its own name,
        say)."""
        there = list(names)
        present = self._present(there)
        leaving = {source for source, target in present if source != target}
        plain: dict[str, str] = {}
        for source, target in present:
            if is_part(target) or source == target:
                continue
            if target in there and target not in leaving:
                raise ColumnError(
                    f"--columns renames {source!r} to {target!r}, but the row has a {target!r} already"
                )
            if target in plain.values():
                raise ColumnError(f"--columns renames two columns to {target!r}")
            plain[source] = target
        return plain

    def _present(self, names: Iterable[str]) -> list[tuple[str, str]]:
        lowered: dict[str, list[str]] = {}
        for name in names:
            lowered.setdefault(name.lower(), []).append(name)
        found = []
        for source, target in self.renames.items():
            candidates = lowered.get(source.lower(), [])
            if source in candidates:
                found.append((source, target))
            elif len(candidates) > 1:
                raise ColumnError(f"--columns names {source!r}, which may be any of {_quoted(candidates)}")
            elif candidates:
                found.append((candidates[0], target))
        return found


def columns_of(part: str, names: Iterable[str]) -> list[str]:
    """The columns among `names` that could play a part."""
    accepted = SYNONYMS[part]
    return [name for name in names if name.lower() in accepted]


def single(part: str, names: Iterable[str], explicit: Mapping[str, str]) -> str | None:
    """The one column that plays a part, or None.

    Raises:
        ColumnError: Several columns could play it and `--columns` does not say which.
    """
    return _single(part, tuple(names), tuple(explicit.items()))


@lru_cache(maxsize=4096)
def _single(part: str, names: tuple[str, ...], given: tuple[tuple[str, str], ...]) -> str | None:
    """As `single`; the rows of a file have the same names, most of them."""
    explicit = dict(given)
    if part in explicit:
        return explicit[part]
    taken = set(explicit.values())
    found = [name for name in columns_of(part, names) if name not in taken]
    if len(found) > 1:
        raise ColumnError(
            f"{_quoted(found)} could each be the {part}; say which with --columns "
            f'\'{{"{found[0]}": "{part}"}}\''
        )
    return found[0] if found else None


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(repr(name) for name in names)


def is_part(target: str) -> bool:
    """Whether a column of this name plays a part, rather than being handed on under its name."""
    return target.lower() in SYNONYMS or target.lower() in _ALPACA_PARTS
