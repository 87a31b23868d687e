"""One chunk of examples to tokens and loss masks; the part of encoding that runs in worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.chat import ChatTemplate, assistant_spans, trained_turns
from raytune_rl.data.example import Example
from raytune_rl.errors import DataError

Truncation = Literal["delete", "left", "right", "error"]
LossScale = Literal["default", "last_round", "all"]


@dataclass(frozen=True)
class Job:
    """What encoding a row needs besides the row; travels to worker processes once."""

    chat: ChatTemplate
    max_length: int | None
    truncation: Truncation
    loss_scale: LossScale | None  # None: prompts


@dataclass(frozen=True)
class Failure:
    """Why a row has no tokens, and when that is an error: always, under `strict`, or never (as asked)."""

    reason: str
    stops: Literal["always", "strict", "never"]


_MERGED = (
    "the tokenizer merges the beginning or end of an assistant turn with the template's text beside it "
    "(an answer that begins with a line break, for example), so that no token is the turn's first or last"
)

EncodedRow = tuple[NDArray[np.int32], NDArray[np.bool_]]


def encode_chunk(job: Job, examples: Sequence[Example]) -> list[EncodedRow | Failure]:
    """Renders row by row, tokenizes the chunk in one call."""
    results: list[EncodedRow | Failure | None] = []
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    for example in examples:
        try:
            text, found = _render(job, example)
        except DataError as error:
            results.append(Failure(str(error), "strict"))
            continue
        results.append(None)
        texts.append(text)
        spans.append(found)
    encoded = iter(_tokenize(job, texts, spans))
    return [next(encoded) if result is None else result for result in results]


def _render(job: Job, example: Example) -> tuple[str, list[tuple[int, int]]]:
    if example.has_media:
        raise DataError("the row has images, videos or audios; those need a vision model's processor")

    def render(messages: Sequence[Any], *, generation_prompt: bool) -> str:
        return job.chat.render(messages, example.tools, generation_prompt=generation_prompt)

    text = render(example.messages, generation_prompt=job.loss_scale is None)
    if job.loss_scale is None:
        return text, []
    if job.loss_scale == "all":
        return text, [(0, len(text))]
    turns = trained_turns(example, job.loss_scale)
    if not turns:
        raise DataError("no turn of the conversation is trained on")
    return text, list(assistant_spans(example.messages, turns, text, render).values())


def _tokenize(job: Job, texts: list[str], spans: list[list[tuple[int, int]]]) -> list[EncodedRow | Failure]:
    if not texts:
        return []
    tokenizer = job.chat.tokenizer
    with_offsets = tokenizer.is_fast and job.loss_scale is not None
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=with_offsets,
        verbose=False,
    )
    rows: list[EncodedRow | Failure] = []
    for number, (text, ranges) in enumerate(zip(texts, spans, strict=True)):
        tokens = np.array(batch["input_ids"][number], dtype=np.int32)
        try:
            if with_offsets:
                starts = _starts_by_offsets(batch["offset_mapping"][number], ranges)
            else:
                starts = _starts_by_prefix(tokenizer, text, tokens, ranges)
        except DataError as error:
            rows.append(Failure(str(error), "strict"))
        else:
            rows.append(_truncated(job, tokens, _mask(starts, ranges)))
    return rows


def _mask(starts: NDArray[np.int64], ranges: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """True for tokens that begin inside a range; never for the first token, which nothing predicts."""
    mask = np.zeros(len(starts), dtype=np.bool_)
    for start, end in ranges:
        mask |= (starts >= start) & (starts < end)
    mask[:1] = False
    return mask


def _starts_by_offsets(
    offsets: Sequence[tuple[int, int]], ranges: list[tuple[int, int]]
) -> NDArray[np.int64]:
    """Where tokens begin in the text, int64 `[tokens]`; a range must begin where a token does."""
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    for border, _ in ranges:
        if ((places[:, 0] < border) & (border < places[:, 1])).any():
            raise DataError(_MERGED)
    return places[:, 0]


def _starts_by_prefix(
    tokenizer: Any, text: str, tokens: NDArray[np.int32], ranges: list[tuple[int, int]]
) -> NDArray[np.int64]:
    """Where tokens begin, only as exact as the ranges need, for tokenizers that do not tell.

    The text up to each border must tokenize to the beginning of the whole.
    """
    starts = np.zeros(len(tokens), dtype=np.int64)
    for border in sorted({at for pair in ranges for at in pair}):
        prefix = np.array(tokenizer.encode(text[:border], add_special_tokens=False), dtype=np.int32)
        if not np.array_equal(prefix, tokens[: len(prefix)]):
            raise DataError(_MERGED)
        starts[len(prefix) :] = border
    return starts


def _truncated(job: Job, tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> EncodedRow | Failure:
    limit = job.max_length
    if limit is not None and len(tokens) > limit:
        if job.truncation in ("delete", "error"):
            # No length in the reason: rows are counted by it.
            return Failure(
                f"longer than max_length {limit}", "always" if job.truncation == "error" else "never"
            )
        kept = slice(-limit, None) if job.truncation == "left" else slice(0, limit)
        tokens, mask = tokens[kept].copy(), mask[kept].copy()
        mask[:1] = False
        if job.loss_scale is not None and not mask.any():
            return Failure(f"nothing to train on is left within max_length {limit}", "never")
    if job.loss_scale is not None and not mask.any():
        return Failure("the assistant's turns have no tokens", "strict")
    return tokens, mask
