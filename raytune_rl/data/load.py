"""All data sets of a run: from what the user typed to examples, with every row accounted for."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.example import BadRow, Example, Row, RowError, Task
from raytune_rl.data.formats import Converter
from raytune_rl.data.sources import Identity, Preparing, drawn, parse_spec, read_rows
from raytune_rl.data.spool import Chosen, Spool
from raytune_rl.errors import ConfigError, DataError
from raytune_rl.protocol.data import SourceCounts
from raytune_rl.redaction import redact_text, redact_texts
from raytune_rl.tracking.files import read_jsonl

logger = logging.getLogger(__name__)

_TOLD_EVERY = 1000
"""Rows between two words on how far reading is."""


@dataclass(frozen=True)
class LoadReport:
    """An account of every row.

    Attributes:
        sources: One entry a data set, in the order given.
        reasons: Reason to number of bad rows.
        notices: Sentences for the user, each already with its count.
        quarantine_path: Where the bad rows lie; None when there are none or no file was asked for.
    """

    sources: tuple[SourceCounts, ...] = ()
    reasons: dict[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    quarantine_path: Path | None = None

    @property
    def bad(self) -> int:
        """Bad rows of all data sets."""
        return sum(source.bad for source in self.sources)


@dataclass(frozen=True)
class Loaded:
    """Examples in the order in which the run numbers them, and the account of all rows."""

    examples: Sequence[Example]
    report: LoadReport


def resolve_system(system: str | None) -> str | None:
    r"""The value of `--system` as text: the content of a `.txt` file, or the literal with `\n` made a line
    break.

    Raises:
        ConfigError: It ends in `.txt` and there is no such file, or the file is not UTF-8.
    """
    if system is None:
        return None
    if not system.endswith(".txt"):
        return system.replace("\\n", "\n")
    path = Path(system).expanduser()
    if not path.is_file():
        raise ConfigError(f"--system {system}: there is no such file (a value ending in .txt is a path)")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--system {system}: the file cannot be read as UTF-8 text: {error}") from error


def load_examples(
    specs: Sequence[str],
    *,
    task: Task,
    system: str | None = None,
    columns: Mapping[str, str] | None = None,
    strict: bool = False,
    shuffle: bool = True,
    seed: int = 42,
    quarantine_path: Path | None = None,
    use_hf: bool = False,
    identity: Identity | None = None,
    progress: Callable[[int], None] | None = None,
) -> Loaded:
    """Loads, understands, samples and shuffles data sets.

    Rows are read one by one and their examples wait on disk: memory does not grow with their number.

    Args:
        specs: Values of `--dataset`.
        task: What the rows are for; decides what a conversation must end with.
        system: Value of `--system`; a row's own system prompt goes before it.
        columns: Value of `--columns`: source name to target name.
        strict: Stop at the first bad row. Otherwise bad rows are counted and put into `quarantine_path`.
        shuffle: Draw `#N` at random and shuffle the whole; otherwise keep the order and take the first N.
        seed: For both.
        quarantine_path: A JSONL file, written only if there are bad rows: source, line, reason, row.
        use_hf: Ids without a prefix lie on Hugging Face instead of ModelScope.
        identity: Name and author of the model, for data sets that leave them open.
        progress: Called now and then with the number of rows read since the last call.

    Raises:
        RowError: A bad row under `strict`; it names file, line and reason.
        DataError: A source cannot be read, or no usable row is left.
        ConfigError: `system` or `columns` cannot be honoured.
    """
    convert = Converter(task, system=resolve_system(system), columns=columns)
    preparing = Preparing(columns or {}, identity or Identity())
    quarantine = Quarantine(quarantine_path)
    examples: Spool[Example] = Spool()
    orders: list[NDArray[np.int64]] = []
    sources: list[SourceCounts] = []
    notices: list[str] = []
    try:
        for number, text in enumerate(specs):
            spec = parse_spec(text, use_hf=use_hf)
            first = len(examples)
            rows = 0
            for row in read_rows(spec, preparing=preparing, announce=notices.append):
                # Without shuffling `#N` is the first N good rows: what comes after need not be read.
                if not shuffle and spec.sample is not None and len(examples) - first == spec.sample:
                    break
                rows += 1
                example = convert_row(convert, row, strict, quarantine)
                if example is not None and not _kept(examples, example):
                    error = RowError(example.source, example.line, "a value is nested too deep to be kept")
                    set_aside(error, None, strict, quarantine)
                if progress is not None and rows % _TOLD_EVERY == 0:
                    progress(_TOLD_EVERY)
            good = len(examples) - first
            if not good:
                raise DataError(_nothing_usable(text, rows, quarantine))
            taken = drawn(good, spec.sample, shuffle=shuffle, seed=[seed, number])
            sources.append(SourceCounts(text, rows, rows - good, len(taken)))
            orders.append(first + taken)
    finally:
        quarantine.close()
    if unseen := convert.unseen_columns():
        raise ConfigError(
            f"--columns names {', '.join(map(repr, unseen))}, which no row has; "
            f"there are {', '.join(map(repr, sorted(convert.seen_columns)))}"
        )
    order = np.concatenate([*orders, np.empty(0, dtype=np.int64)])
    if shuffle:
        order = order[np.random.default_rng([seed, len(specs)]).permutation(len(order))]
    notices += [f"{count} {sentence}" for sentence, count in convert.notices.items()]
    report = LoadReport(tuple(sources), dict(quarantine.reasons), tuple(notices), quarantine.written_to)
    _log(report)
    return Loaded(Chosen(examples, order), report)


def account_of(
    name: str, rows: int, bad: int, notices: Sequence[str], convert: Converter, quarantine: Quarantine
) -> LoadReport:
    """The report on part of a stream."""
    quarantine.flush()
    all_notices = [*notices, *(f"{count} {sentence}" for sentence, count in convert.notices.items())]
    source = SourceCounts(name, rows, bad, rows - bad)
    return LoadReport((source,), dict(quarantine.reasons), tuple(all_notices), quarantine.written_to)


def split_examples(
    examples: Sequence[Example], ratio: float, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Splits off `max(int(len * ratio), 1)` examples for validation, as `--split_dataset_ratio` does; 0
    splits none.

    Returns:
        Training and validation examples, each in the order they had.

    Raises:
        ConfigError: `ratio` is not in [0, 1), or nothing would be left to train on.
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"--split_dataset_ratio is {ratio}; it is at least 0 and below 1")
    if ratio == 0:
        return examples, ()
    count = max(int(len(examples) * ratio), 1)
    if count >= len(examples):
        raise ConfigError(
            f"--split_dataset_ratio {ratio} of {len(examples)} examples leaves nothing to train on"
        )
    held_out = np.zeros(len(examples), dtype=np.bool_)
    held_out[np.random.default_rng(seed).permutation(len(examples))[:count]] = True
    return Chosen(examples, np.flatnonzero(~held_out)), Chosen(examples, np.flatnonzero(held_out))


def convert_row(
    convert: Converter, row: Row | BadRow, strict: bool, quarantine: Quarantine
) -> Example | None:
    """A row understood; None for a bad one, which is then in quarantine.

    Raises:
        RowError: It is bad, and `strict` is on.
    """
    if isinstance(row, BadRow):
        error = RowError(row.source, row.line, row.reason)
        raw: Any = row.raw
    else:
        try:
            return convert(row)
        except RowError as found:
            error, raw = found, row.fields
    set_aside(error, raw, strict, quarantine)
    return None


def set_aside(error: RowError, raw: Any, strict: bool, quarantine: Quarantine) -> None:
    """Puts a bad row into quarantine.

    Raises:
        RowError: `strict` is on.
    """
    if strict:
        raise error
    quarantine.add(error, raw)


def _kept(examples: Spool[Example], example: Example) -> bool:
    try:
        examples.append(example)
    except RecursionError:
        return False
    return True


class Quarantine:
    """Bad rows, written one by one to a file that is only made when there is one.

    Args:
        path: The file; None only counts.
        adds: Go on with a file that is there, instead of replacing it. A row that it holds is not written
            again: a stream comes by more than once, and a resumed one reads its window anew.
    """

    def __init__(self, path: Path | None, adds: bool = False) -> None:
        self._adds = adds
        self.reasons: Counter[str] = Counter()
        self.first: RowError | None = None
        self.written_to: Path | None = None
        self._path = path
        self._file: TextIO | None = None
        self._held: set[tuple[str, int]] = set()
        if adds and path is not None:
            self._held = {(str(row.get("source")), int(row.get("line", 0))) for row in read_jsonl(path)}

    def add(self, error: RowError, raw: Any) -> None:
        self.reasons[error.reason] += 1
        self.first = self.first or error
        if self._path is None:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open(
                "a" if self._adds else "w", encoding="utf-8", errors="backslashreplace"
            )
            self.written_to = self._path
        place = (redact_text(error.source), error.line)
        if place in self._held:
            return
        if self._adds:
            self._held.add(place)
        self._file.write(_quarantined(error, raw) + "\n")

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _quarantined(error: RowError, raw: Any) -> str:
    """A bad row and what is wrong with it as a line of JSON, without the secrets that its texts may hold."""
    entry = {"source": error.source, "line": error.line, "reason": error.reason}
    try:
        shown = redact_texts(json.loads(json.dumps(entry | {"row": raw}, default=_jsonable)))
    except RecursionError:
        shown = redact_texts(entry | {"row": "<nested too deep to be shown>"})
    return json.dumps(shown, ensure_ascii=False)


def _jsonable(value: Any) -> str:
    """Parquet rows hold bytes and dates; a quarantined image is shown by its size, not copied."""
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def _nothing_usable(text: str, rows: int, quarantine: Quarantine) -> str:
    if rows == 0 or quarantine.first is None:
        return f"data set {text!r} has no rows"
    return f"data set {text!r}: none of its {rows} rows can be used. The first: {quarantine.first}"


def _log(report: LoadReport) -> None:
    for notice in report.notices:
        logger.warning(notice)
    if report.bad:
        where = (
            f"see {report.quarantine_path}" if report.quarantine_path else "no quarantine file was asked for"
        )
        logger.warning("%d bad rows left out (%s)", report.bad, where)
        for reason, count in Counter(report.reasons).most_common(5):
            logger.warning("  %d x %s", count, reason)
