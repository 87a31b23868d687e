"""Micro-batches of a vision model: rows laid out padded, and the pixels of their pictures beside them.

Pixels are made here, in the worker that trains on them, because they are some twenty times larger than the
pictures that travel. Those of the next rows are made ahead, those of the rows used last are kept.

If the vision tower trains, or its weights are sharded, then running it is a collective: every rank must do it
in every micro-batch. Where no row has a picture, a short row with a small grey one is put behind the rows. It
has no loss tokens, so its gradient is zero, and exactly so; but it is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from raytune_rl.data.collate import MicroBatch, collate
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import Medium
from raytune_rl.data.pixels_ahead import PixelsAhead, key_of
from raytune_rl.errors import DataError

CACHE_BYTES = 512 * 2**20
Pixels = dict[str, torch.Tensor]


class MediaCollator:
    """Collates rows of a vision model.

    Args:
        vision: The model's processor.
        dtype: Of the model; pixels are cast to it.
        always: Whether every micro-batch needs a picture, see above.
        cache_bytes: Pixels to keep.
        threads: That make pixels ahead, see `expect`.
    """

    def __init__(
        self,
        vision: MediaProcessor,
        *,
        dtype: torch.dtype = torch.float32,
        always: bool = False,
        cache_bytes: int = CACHE_BYTES,
        threads: int = 0,
    ) -> None:
        self.vision = vision
        self._dtype = dtype
        self._always = always
        self._cache = _Cache(cache_bytes)
        self._ahead = PixelsAhead(self._make, threads)

    def expect(self, pictures: Iterable[Sequence[Medium]]) -> None:
        """The pictures of the rows that will be collated next, in this order: their pixels are begun with."""
        self._ahead.expect(row for row in pictures if row and self._cache.get(key_of(row)) is None)

    def collate(
        self,
        tokens: Sequence[NDArray],
        loss_masks: Sequence[NDArray],
        pictures: Sequence[Sequence[Medium]],
        *,
        pad_token_id: int,
    ) -> MicroBatch:
        """`collate.collate` in the padded layout, with the model's inputs for the pictures of each row.

        Position ids are left to the model: with pictures they have as many axes as it likes.

        Raises:
            MediaError: A picture's file is gone or is not the one that was tokenized.
            DataError: A row's placeholders are not as many as the features of its pictures.
        """
        rows, masks = list(tokens), list(loss_masks)
        pixels = self._pixels(pictures)
        if self._always and not pixels:
            sample, picture = self.vision.sample
            rows.append(sample)
            masks.append(np.zeros(len(sample), dtype=np.bool_))
            pixels = self.vision.pixels([[picture]])
        micro = collate(rows, masks, layout="padded", pad_token_id=pad_token_id)
        types = self.vision.token_types(micro.input_ids.numpy())
        types *= 0 if micro.attention_mask is None else micro.attention_mask.numpy()
        _check(self.vision, pixels, int(types.sum()))
        inputs = {
            name: value.to(self._dtype) if value.is_floating_point() else value
            for name, value in pixels.items()
        }
        if self.vision.type_name is not None:
            inputs[self.vision.type_name] = torch.from_numpy(types)
        ends = micro.row_ends[: len(tokens)]
        return replace(micro, position_ids=None, n_rows=len(tokens), row_ends=ends, model_inputs=inputs)

    def _pixels(self, pictures: Sequence[Sequence[Medium]]) -> Pixels:
        rows = [row for row in pictures if row]
        parts = [self._of_row(row) for row in rows]
        if len(parts) <= 1:
            return dict(parts[0]) if parts else {}
        if all(_join(parts[0], part) for part in parts[1:]):
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        # Rows that the processor would pad to each other's shape (tiles, several pictures a row): let it.
        return self.vision.pixels([[self._decode(picture) for picture in row] for row in rows])

    def _of_row(self, row: Sequence[Medium]) -> Pixels:
        key = key_of(row)
        found = self._cache.get(key)
        if found is None:
            found = self._ahead.take(row)
            self._cache.put(key, found)
        return found

    def _make(self, row: Sequence[Medium]) -> Pixels:
        return self.vision.pixels([[self._decode(picture) for picture in row]])

    def _decode(self, picture: Medium) -> Image:
        return self.vision.decode(picture.read(), picture.name)


class _Cache:
    """Least recently used first out, bounded by bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._rows: OrderedDict[tuple[int, ...], Pixels] = OrderedDict()

    def get(self, key: tuple[int, ...]) -> Pixels | None:
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: tuple[int, ...], pixels: Pixels) -> None:
        self._rows[key] = pixels
        self._held += _size(pixels)
        while self._held > self._limit:
            self._held -= _size(self._rows.popitem(last=False)[1])


def _size(pixels: Pixels) -> int:
    return sum(value.nbytes for value in pixels.values())


def _join(a: Pixels, b: Pixels) -> bool:
    """Whether two rows' inputs can be put one behind the other."""
    return a.keys() == b.keys() and all(a[name].shape[1:] == b[name].shape[1:] for name in a)


def _check(vision: MediaProcessor, pixels: Pixels, placeholders: int) -> None:
    features = vision.count_features(pixels) if pixels else 0
    if features is not None and features != placeholders:
        raise DataError(
            f"{placeholders} image tokens in a micro-batch whose images make {features} features; was the "
            "data tokenized with another processor or --max_pixels?"
        )
