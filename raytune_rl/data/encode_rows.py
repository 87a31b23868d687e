"""One chunk of examples to tokens and loss masks; the part of encoding that runs in worker processes.

Texts are tokenized a chunk at a time. A row with media goes through the model's processor alone, because
what is wrong with its media is that row's fault only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.chat import ChatTemplate, assistant_spans, trained_turns
from raytune_rl.data.example import Example
from raytune_rl.data.media import MediaError, fetch_medium, shown
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import Medium
from raytune_rl.data.media_tags import MODALITIES, in_order
from raytune_rl.data.model_tokens import ModelTokens
from raytune_rl.data.turn_end import closed
from raytune_rl.errors import DataError

Truncation = Literal["delete", "left", "right", "error"]
LossScale = Literal["default", "last_round", "all"]


@dataclass(frozen=True)
class Job:
    """The settings of encoding rows; they travel to worker processes once."""

    chat: ChatTemplate
    max_length: int | None
    truncation: Truncation
    loss_scale: LossScale | None  # None: prompts
    media: MediaProcessor | None = None
    media_root: str | None = None  # where relative paths of media start
    inline_media: bool = False  # carry the bytes of local files, for workers that do not see them
    model: ModelTokens | None = None


@dataclass(frozen=True)
class Failure:
    """Why a row has no tokens, and when that is an error: always, under `strict`, or never (as asked).

    Rows are counted by `reason`; what differs from row to row is in `detail`.
    """

    reason: str
    stops: Literal["always", "strict", "never"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class EncodedRow:
    """A row's int32 tokens, the bool mask of those that are trained on, its media in their order, of a
    prompt with media the tokens before their placeholders were expanded, whether it was cut, and what of the
    row the chat template does not write."""

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]
    media: tuple[Medium, ...] = ()
    engine_prompt_ids: NDArray[np.int32] | None = None
    cut: bool = False
    unwritten: tuple[str, ...] = ()


_MERGED = (
    "the tokenizer merges the beginning or end of an assistant turn with the template's text beside it "
    "(an answer that begins with a line break, for example), so that no token is the turn's first or last"
)


def encode_chunk(job: Job, examples: Sequence[Example]) -> list[EncodedRow | Failure]:
    """Renders row by row, tokenizes the texts of the chunk in one call."""
    results: list[EncodedRow | Failure | None] = []
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    for example in examples:
        try:
            text, found = _render(job, example)
            if example.has_media:
                results.append(_with_media(job, example, text, found))
                continue
        except MediaError as error:
            results.append(Failure("an image, video or audio cannot be read", "strict", str(error)))
            continue
        except DataError as error:
            results.append(Failure(str(error), "strict"))
            continue
        results.append(None)
        texts.append(text)
        spans.append(found)
    encoded = iter(_tokenize(job, texts, spans))
    rows = [next(encoded) if result is None else result for result in results]
    return [_noted(job, row, example) for row, example in zip(rows, examples, strict=True)]


def _noted(job: Job, row: EncodedRow | Failure, example: Example) -> EncodedRow | Failure:
    if isinstance(row, Failure) or example.plain or not (unwritten := job.chat.unwritten(example)):
        return row
    return replace(row, unwritten=tuple(unwritten))


def _render(job: Job, example: Example) -> tuple[str, list[tuple[int, int]]]:
    if example.has_media and job.media is None:
        raise DataError("the row has images, videos or audios, but the model takes texts only")
    for column, modality in MODALITIES.items():
        if getattr(example, column) and job.media is not None:
            problem = job.media.refusal(modality)
            if problem is not None:
                raise DataError(problem)

    def render(messages: Sequence[Any], *, generation_prompt: bool) -> str:
        more = example.template_kwargs
        return job.chat.render(
            messages, example.tools, generation_prompt=generation_prompt, more=more, modalities=modalities
        )

    modalities = [modality for column, modality in MODALITIES.items() if getattr(example, column)]

    if example.plain:
        text, start = job.chat.plain(example.messages[-1].content)
    else:
        text = render(example.messages, generation_prompt=job.loss_scale is None)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text holds {error.object[error.start]!r}, half of a character") from error
    if job.media is not None and not example.has_media:
        for token in job.media.placeholders:
            if token in text:
                raise DataError(f"the text holds the model's own token {token!r}, but no medium for it")
    if job.loss_scale is None:
        return text, []
    everything = job.loss_scale == "all"
    ended = example.plain or example.messages[-1].role != "assistant" or not job.chat.turn_end.added
    if everything and ended:
        return text, [(0, len(text))]
    turns = [len(example.messages) - 1] if everything else trained_turns(example, job.loss_scale)
    if not turns:
        raise DataError("no turn of the conversation is trained on")
    if example.plain:
        return text, [(start, len(text))]
    spans = assistant_spans(example.messages, turns, text, render)
    text, spans = closed(job.chat.turn_end, example.messages, text, spans, render)
    return text, [(0, len(text))] if everything else list(spans.values())


def _with_media(job: Job, example: Example, text: str, ranges: list[tuple[int, int]]) -> EncodedRow | Failure:
    """A rendered row through the processor."""
    assert job.media is not None
    media, decoded, names = [], [], []
    for modality, ref in in_order(example):
        as_frames = isinstance(ref, tuple)
        refs = ref if isinstance(ref, tuple) else (ref,)
        found = [fetch_medium(one, job.media_root, modality) for one in refs]
        called = [file.path or one for file, one in zip(found, refs, strict=True)]
        decoded.append(job.media.decode(modality, [f.data for f in found], called, as_frames=as_frames))
        media.append(Medium.of(modality, found, inline=job.inline_media, as_frames=as_frames))
        names.append(f"{modality} {shown(refs[0])}")
    try:
        expanded = job.media.expand(text, decoded)
    except DataError as error:
        raise DataError(f"{error} ({', '.join(names)})") from error
    shifted = [(expanded.shifted(start), expanded.shifted(end)) for start, end in ranges]
    mask = _mask(_starts_by_offsets(expanded.places, shifted), shifted)
    # What stands for a medium is not the assistant's, wherever it stands.
    mask &= ~expanded.inside
    if job.max_length is not None and len(expanded.tokens) > job.max_length:
        cut = ~_kept(job, len(mask))
        if job.truncation in ("left", "right") and (expanded.inside & cut).any():
            return Failure(
                f"truncation to max_length {job.max_length} would cut into an image, video or audio", "never"
            )
    row = _truncated(job, expanded.tokens, mask)
    if isinstance(row, Failure):
        return row
    # What truncation took from the left stands before the first medium, so it is the same in both.
    removed = len(expanded.tokens) - len(row.tokens)
    engine_prompt_ids = expanded.engine_prompt_ids[removed:] if job.loss_scale is None else None
    return replace(row, media=tuple(media), engine_prompt_ids=engine_prompt_ids)


def _tokenize(job: Job, texts: list[str], spans: list[list[tuple[int, int]]]) -> list[EncodedRow | Failure]:
    if not texts:
        return []
    tokenizer = job.chat.tokenizer
    with_offsets = tokenizer.is_fast and job.loss_scale is not None
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
    )
    rows: list[EncodedRow | Failure] = []
    for number, (text, ranges) in enumerate(zip(texts, spans, strict=True)):
        tokens = np.array(batch["input_ids"][number], dtype=np.int32)
        try:
            if with_offsets:
                mask = _mask_by_search(batch.encodings[number], len(tokens), ranges)
            else:
                mask = _mask(_starts_by_prefix(tokenizer, text, tokens, ranges), ranges)
        except DataError as error:
            rows.append(Failure(str(error), "strict"))
        else:
            rows.append(_truncated(job, tokens, mask))
    return rows


def _mask(starts: NDArray[np.int64], ranges: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """True for tokens that begin inside a range; never for the first token, which nothing predicts."""
    mask = np.zeros(len(starts), dtype=np.bool_)
    for start, end in ranges:
        mask |= (starts >= start) & (starts < end)
    mask[:1] = False
    return mask


def _mask_by_search(encoding: Any, count: int, ranges: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """What `_mask` makes of all tokens' places, from a few: tokens stand in the order of the text, and taking
    the places of all out of the tokenizer costs half as much as to tokenize.

    Args:
        encoding: Of the tokenizers library; knows of each token its first character and the one behind it.
        count: Its tokens.
        ranges: Of characters; each must begin where a token does.
    """

    def start_of(token: int) -> int:
        return encoding.token_to_chars(token)[0]

    mask = np.zeros(count, dtype=np.bool_)
    for start, end in ranges:
        first = bisect_left(range(count), start, key=start_of)
        if first and encoding.token_to_chars(first - 1)[1] > start:
            raise DataError(_MERGED)
        mask[first : bisect_left(range(count), end, lo=first, key=start_of)] = True
    mask[:1] = False
    return mask


def _starts_by_offsets(places: NDArray[np.int64], ranges: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Where tokens begin in the text, int64 `[tokens]`; a range must begin where a token does."""
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
    cut = limit is not None and len(tokens) > limit
    if cut:
        if job.truncation in ("delete", "error"):
            # No length in the reason: rows are counted by it.
            return Failure(
                f"longer than max_length {limit}", "always" if job.truncation == "error" else "never"
            )
        kept = _kept(job, len(tokens))
        tokens, mask = tokens[kept], mask[kept]
        mask[:1] = False
        if job.loss_scale is not None and not mask.any():
            return Failure(f"nothing to train on is left within max_length {limit}", "never")
    if job.loss_scale is not None and not mask.any():
        return Failure("the assistant's turns have no tokens", "strict")
    return EncodedRow(tokens, mask, cut=cut)


def _kept(job: Job, length: int) -> NDArray[np.bool_]:
    """Which tokens of a row that is too long truncation keeps."""
    assert job.max_length is not None
    places = np.arange(length)
    return places >= length - job.max_length if job.truncation == "left" else places < job.max_length
