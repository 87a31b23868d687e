"""The difference between two versions of a bucket's bytes, exact to the bit.

A bucket is a stream of elements, as wide as the narrowest of its tensors, compared as unsigned integers: NaN
equals itself and -0.0 is not 0.0. Elements that changed are told by their new value and their place in a
block of 65,536, and each block by how many there are: 4 bytes for one of bfloat16. A step of reinforcement
learning (learning rate 1e-6) moves most bfloat16 weights by less than half their last bit, and so not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd

import numpy as np
from numpy.typing import NDArray

from raytune_rl.protocol.weights import TensorEntry

BLOCK = 2**16
"""Elements of a block: a place in it is a uint16."""

AT_ONCE = 256 * BLOCK
"""Elements that are compared or placed at once, so that what is kept meanwhile is small beside a bucket."""

Delta = list[NDArray[np.unsignedinteger]]
"""Changed elements by block uint32 `[blocks]`; their places in it uint16 `[n]`; their new values `[n]`."""


def unit_of(entries: Sequence[TensorEntry]) -> np.dtype[np.unsignedinteger]:
    """What a bucket of these tensors is compared in."""
    return np.dtype(f"u{gcd(*(entry.itemsize for entry in entries)) or 1}")


def encode(
    base: Sequence[NDArray[np.uint8]],
    new: Sequence[NDArray[np.uint8]],
    unit: np.dtype[np.unsignedinteger],
    most_bytes: int,
) -> Delta | None:
    """What changed from `base` to `new`, the same tensors' bytes in arrays that may be cut differently; None
    if that takes more than `most_bytes`.
    """
    elements = sum(array.nbytes for array in new) // unit.itemsize
    counts = np.zeros(-(-elements // BLOCK), np.uint32)
    offsets, values = [np.empty(0, np.uint16)], [np.empty(0, unit)]
    at, room = 0, most_bytes - counts.nbytes
    for old, fresh in _side_by_side(base, new, unit):
        changed = np.flatnonzero(old != fresh)
        room -= changed.size * (2 + unit.itemsize)
        if room < 0:
            return None
        values.append(fresh[changed])
        changed += at
        offsets.append((changed % BLOCK).astype(np.uint16))
        first = at // BLOCK
        here = np.bincount(changed // BLOCK - first)
        counts[first : first + here.size] += here.astype(np.uint32)
        at += fresh.size
    return [counts, np.concatenate(offsets), np.concatenate(values)]


def decode(base: Sequence[NDArray[np.uint8]], delta: Delta) -> NDArray[np.uint8]:
    """The bytes of `new`, in memory of their own."""
    counts, offsets, values = delta
    whole = np.concatenate(base)
    elements = whole.view(values.dtype)
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    step = AT_ONCE // BLOCK
    for block in range(0, counts.size, step):
        here = counts[block : block + step]
        part = slice(ends[block], ends[block + here.size])
        places = np.repeat(np.arange(block, block + here.size) * BLOCK, here)
        places += offsets[part]
        elements[places] = values[part]
    return whole


def _side_by_side(
    base: Sequence[NDArray[np.uint8]], new: Sequence[NDArray[np.uint8]], unit: np.dtype[np.unsignedinteger]
) -> Iterator[tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]]]:
    """Both streams in pieces of equal length, cut where an array of either ends."""
    ends = sorted({int(end) for arrays in (base, new) for end in np.cumsum([a.nbytes for a in arrays])})
    streams = [_Stream(base), _Stream(new)]
    at = 0
    for end in ends:
        while at < end:
            size = min(end - at, AT_ONCE * unit.itemsize)
            old, fresh = (stream.take(size).view(unit) for stream in streams)
            yield old, fresh
            at += size


class _Stream:
    """Arrays as one, of which no piece is taken that lies in two."""

    def __init__(self, arrays: Sequence[NDArray[np.uint8]]) -> None:
        self._left = iter(arrays)
        self._array, self._at = np.empty(0, np.uint8), 0

    def take(self, size: int) -> NDArray[np.uint8]:
        while self._at == self._array.size:
            self._array, self._at = next(self._left), 0
        self._at += size
        return self._array[self._at - size : self._at]
