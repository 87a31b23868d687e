"""Data sets as an endless stream of windows: so many rows at a time, read when they are wanted.

Windows are counted in rows as they lie in the files, good or bad. So a window is found again by its number
alone, and the rows before it need only be read, not understood.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from raytune_rl.data.example import BadRow, Row, Task
from raytune_rl.data.formats import Converter
from raytune_rl.data.load import Loaded, Quarantine, account_of, convert_row, resolve_system
from raytune_rl.data.sources import Identity, Preparing, parse_spec, read_rows
from raytune_rl.errors import ConfigError, DataError


class RowWindows:
    """Reads window after window.

    Args:
        specs: Values of `--dataset`, read one after the other and then again.
        task, system, columns, strict, use_hf, identity: As in `data.load.load_examples`.
        size: Rows of a window.
        quarantine_path: A JSONL file that bad rows are added to.

    Raises:
        DataError: A source cannot be read.
        ConfigError: `system` or `columns` cannot be honoured, or a value of `specs` draws rows.
    """

    def __init__(
        self,
        specs: Sequence[str],
        *,
        task: Task,
        size: int,
        system: str | None = None,
        columns: Mapping[str, str] | None = None,
        strict: bool = True,
        quarantine_path: Path | None = None,
        use_hf: bool = False,
        identity: Identity | None = None,
    ) -> None:
        self._specs = [parse_spec(text, use_hf=use_hf) for text in specs]
        drawn = next((spec.text for spec in self._specs if spec.sample is not None), None)
        if drawn is not None:
            raise ConfigError(f"--dataset {drawn}: rows cannot be drawn from a stream; leave out the #")
        self._convert = Converter(task, system=resolve_system(system), columns=columns)
        self._strict, self._size = strict, size
        self._quarantine = Quarantine(quarantine_path, adds=True)
        self._notices: list[str] = []
        self._preparing = Preparing(columns or {}, identity or Identity())
        self._rows = self._endless()
        self._next = 0

    def window(self, number: int) -> Loaded:
        """The examples of a window, numbered from 0; numbers may only go up.

        Raises:
            RowError: A bad row under `strict`; it names file, line and reason.
            DataError: No row of the window can be used.
        """
        if number < self._next:
            raise ValueError(f"window {number} was asked for after window {self._next - 1}")
        for _ in islice(self._rows, (number - self._next) * self._size):
            pass
        self._next = number + 1
        before = sum(self._quarantine.reasons.values())
        rows = list(islice(self._rows, self._size))
        examples = [convert_row(self._convert, row, self._strict, self._quarantine) for row in rows]
        good = tuple(example for example in examples if example is not None)
        name = " + ".join(spec.text for spec in self._specs)
        if not good:
            raise DataError(
                f"{name}: none of {len(rows)} rows can be used. The first: {self._quarantine.first}"
            )
        bad = sum(self._quarantine.reasons.values()) - before
        return Loaded(good, account_of(name, len(rows), bad, self._notices, self._convert, self._quarantine))

    def _endless(self) -> Iterator[Row | BadRow]:
        while True:
            empty = True
            for spec in self._specs:
                for row in read_rows(spec, preparing=self._preparing, announce=self._tell):
                    empty = False
                    yield row
            if empty:
                raise DataError(f"{' + '.join(spec.text for spec in self._specs)}: there are no rows")

    def _tell(self, notice: str) -> None:
        if notice not in self._notices:
            self._notices.append(notice)
