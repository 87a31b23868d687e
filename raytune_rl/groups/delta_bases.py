"""What the differences of published weights stand on, and when a bucket is published whole again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytune_rl.protocol.weights import DeltaOn, TensorEntry


@dataclass
class _Base:
    ref: Any
    nbytes: int
    spent: int = 0


class DeltaBases:
    """By bucket, the newest version of it that is whole; later ones may be its differences to that.

    Differences to one base grow, so it is renewed as soon as they have together cost as much as it did. Where
    they grow evenly, no other interval makes fewer bytes a version.

    Everything is a function of bytes that lie in the object store: a rank that was started anew, and engines
    that come late, need no more than the references.
    """

    def __init__(self) -> None:
        self._bases: list[_Base | None] = []

    def offered(self, count: int) -> list[Any]:
        """For the next publication's buckets: a reference each, None where it must be whole."""
        bases = self._bases or [None] * count
        return [None if base is None or base.spent >= base.nbytes else base.ref for base in bases]

    def published(
        self, refs: Sequence[Any], index: Sequence[Sequence[TensorEntry]], sizes: Sequence[int | None]
    ) -> tuple[DeltaOn | None, ...]:
        """Notes what came of it.

        Args:
            refs: The buckets.
            index: Their entries.
            sizes: Bytes of those that are differences; None for those that are whole.

        Returns:
            What each stands on.
        """
        bases: list[_Base | None] = self._bases or [None] * len(refs)
        deltas: list[DeltaOn | None] = []
        self._bases = []
        for ref, entries, size, base in zip(refs, index, sizes, bases, strict=True):
            if size is None or base is None:
                base = _Base(ref, sum(entry.nbytes for entry in entries))
                deltas.append(None)
            else:
                base.spent += size
                deltas.append(DeltaOn(base.ref, size))
            self._bases.append(base)
        return tuple(deltas)
