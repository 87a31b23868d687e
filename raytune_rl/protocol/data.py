"""Prepared data as the controller knows it: where it lies, how long its rows are, what became of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from raytune_rl.protocol.media import Modality
from raytune_rl.protocol.model import Traits
from raytune_rl.protocol.rows import Prefixes, RowPointer, TrainBatch


@dataclass(frozen=True)
class MediaCounts:
    """The media of a data set in numbers.

    Attributes:
        shown: By modality, how many the rows show; modalities that none shows are not among them.
        distinct: By modality, how many of these are distinct.
        stored_bytes: Of those files whose content, not path, is in the object store.
        most: By modality, the most that one row shows.
    """

    shown: dict[str, int] = field(default_factory=dict)
    distinct: dict[str, int] = field(default_factory=dict)
    stored_bytes: int = 0
    most: dict[str, int] = field(default_factory=dict)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities that the rows show."""
        return tuple(modality for modality in get_args(Modality) if modality in self.shown)


@dataclass(frozen=True)
class SourceCounts:
    """One data set in numbers; `taken` differs from `good` where `#N` was given."""

    name: str
    rows: int
    bad: int
    taken: int

    @property
    def good(self) -> int:
        """Rows that could be read."""
        return self.rows - self.bad


@dataclass(frozen=True)
class Account:
    """An account of every row of the data.

    Attributes:
        sources: The data sets.
        dropped: Reason -> rows left out while encoding, such as too long.
        quarantine: File with the bad rows, if there are any.
        notices: Sentences for the user.
        max_positions: Longest sequence the model takes, tokens; None if it does not say.
        stop_token_ids: Tokens that end an assistant's turn in the model's chat template.
        takes_media: Whether the model takes images, videos or audio: its rows are never packed.
        media: Those of the rows.
        placeholder_ids: Tokens that stand for features of media: no completion may have them.
        columns: The data's columns that rewards receive.
        traits: What of the model an engine is set up for.
    """

    sources: tuple[SourceCounts, ...]
    dropped: dict[str, int]
    quarantine: str | None
    notices: tuple[str, ...]
    max_positions: int | None
    stop_token_ids: tuple[int, ...]
    takes_media: bool = False
    media: MediaCounts = field(default_factory=MediaCounts)
    placeholder_ids: tuple[int, ...] = ()
    columns: tuple[str, ...] = ()
    traits: Traits = field(default_factory=Traits)


TEACHER_PROMPT, TEACHER_PROMPT_TOKENS = "teacher_prompt", "teacher_prompt_tokens"
"""A column: of the data what a teacher is asked instead of the prompt, of prompts its tokens; and the value
that says how many they are."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the object store.

    Attributes:
        columns: Reference to {"prompt": Ragged int32}; where rows have media also "engine_prompt_ids", the
            prompts as the engine takes them beside those, and the columns of `data.media_table`; where
            teachers are asked something else, `TEACHER_PROMPT`, Ragged int32.
        extra: Reference to the data set's other columns, one entry a prompt, for the rewards.
        texts: Reference to the prompts as text, for the completion log.
        lengths: Tokens of each prompt, int64 `[n]`.
        account: What became of the rows.
        values: By name, what the data says of each row, float64 `[n]`, such as "teacher".
    """

    columns: Any
    extra: Any
    texts: Any
    lengths: NDArray[np.int64]
    account: Account
    values: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def media(self, row: int) -> RowPointer | None:
        """Where the media of a prompt lie; None if no prompt has any."""
        return RowPointer(self.columns, row) if self.account.media.shown else None


SHARED = "shared_tokens"
"""Name of the value: with how many tokens both rows of a unit begin alike."""


@dataclass(frozen=True)
class TokenSet:
    """Tokenized conversations.

    Attributes:
        columns: Reference to {"tokens": Ragged int32, "loss_mask": Ragged bool}, and the columns of
            `data.media_table` where rows have media.
        lengths: Tokens of each row, int64 `[n]`.
        loss_lengths: Of those, the ones trained on, int64 `[n]`.
        account: What became of the rows.
        values: By name, what the data says of each row, float64 `[n]`, such as "label"; and `SHARED`, where
            a unit is two rows.
    """

    columns: Any
    lengths: NDArray[np.int64]
    loss_lengths: NDArray[np.int64]
    account: Account
    values: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Sequence[int]) -> TrainBatch:
        """Some of the rows."""
        index = np.asarray(rows, dtype=np.int64)
        shared = self.values.get(SHARED)
        prefixes = None if shared is None else Prefixes(index // 2, shared[index].astype(np.int64))
        return TrainBatch(
            [RowPointer(self.columns, int(row)) for row in rows], self.lengths[index], prefixes=prefixes
        )
