"""Examples to tokens: prompts for the rollout, and whole conversations with a loss mask for SFT.

The text is always the whole rendered conversation, tokenized once, so that the ids are what the model will
see. Rows are left out only for a reason, and every one is named in `dropped`. They are made one after the
other, and written down as they come: with a folder to write to, memory does not grow with their number.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.channels import channel_of, channel_values
from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.common_prefix import common_prefix
from raytune_rl.data.encode_rows import EncodedRow, Failure, Job, LossScale, Truncation, encode_chunk
from raytune_rl.data.example import Example, RowError
from raytune_rl.data.mapped import RaggedWriter, int_array
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import MediaWriter
from raytune_rl.data.model_tokens import ModelTokens
from raytune_rl.data.parallel import map_chunks
from raytune_rl.errors import ConfigError, DataError
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.data import SHARED

_LOOKED_AT = 64
"""Examples that tell whether a data set has media."""


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
        media: Columns of the rows' media (see `data.media_table`); empty when there are none.
        engine_prompt_ids: The prompts with each medium's placeholders as one, as vLLM takes them beside the
            media; None when there are none.
    """

    prompts: Ragged
    extra: dict[str, list[Any]]
    index: NDArray[np.int64]
    dropped: tuple[Dropped, ...] = ()
    notices: tuple[str, ...] = ()
    media: Columns = field(default_factory=dict)
    engine_prompt_ids: Ragged | None = None

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
        loss_lengths: Tokens of each row that are trained on, int64 `[n]`.
        index, dropped, notices, media: As in `EncodedPrompts`.
        values: What the data says of each row, by name, float64 `[n]`: "label", "margin"; and
            `protocol.data.SHARED`, where an example is several rows.
    """

    tokens: Ragged
    loss_mask: Ragged
    loss_lengths: NDArray[np.int64]
    index: NDArray[np.int64]
    dropped: tuple[Dropped, ...] = ()
    notices: tuple[str, ...] = ()
    media: Columns = field(default_factory=dict)
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def reasons(self) -> Counter[str]:
        """Reason to number of dropped examples."""
        return Counter(drop.reason for drop in self.dropped)


@dataclass(frozen=True)
class MediaSettings:
    """How rows with media are read.

    Attributes:
        processor: The model's processor.
        root: Folder that relative paths start from; the current one if None.
        inline: Put the bytes of local files into the columns, for workers on other machines, instead of
            their paths. What came by URL or as bytes is always put in.
    """

    processor: MediaProcessor
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
    media: MediaSettings | None = None,
    model: ModelTokens | None = None,
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
        media: For a model that takes media; without it a row with any is an error.
        model: What the model says of its tokens.

    Raises:
        RowError: A row cannot be encoded; it names file, line and reason.
        ModelError: The tokenizer has no chat template, or makes tokens that the model does not have.
        ConfigError: 'right' truncation, which would cut off the place where the answer begins; a length below
            1.
        DataError: No row is left.
    """
    if truncation_strategy == "right":
        raise ConfigError(
            "truncation_strategy 'right' would cut off the question's end and the generation prompt; "
            "use 'left' or 'delete'"
        )
    job = make_job(tokenizer, max_length, truncation_strategy, None, media, model)
    prompts, engine_prompt_ids = (
        RaggedWriter(name, np.int32, None) for name in ("prompt", "engine_prompt_ids")
    )
    shown = MediaWriter()
    index: list[int] = []
    dropped: list[Dropped] = []
    unwritten: Counter[str] = Counter()
    cut = 0
    for number, row in enumerate(run_job(job, examples, strict, num_proc, progress)):
        if isinstance(row, Dropped):
            dropped.append(row)
            continue
        index.append(number)
        cut += row.cut
        unwritten.update(row.unwritten)
        prompts.append(row.tokens)
        engine_prompt_ids.append(row.tokens if row.engine_prompt_ids is None else row.engine_prompt_ids)
        shown.append(row.media)
    some_left(index, dropped, "rows")
    extra = [examples[i].extra for i in index]
    names = dict.fromkeys(name for one in extra for name in one)
    columns = shown.close()
    return EncodedPrompts(
        prompts=prompts.close(),
        extra={name: [one.get(name) for one in extra] for name in names},
        index=int_array(index),
        dropped=tuple(dropped),
        notices=(
            *notices_of(job),
            *cut_notice(cut, max_length, truncation_strategy, "prompts"),
            *unwritten_notices(unwritten, "prompts"),
        ),
        media=columns,
        engine_prompt_ids=engine_prompt_ids.close() if columns else None,
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
    media: MediaSettings | None = None,
    folder: Path | None = None,
    model: ModelTokens | None = None,
    channels: bool = False,
) -> EncodedSFT:
    """Writes every conversation with the model's chat template, tokenizes it and marks what is trained on.

    Trained are the assistant's turns with their end-of-turn token: it is what the model must learn to write
    to stop.

    Args:
        examples: Conversations that end with the assistant.
        tokenizer, strict, num_proc, progress, media, model: As in `encode_prompts`.
        max_length: Most tokens a row may have; None is no limit.
        truncation_strategy: For longer ones: 'delete' drops the row, 'left' keeps the last tokens, 'right'
            the first, 'error' stops. A row in which truncation leaves nothing to train on is dropped.
        loss_scale: 'default' trains on every assistant turn, 'last_round' on those after the last user turn,
            'all' on every token. A message's own `loss` goes before the first two.
        folder: Where the columns are to lie as files (see `data.mapped`), which the result then maps; in
            memory without it.
        channels: Say of each row of which channel it is; see `data.channels`.

    Raises:
        RowError: A row cannot be encoded, or its assistant turns cannot be told from the rest.
        ModelError: The tokenizer has no chat template, or makes tokens that the model does not have.
        ConfigError: An unknown `loss_scale`, a length below 1.
        DataError: No row is left, or there are too many channels.
    """
    if loss_scale not in ("default", "last_round", "all"):
        raise ConfigError(f"loss_scale is {loss_scale!r}; it is default, last_round or all")
    job = make_job(tokenizer, max_length, truncation_strategy, loss_scale, media, model)
    writer = RowWriter(folder)
    named: list[str | None] = []
    for number, row in enumerate(run_job(job, examples, strict, num_proc, progress)):
        if isinstance(row, Dropped):
            writer.dropped.append(row)
            continue
        writer.append(number, row)
        if channels:
            named.append(channel_of(examples[number]))
    values, without = channel_values(named) if channels else ({}, ())
    cut = cut_notice(writer.cut, max_length, truncation_strategy, "rows")
    return writer.close((*notices_of(job), *cut, *without), values)


class RowWriter:
    """Writes rows down as they come, to files or to memory, and gives them back as columns.

    Attributes:
        dropped: Examples that are not among them, to be added to.
        cut: Examples that were cut to their length.
    """

    def __init__(self, folder: Path | None) -> None:
        self.dropped: list[Dropped] = []
        self.cut = 0
        self._unwritten: Counter[str] = Counter()
        self._tokens = RaggedWriter("tokens", np.int32, folder)
        self._mask = RaggedWriter("loss_mask", np.bool_, folder)
        self._media = MediaWriter(folder)
        self._trained = array("q")
        self._shared = array("q")
        self._index = array("q")

    def append(self, number: int, *rows: EncodedRow) -> None:
        """Adds what example `number` has become, one row or several."""
        self._index.append(number)
        self.cut += any(row.cut for row in rows)
        if unwritten := {key for row in rows for key in row.unwritten}:
            self._unwritten.update(unwritten)
        if len(rows) > 1:
            self._shared.extend([common_prefix([row.tokens for row in rows])] * len(rows))
        for row in rows:
            self._tokens.append(row.tokens)
            self._mask.append(row.mask)
            self._media.append(row.media)
            self._trained.append(int(row.mask.sum()))

    def close(
        self,
        notices: tuple[str, ...],
        values: dict[str, NDArray[np.float64]] | None = None,
        units: str = "rows",
    ) -> EncodedSFT:
        """The columns that have been written.

        Raises:
            DataError: Every example was dropped.
        """
        some_left(self._index, self.dropped, units)
        shared = {SHARED: int_array(self._shared).astype(np.float64)} if self._shared else {}
        return EncodedSFT(
            tokens=self._tokens.close(),
            loss_mask=self._mask.close(),
            loss_lengths=int_array(self._trained),
            index=int_array(self._index),
            dropped=tuple(self.dropped),
            notices=(*notices, *unwritten_notices(self._unwritten, units)),
            media=self._media.close(),
            values={**(values or {}), **shared},
        )


def some_left(index: Sequence[int], dropped: Sequence[Dropped], units: str) -> None:
    """Raises:
    DataError: Every example was dropped; the message has the first one's reason.
    """
    if dropped and not index:
        first = dropped[0]
        raise DataError(
            f"none of {len(dropped)} {units} can be used. "
            f"The first: {first.source}:{first.line}: {first.reason}{first.detail and ': ' + first.detail}"
        )


def make_job(
    tokenizer: Any,
    max_length: int | None,
    truncation: Truncation,
    loss_scale: LossScale | None,
    media: MediaSettings | None,
    model: ModelTokens | None = None,
) -> Job:
    """The job of encoding rows; arguments and errors as in `encode_sft`."""
    chat = ChatTemplate.of(tokenizer) if media is None else media.processor.chat
    if model is not None:
        chat = replace(chat, eos_token_ids=model.eos)
        if (mark := chat.turn_end.mark) is not None:
            model.refuse_beyond([mark], chat.tokenizer, "the chat template's end of a turn")
    if media is None:
        return Job(chat, max_length, truncation, loss_scale, model=model)
    return Job(chat, max_length, truncation, loss_scale, media.processor, media.root, media.inline, model)


def run_job(
    job: Job,
    examples: Sequence[Example],
    strict: bool,
    num_proc: int,
    progress: Callable[[int], None] | None,
) -> Iterator[EncodedRow | Dropped]:
    """The encoded row of each example, or why there is none, in their order.

    Raises:
        RowError: A row cannot be encoded, and that is to stop the run.
        ConfigError: A length below 1, or an unknown truncation.
    """
    if job.max_length is not None and job.max_length < 1:
        raise ConfigError(f"max_length is {job.max_length}; it must be at least 1")
    if job.truncation not in ("delete", "left", "right", "error"):
        raise ConfigError(f"truncation_strategy is {job.truncation!r}; it is delete, left, right or error")
    # A medium costs as much as hundreds of texts: small chunks.
    shows = job.media is not None and any(example.has_media for example in islice(examples, _LOOKED_AT))
    heavy = {"chunk_rows": 16} if shows else {}
    results = map_chunks(encode_chunk, job, examples, num_proc=num_proc, progress=progress, **heavy)
    for number, result in enumerate(results):
        if not isinstance(result, Failure):
            if job.model is not None and not job.model.knows(ids := _spoken(job, result)):
                where = f"{examples[number].source}:{examples[number].line}: as the chat template writes it"
                job.model.refuse_beyond(ids, job.chat.tokenizer, f"{where}, the row")
            yield result
            continue
        example = examples[number]
        if result.stops == "always" or (strict and result.stops == "strict"):
            raise RowError(example.source, example.line, str(result))
        unusable = result.stops == "strict"
        yield Dropped(example.source, example.line, result.reason, unusable, result.detail)


def _spoken(job: Job, row: EncodedRow) -> NDArray[np.int32]:
    """A row's tokens without those that stand for media, which need no embedding."""
    if job.media is None or not row.media:
        return row.tokens
    return row.tokens[~np.isin(row.tokens, job.media.placeholder_ids)]


def notices_of(job: Job) -> tuple[str, ...]:
    """Notices on the chat template."""
    notices = [job.chat.notice]
    if job.loss_scale is not None or not job.chat.turn_end.stops:
        notices.append(job.chat.turn_end.notice)
    return tuple(sentence for sentence in notices if sentence is not None)


def cut_notice(count: int, max_length: int | None, how: Truncation, units: str) -> tuple[str, ...]:
    """Notices on examples that were cut, as the user asked."""
    if not count:
        return ()
    return (f"{count:,} {units} were over --max_length {max_length} and lost their {how} end",)


def unwritten_notices(counts: Counter[str], units: str) -> tuple[str, ...]:
    """Notices on keys of the user's turns, and on tools, that the model never sees."""
    return tuple(
        f"{count:,} {units} have {key!r}, which the chat template does not write: the model does not see it"
        for key, count in sorted(counts.items())
    )
