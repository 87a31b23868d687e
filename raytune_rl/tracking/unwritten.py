"""What a run wanted to write down and could not: said once a file, counted, and training goes on.

A full or failing disk must not cost what was learned. Checkpoints are no part of this: without them there is
nothing to go on from, and their errors have a way of their own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_COUNTS: Counter[Path] = Counter()


@contextmanager
def forgiven(path: Path, kind: type[Exception] = OSError, lines: int = 1) -> Iterator[None]:
    """Goes on after an error in the block.

    Args:
        path: What could not be written then.
        kind: Errors that are forgiven.
        lines: How many lines are lost with it.
    """
    try:
        yield
    except kind as error:
        note(path, error, lines)


def note(path: Path, error: Exception, lines: int = 1) -> None:
    """Counts what is lost; the first loss of each file is said."""
    if not _COUNTS[path]:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        sentence = f"{path} cannot be written: {reason}. Training goes on; what is missing there is counted."
        print(f"raytune-rl: {sentence}", file=sys.stderr, flush=True)
    _COUNTS[path] += lines


def missing(directory: Path) -> dict[str, int]:
    """Lines, or whole files, that are missing under a directory, by name."""
    found = {path.relative_to(directory): n for path, n in _COUNTS.items() if path.is_relative_to(directory)}
    return {str(path): count for path, count in sorted(found.items())}
