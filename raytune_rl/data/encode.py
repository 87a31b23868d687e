"""Examples to tokens: prompts for the rollout, and whole conversations with a loss mask for SFT.

The text is always the whole rendered conversation, tokenized once, so that the ids are what the model will
see. Rows are left out only for a reason, and every one is named in `dropped`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.encode_rows import EncodedRow, Failure, Job, LossScale, Truncation, encode_chunk
from raytune_rl.data.example import Example, RowError
from raytune_rl.data.parallel import map_chunks
from raytune_rl.data.pictures import Picture, picture_columns
from raytune_rl.data.ragged import Columns, Ragged
from raytune_rl.data.vision import VisionProcessor
from raytune_rl.errors import ConfigError, DataError


@dataclass(frozen=True)
class Dropped:
    """An example that was left out, and why. `unusable` if the row is at fault, not its length.

    Rows are counted by `reason`; what differs from row to row is in `detail`.
    """

    source: str
    line: int
    reason: str
    unusable: bool = False
    detail: str = ""


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as the rollout takes them. Row `i` belongs to `examples[index[i]]`.

    Attributes:
        prompts: Ragged int32 `[n]`, with the generation prompt at the end.
        extra: Column name to one value a row, None where a row has no such column; rewards receive them.
        index: int64 `[n]`, increasing.
        dropped: The examples that are not among the rows.
        notices: Sentences for the user.
        images: Columns of the rows' pictures (see `data.pictures`); empty when there are none.
        given: The prompts with each picture's placeholders as one, as vLLM takes them beside the pictures;
            None when there are none.
    """

    prompts: Ragged
    extra: dict[str, list[Any]]
    index: NDArray[np.int64]
    dropped: tuple[Dropped, ...] = ()
    notices: tuple[str, ...] = ()
    images: Columns = field(default_factory=dict)
    given: Ragged | None = None

    @property
    def reasons(self) -> Counter[str]:
        """Reason to number of dropped examples."""
        return Counter(drop.reason for drop in self.dropped)


@dataclass(frozen=True)
class EncodedSFT:
    """Conversations as the policy trains on them. Row `i` belongs to `examples[index[i]]`.

    Attributes:
        tokens: Ragged int32 `[n]`.
        loss_mask: Ragged bool with the offsets of `tokens`; at least one True a row, never at its index 0.
        index, dropped, notices, images: As in `EncodedPrompts`.
        values: What the data says of each row, by name, float64 `[n]`: "label", "margin".
    """

    tokens: Ragged
    loss_mask: Ragged
    index: NDArray[np.int64]
    dropped: tuple[Dropped, ...] = ()
    notices: tuple[str, ...] = ()
    images: Columns = field(default_factory=dict)
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def reasons(self) -> Counter[str]:
        """Reason to number of dropped examples."""
        return Counter(drop.reason for drop in self.dropped)


@dataclass(frozen=True)
class ImageSettings:
    """How rows with pictures are read.

    Attributes:
        vision: The model's processor.
        root: Folder that relative paths start from; the current one if None.
        inline: Put the bytes of local files into the columns, for workers on other machines, instead of
            their paths. What came by URL or as bytes is always put in.
    """

    vision: VisionProcessor
    root: str | None = None
    inline: bool = False


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int | None = None,
    truncation_strategy: Truncation = "left",
    *,
    strict: bool = True,
    num_proc: int = 1,
    progress: Callable[[int], None] | None = None,
    images: ImageSettings | None = None,
) -> EncodedPrompts:
    """Writes every conversation with the model's chat template and generation prompt, and tokenizes it.

    Args:
        examples: Conversations that end with the user (or a tool).
        tokenizer: A Transformers tokenizer.
        max_length: Most tokens a prompt may have; None is no limit.
        truncation_strategy: For longer ones: 'left' keeps the last tokens, 'delete' drops the row, 'error'
            stops.
        strict: A row that the template refuses stops; otherwise it is dropped with its reason.
        num_proc: Processes for big inputs; the result does not depend on it.
        progress: Called with the number of rows done since the last call.
        images: For a vision model; without it a row with images is an error.

    Raises:
        RowError: A row cannot be encoded; it names file, line and reason.
        ModelError: The tokenizer has no chat template.
        ConfigError: 'right' truncation, which would cut off the place where the answer begins; a length below
            1.
        DataError: No row is left.
    """
    if truncation_strategy == "right":
        raise ConfigError(
            "truncation_strategy 'right' would cut off the question's end and the generation prompt; "
            "use 'left' or 'delete'"
        )
    job = make_job(tokenizer, max_length, truncation_strategy, None, images)
    rows, index, dropped = run_job(job, examples, strict, num_proc, progress)
    kept = [examples[i] for i in index]
    names = dict.fromkeys(name for example in kept for name in example.extra)
    given = [row.tokens if row.given is None else row.given for row in rows]
    return EncodedPrompts(
        prompts=Ragged.from_rows([row.tokens for row in rows], np.int32),
        extra={name: [example.extra.get(name) for example in kept] for name in names},
        index=index,
        dropped=dropped,
        notices=notices_of(job),
        images=picture_columns(row.pictures for row in rows),
        given=Ragged.from_rows(given, np.int32) if any(row.pictures for row in rows) else None,
    )


def encode_sft(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int | None = None,
    truncation_strategy: Truncation = "delete",
    loss_scale: LossScale = "default",
    *,
    strict: bool = True,
    num_proc: int = 1,
    progress: Callable[[int], None] | None = None,
    images: ImageSettings | None = None,
) -> EncodedSFT:
    """Writes every conversation with the model's chat template, tokenizes it and marks what is trained on.

    Trained are the assistant's turns with their end-of-turn token: it is what the model must learn to write
    to stop.

    Args:
        examples: Conversations that end with the assistant.
        tokenizer, strict, num_proc, progress, images: As in `encode_prompts`.
        max_length: Most tokens a row may have; None is no limit.
        truncation_strategy: For longer ones: 'delete' drops the row, 'left' keeps the last tokens, 'right'
            the first, 'error' stops. A row in which truncation leaves nothing to train on is dropped.
        loss_scale: 'default' trains on every assistant turn, 'last_round' on those after the last user turn,
            'all' on every token. A message's own `loss` goes before the first two.

    Raises:
        RowError: A row cannot be encoded, or its assistant turns cannot be told from the rest.
        ModelError: The tokenizer has no chat template.
        ConfigError: An unknown `loss_scale`, a length below 1.
        DataError: No row is left.
    """
    if loss_scale not in ("default", "last_round", "all"):
        raise ConfigError(f"loss_scale is {loss_scale!r}; it is default, last_round or all")
    job = make_job(tokenizer, max_length, truncation_strategy, loss_scale, images)
    rows, index, dropped = run_job(job, examples, strict, num_proc, progress)
    return EncodedSFT(
        tokens=Ragged.from_rows([row.tokens for row in rows], np.int32),
        loss_mask=Ragged.from_rows([row.mask for row in rows], np.bool_),
        index=index,
        dropped=dropped,
        notices=notices_of(job),
        images=picture_columns(row.pictures for row in rows),
    )


def make_job(
    tokenizer: Any,
    max_length: int | None,
    truncation: Truncation,
    loss_scale: LossScale | None,
    images: ImageSettings | None,
) -> Job:
    if images is None:
        return Job(ChatTemplate.of(tokenizer), max_length, truncation, loss_scale)
    vision = images.vision
    return Job(vision.chat, max_length, truncation, loss_scale, vision, images.root, images.inline)


def run_job(
    job: Job,
    examples: Sequence[Example],
    strict: bool,
    num_proc: int,
    progress: Callable[[int], None] | None,
) -> tuple[list[EncodedRow], NDArray[np.int64], tuple[Dropped, ...]]:
    if job.max_length is not None and job.max_length < 1:
        raise ConfigError(f"max_length is {job.max_length}; it must be at least 1")
    if job.truncation not in ("delete", "left", "right", "error"):
        raise ConfigError(f"truncation_strategy is {job.truncation!r}; it is delete, left, right or error")
    # A picture costs as much as hundreds of texts: small chunks, and processes sooner.
    heavy = {"chunk_rows": 16, "parallel_from": 64} if any(e.images for e in examples) else {}
    results = map_chunks(encode_chunk, job, examples, num_proc=num_proc, progress=progress, **heavy)
    rows: list[EncodedRow] = []
    index: list[int] = []
    dropped: list[Dropped] = []
    for number, (example, result) in enumerate(zip(examples, results, strict=True)):
        if not isinstance(result, Failure):
            rows.append(replace(result, pictures=_own_bytes(result.pictures, example)))
            index.append(number)
        elif result.stops == "always" or (strict and result.stops == "strict"):
            raise RowError(example.source, example.line, str(result))
        else:
            unusable = result.stops == "strict"
            dropped.append(Dropped(example.source, example.line, result.reason, unusable, result.detail))
    if examples and not rows:
        first = dropped[0]
        raise DataError(
            f"none of {len(examples)} rows can be encoded. "
            f"The first: {first.source}:{first.line}: {first.reason}{first.detail and ': ' + first.detail}"
        )
    return rows, np.array(index, dtype=np.int64), tuple(dropped)


def _own_bytes(pictures: tuple[Picture, ...], example: Example) -> tuple[Picture, ...]:
    """The pictures with the example's bytes for the equal ones that came back from a worker process, so that
    memory holds them once."""
    return tuple(
        replace(picture, data=ref) if isinstance(ref, bytes) else picture
        for picture, ref in zip(pictures, example.images, strict=bool(pictures))
    )


def notices_of(job: Job) -> tuple[str, ...]:
    return () if job.chat.notice is None else (job.chat.notice,)
