"""Errors of writing a part of a checkpoint, by the name that the controller knows how to go on from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from raytune_rl.errors import CheckpointError

_REFUSED = re.compile(r"\(os error \d+\)")
"""How libraries written in Rust say what the system refused: safetensors by an error of its own, tokenizers
by a plain Exception."""


@contextmanager
def writing(directory: str) -> Iterator[None]:
    """What the file system refuses in the block becomes a `CheckpointError`.

    Only for a block in which no other worker waits for this one.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not _REFUSED.search(str(error)):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(f"{directory} could not be written: {reason}.") from error
