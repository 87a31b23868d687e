"""Errors of writing a part of a checkpoint, by the name that the controller knows how to go on from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from raytune_rl.errors import CheckpointError


@contextmanager
def writing(directory: str) -> Iterator[None]:
    """What the file system refuses in the block becomes a `CheckpointError`.

    Only for a block in which no other worker waits for this one.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(f"{directory} could not be written: {reason}.") from error
