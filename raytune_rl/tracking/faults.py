"""faults.jsonl: a line for everything that was lost in a run and is there again; the table made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raytune_rl.protocol.faults import Fault
from raytune_rl.tracking.files import json_line, read_jsonl
from raytune_rl.tracking.line_file import LineFile
from raytune_rl.tracking.text import duration

COLUMNS = ("when (UTC)", "who", "at", "recovered in", "work repeated")


def append(path: Path, fault: Fault) -> None:
    """Adds a line."""
    file = LineFile(path)
    try:
        file.append([json_line(asdict(fault))])
    finally:
        file.close()


def read(path: Path) -> list[Mapping[str, Any]]:
    """The lines so far; none where nothing was ever lost."""
    return list(read_jsonl(path)) if path.is_file() else []


def table(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row a fault, under `COLUMNS`."""
    return [
        (
            datetime.fromtimestamp(line["when"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
            str(line["who"]),
            str(line["phase"]),
            "beside the run" if line["recovered_s"] is None else duration(line["recovered_s"]),
            str(line["repeated"] or "the call itself"),
        )
        for line in lines
    ]
