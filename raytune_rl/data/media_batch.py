"""Micro-batches of a model that takes media: rows laid out padded, and their media as the model takes them.

Pixels and samples are made here, in the worker that trains on them, because they are some twenty times larger
than the files that travel. Those of the next rows are made ahead, those of the rows used last are kept.

If the part of the model that media pass through trains, or its weights are sharded, then running it is a
collective: every rank must do it in every micro-batch. Where no row has a medium of a modality, a short row
with a small grey one is put behind the rows. It has no loss tokens, so its gradient is zero, and exactly
so; but it is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from raytune_rl.data.collate import MicroBatch, collate
from raytune_rl.data.media_processor import Decoded, MediaProcessor
from raytune_rl.data.media_table import Medium
from raytune_rl.data.pixels_ahead import Key, PixelsAhead, key_of
from raytune_rl.protocol.media import Modality

CACHE_BYTES = 512 * 2**20
Pixels = dict[str, torch.Tensor]


class MediaCollator:
    """Collates rows of a model that takes media.

    Args:
        media: The model's processor.
        dtype: Of the model; pixels and features are cast to it.
        always: Kinds of media that every micro-batch needs, see above.
        cache_bytes: Pixels to keep.
        threads: That make pixels ahead, see `expect`.
    """

    def __init__(
        self,
        media: MediaProcessor,
        *,
        dtype: torch.dtype = torch.float32,
        always: Sequence[Modality] = (),
        cache_bytes: int = CACHE_BYTES,
        threads: int = 0,
    ) -> None:
        self.media = media
        self._dtype = dtype
        self._always = tuple(always)
        self._samples: dict[tuple[Modality, ...], tuple[NDArray[np.int32], list[Decoded], Pixels]] = {}
        self._cache = _Cache(cache_bytes)
        self._ahead = PixelsAhead(self._make, threads)

    def expect(self, media: Iterable[Sequence[Medium]]) -> None:
        """The media of the rows that will be collated next, in this order: their pixels are begun with."""
        self._ahead.expect(row for row in media if row and self._cache.get(key_of(row)) is None)

    def collate(
        self,
        tokens: Sequence[NDArray],
        loss_masks: Sequence[NDArray],
        media: Sequence[Sequence[Medium]],
        *,
        pad_token_id: int,
    ) -> MicroBatch:
        """`collate.collate` in the padded layout, with the model's inputs for the media of each row.

        Position ids are left to the model: with pictures they have as many axes as it likes.

        Raises:
            MediaError: A medium's file is gone or is not the one that was tokenized.
            DataError: A row's placeholders are not as many as the features of its media.
        """
        rows, masks = list(tokens), list(loss_masks)
        parts = [self._of_row(row) for row in media if row]
        shown = {medium.modality for row in media for medium in row}
        missing = [modality for modality in self._always if modality not in shown]
        decoded: list[list[Decoded]] = []
        if missing:
            sample, grey, made = self._sample(tuple(missing))
            rows.append(sample)
            masks.append(np.zeros(len(sample), dtype=np.bool_))
            decoded.append(grey)
            parts.append(made)
        pixels = _joined(parts)
        if pixels is None:
            # Rows that the processor would pad to each other's shape (tiles, several pictures a row): let it.
            known = [[self.media.read(medium) for medium in row] for row in media if row]
            pixels = self.media.pixels([*known, *decoded])
        micro = collate(rows, masks, layout="padded", pad_token_id=pad_token_id)
        types = self.media.token_types(micro.input_ids.numpy())
        types *= 0 if micro.attention_mask is None else micro.attention_mask.numpy()
        self.media.check_features(pixels, types, "a micro-batch's")
        inputs = {
            # Numbers about a medium (seconds between frames) are no activations, and keep their precision.
            name: value.to(self._dtype) if value.is_floating_point() and value.ndim > 1 else value
            for name, value in pixels.items()
        }
        if self.media.type_name is not None:
            inputs[self.media.type_name] = torch.from_numpy(types)
        ends = micro.row_ends[: len(tokens)]
        return replace(micro, position_ids=None, n_rows=len(tokens), row_ends=ends, model_inputs=inputs)

    def _sample(self, modalities: tuple[Modality, ...]) -> tuple[NDArray[np.int32], list[Decoded], Pixels]:
        """The row that is put behind others for these modalities: tokens, media and what the model takes of
        them; made once."""
        if modalities not in self._samples:
            tokens, grey = self.media.sample(modalities)
            self._samples[modalities] = tokens, grey, self.media.pixels([grey])
        return self._samples[modalities]

    def _of_row(self, row: Sequence[Medium]) -> Pixels:
        key = key_of(row)
        found = self._cache.get(key)
        if found is None:
            found = self._ahead.take(row)
            self._cache.put(key, found)
        return found

    def _make(self, row: Sequence[Medium]) -> Pixels:
        return self.media.pixels([[self.media.read(medium) for medium in row]])


class _Cache:
    """Least recently used first out, bounded by bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._rows: OrderedDict[Key, Pixels] = OrderedDict()

    def get(self, key: Key) -> Pixels | None:
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: Key, pixels: Pixels) -> None:
        self._rows[key] = pixels
        self._held += _size(pixels)
        while self._held > self._limit:
            self._held -= _size(self._rows.popitem(last=False)[1])


def _size(pixels: Pixels) -> int:
    return sum(value.nbytes for value in pixels.values())


def _joined(parts: Sequence[Pixels]) -> Pixels | None:
    """The inputs of several rows, one behind the other; None if their shapes do not fit."""
    names = dict.fromkeys(name for part in parts for name in part)
    columns = {name: [part[name] for part in parts if name in part] for name in names}
    if any(value.shape[1:] != values[0].shape[1:] for values in columns.values() for value in values):
        return None
    return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in columns.items()}
