"""Medians, and the small table that every benchmark ends with."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path


def median(values: Iterable[float]) -> float:
    """The median; NaN where nothing was measured."""
    found = list(values)
    return statistics.median(found) if found else float("nan")


def spread(values: Iterable[float]) -> str:
    """Smallest and largest, to see how noisy the machine was."""
    found = list(values)
    return f"{min(found):.2f}-{max(found):.2f}" if found else "-"


def render(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """The table as aligned text, or as Markdown to paste into README.md."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    lines = [line(header), rule if markdown else "-" * len(line(header)), *(line(row) for row in rows)]
    return "\n".join(lines)


def machine() -> str:
    """The machine, the time and the load: without the last a figure from a shared machine means
    little.
    """
    load = os.getloadavg()[0]
    date = time.strftime("%Y-%m-%d")
    return f"{date}, {_processor()}, {os.cpu_count()} cores, load {load:.1f} at the end"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for entry in info.read_text(encoding="utf-8").splitlines():
            if entry.startswith("model name"):
                return entry.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
