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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from raytune_rl.data.collate import MicroBatch, collate
from raytune_rl.data.media_processor import Decoded, MediaProcessor
from raytune_rl.data.media_table import Medium
from raytune_rl.data.pixels_ahead import Key, PixelsAhead, key_of
from raytune_rl.data.shared_prefix import Together, alone, arranged, lay_out
from raytune_rl.protocol.media import Modality
from raytune_rl.protocol.rows import Prefixes

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
        prefixes: Prefixes | None = None,
    ) -> MicroBatch:
        """`collate.collate` in the padded layout, with the model's inputs for the media of each row.

        Position ids are left to the model: with pictures they have as many axes as it likes.

        With `prefixes` rows share what they begin with, as `shared_prefix.collate_shared` has it, and with it
        their media, which are there once for a group; a group that has media elsewhere, or not the same, is
        laid out row by row.

        Raises:
            MediaError: A medium's file is gone or is not the one that was tokenized.
            DataError: A row's placeholders are not as many as the features of its media.
        """
        rows, masks = list(tokens), list(loss_masks)
        groups = [] if prefixes is None or not tokens else self._groups(tokens, media, prefixes)
        in_order = [media[group.rows[0]] for group in groups] or media
        parts = [self._of_row(row) for row in in_order if row]
        shown = {medium.modality for row in media for medium in row}
        missing = [modality for modality in self._always if modality not in shown]
        decoded: list[list[Decoded]] = []
        if missing:
            sample, grey, made = self._sample(tuple(missing))
            groups += alone([*rows, sample], [len(rows)]) if groups else []
            rows.append(sample)
            masks.append(np.zeros(len(sample), dtype=np.bool_))
            decoded.append(grey)
            parts.append(made)
        pixels = _joined(parts)
        if pixels is None:
            # Rows that the processor would pad to each other's shape (tiles, several pictures a row): let it.
            known = [[self.media.read(medium) for medium in row] for row in in_order if row]
            pixels = self.media.pixels([*known, *decoded])
        if groups:
            micro = lay_out(rows, masks, groups, n_rows=len(tokens))
        else:
            micro = collate(rows, masks, layout="padded", pad_token_id=pad_token_id)
        micro = self._with_inputs(micro, pixels)
        if groups:
            return micro
        ends = micro.row_ends[: len(tokens)]
        return replace(micro, position_ids=None, n_rows=len(tokens), row_ends=ends)

    def probes(self) -> Iterator[tuple[MicroBatch, MicroBatch]]:
        """Of each modality two rows that begin with one small medium: sharing it, and as padded rows. It is
        noise, as features of a grey one would be so alike that nobody could tell who sees which."""
        noise = torch.Generator().manual_seed(0)
        for modality in self.media.modalities:
            if self.media.refusal(modality) is not None:
                continue
            sample, _, pixels = self._sample((modality,))
            text = sample[self.media.token_types(sample) == 0]
            rows = [np.concatenate([sample, tail]) for tail in (text[:5], text[1:4])]
            masks = [np.arange(len(row)) >= len(sample) for row in rows]
            pixels = {
                name: torch.randn(value.shape, generator=noise) if _is_signal(value) else value
                for name, value in pixels.items()
            }
            twice = _joined([pixels, pixels])
            if twice is None:
                continue
            shared = lay_out(rows, masks, [Together(len(sample), (0, 1))])
            padded = replace(collate(rows, masks, layout="padded", pad_token_id=0), position_ids=None)
            yield self._with_inputs(shared, pixels), self._with_inputs(padded, twice)

    def _with_inputs(self, micro: MicroBatch, pixels: Pixels) -> MicroBatch:
        """The micro-batch with the model's inputs for its media."""
        types = self.media.token_types(micro.input_ids.numpy())
        if micro.attention_mask is not None:
            types *= micro.attention_mask.numpy()
        self.media.check_features(pixels, types, "a micro-batch's")
        inputs = {
            name: value.to(self._dtype) if _is_signal(value) else value for name, value in pixels.items()
        }
        if self.media.type_name is not None:
            inputs[self.media.type_name] = torch.from_numpy(types)
        return replace(micro, model_inputs=inputs)

    def _groups(
        self, tokens: Sequence[NDArray], media: Sequence[Sequence[Medium]], prefixes: Prefixes
    ) -> list[Together]:
        found: list[Together] = []
        for group in arranged(tokens, prefixes.groups, prefixes.lengths):
            alike = len({key_of(media[row]) for row in group.rows}) == 1
            own = any(self.media.token_types(tokens[row][group.shared :]).any() for row in group.rows)
            found += [group] if alike and not own else alone(tokens, group.rows)
        return found

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


def _is_signal(value: torch.Tensor) -> bool:
    """Whether it is what the model sees or hears. Numbers about a medium (seconds between frames) are no
    activations, and keep their precision."""
    return value.is_floating_point() and value.ndim > 1


def _size(pixels: Pixels) -> int:
    return sum(value.nbytes for value in pixels.values())


def _joined(parts: Sequence[Pixels]) -> Pixels | None:
    """The inputs of several rows, one behind the other; None if their shapes do not fit."""
    names = dict.fromkeys(name for part in parts for name in part)
    columns = {name: [part[name] for part in parts if name in part] for name in names}
    if any(value.shape[1:] != values[0].shape[1:] for values in columns.values() for value in values):
        return None
    return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in columns.items()}
