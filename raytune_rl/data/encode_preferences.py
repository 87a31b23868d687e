"""Preferences to tokens: two rows for each unit, next to each other.

Of a pair row 2k is the chosen side and row 2k + 1 the rejected one. Of a labelled row k, row 2k is the row
itself and row 2k + 1 its prompt with an answer to another prompt, which KTO measures the policy's distance
from the reference on. Such a row is put together from tokens that are there already: nothing is tokenized
twice. In what is returned, `index` and `dropped` are of the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.encode import (
    Dropped,
    EncodedSFT,
    MediaSettings,
    RowWriter,
    cut_notice,
    make_job,
    notices_of,
    run_job,
)
from raytune_rl.data.encode_rows import EncodedRow, LossScale, Truncation
from raytune_rl.data.example import Example, RowError
from raytune_rl.data.model_tokens import ModelTokens
from raytune_rl.data.spool import Spool
from raytune_rl.errors import DataError


def encode_pairs(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int | None = None,
    truncation_strategy: Truncation = "delete",
    loss_scale: LossScale = "last_round",
    *,
    strict: bool = True,
    num_proc: int = 1,
    progress: Callable[[int], None] | None = None,
    media: MediaSettings | None = None,
    folder: Path | None = None,
    model: ModelTokens | None = None,
) -> EncodedSFT:
    """Tokenizes both sides of every pair and marks their answers.

    Args:
        examples: With `rejected`.
        tokenizer, strict, num_proc, progress, media, folder, model: As in `encode_sft`.
        max_length: Most tokens either side may have; None is no limit.
        truncation_strategy: For longer ones: 'delete' drops the pair; 'right' cuts each side's answer; 'left'
            cuts the same tokens off the prompt of both, so that it stays one prompt. Pairs that would lose a
            whole answer, or part of a medium, are dropped.
        loss_scale: 'last_round': the answer is what follows the last user turn; 'default': every assistant
            turn.

    Raises:
        RowError, ModelError, ConfigError, DataError: As in `encode_sft`.
    """
    job = make_job(tokenizer, None, truncation_strategy, loss_scale, media, model)
    results = run_job(job, _Sides(examples), strict, num_proc, progress)
    writer = RowWriter(folder)
    margins: list[float] = []
    graded = False
    for number, (example, chosen, rejected) in enumerate(zip(examples, results, results, strict=True)):
        outcome = _pair(example, chosen, rejected, max_length, truncation_strategy)
        if not isinstance(outcome, Dropped):
            writer.append(number, *outcome)
            margins.append(_margin(example) or 0.0)
            graded = graded or "margin" in example.extra
        elif strict and outcome.unusable:
            raise RowError(example.source, example.line, f"{outcome.reason}: {outcome.detail}")
        else:
            writer.dropped.append(outcome)
    values = {"margin": np.repeat(np.array(margins), 2)} if graded else {}
    cut = cut_notice(writer.cut, max_length, truncation_strategy, "pairs")
    return writer.close((*notices_of(job), *cut), values, "pairs")


def _pair(
    example: Example,
    chosen: EncodedRow | Dropped,
    rejected: EncodedRow | Dropped,
    max_length: int | None,
    how: Truncation,
) -> tuple[EncodedRow, EncodedRow] | Dropped:
    """Both sides as they are trained on, or why the pair is left out."""
    if isinstance(chosen, Dropped):
        return chosen
    if isinstance(rejected, Dropped):
        return rejected
    if _margin(example) is None:
        found = f"it is {example.extra['margin']!r:.80}"
        return Dropped(example.source, example.line, "'margin' must be a number", True, found)
    pair = fit_pair(chosen, rejected, max_length, how)
    return Dropped(example.source, example.line, pair) if isinstance(pair, str) else pair


def _margin(example: Example) -> float | None:
    """By how much the chosen answer is better: the column `margin`, 0 without it; None if it is no number."""
    try:
        margin = float(example.extra.get("margin") or 0.0)
    except (TypeError, ValueError):
        return None
    return margin if np.isfinite(margin) else None


class _Sides(Sequence[Example]):
    """The sides of pairs as examples: side 2k is the chosen one, side 2k + 1 the rejected one."""

    def __init__(self, pairs: Sequence[Example]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        pair = self._pairs[index // 2]
        return replace(pair, messages=pair.rejected) if index % 2 else pair


def encode_labelled(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int | None = None,
    truncation_strategy: Truncation = "delete",
    loss_scale: LossScale = "last_round",
    *,
    strict: bool = True,
    num_proc: int = 1,
    progress: Callable[[int], None] | None = None,
    media: MediaSettings | None = None,
    folder: Path | None = None,
    model: ModelTokens | None = None,
) -> EncodedSFT:
    """Tokenizes labelled rows; arguments and errors as in `encode_sft`.

    Raises:
        DataError: All rows have the same prompt, so that none has an answer to another one.
    """
    job = make_job(tokenizer, max_length, truncation_strategy, loss_scale, media, model)
    writer = RowWriter(folder)
    rows: Spool[EncodedRow] = Spool()
    index: list[int] = []
    labels: list[float] = []
    for number, (example, row) in enumerate(
        zip(examples, run_job(job, examples, strict, num_proc, progress), strict=True)
    ):
        if isinstance(row, Dropped):
            writer.dropped.append(row)
        else:
            rows.append(row)
            index.append(number)
            labels.append(float(bool(example.label)))
    if rows:
        for number, row, other in zip(index, rows, mismatched(rows, max_length), strict=True):
            writer.append(number, row, other)
    cut = cut_notice(writer.cut, max_length, truncation_strategy, "rows")
    return writer.close((*notices_of(job), *cut), {"label": np.repeat(np.array(labels), 2)})


def fit_pair(
    chosen: EncodedRow,
    rejected: EncodedRow,
    max_length: int | None,
    how: Literal["delete", "left", "right", "error"],
) -> tuple[EncodedRow, EncodedRow] | str:
    """Both sides within `max_length`, or the reason why the pair is left out."""
    longest = max(len(chosen.tokens), len(rejected.tokens))
    if max_length is None or longest <= max_length:
        return chosen, rejected
    if how not in ("left", "right"):
        return f"longer than max_length {max_length}"
    if chosen.media:
        return f"truncation to max_length {max_length} might cut into an image, video or audio"
    if how == "right":
        sides = [_part(side, slice(None, max_length)) for side in (chosen, rejected)]
        if not all(side.mask.any() for side in sides):
            return f"nothing of an answer is left within max_length {max_length}"
    else:
        cut = longest - max_length
        if cut >= min(_start(chosen), _start(rejected)):
            return f"an answer alone is longer than max_length {max_length}"
        sides = [_part(side, slice(cut, None)) for side in (chosen, rejected)]
    return replace(sides[0], cut=True), replace(sides[1], cut=True)


def mismatched(rows: Sequence[EncodedRow], max_length: int | None) -> Iterator[EncodedRow]:
    """For each row its prompt with the answer of the nearest row before it (in a circle) that has another
    prompt, cut to `max_length`.

    Raises:
        DataError: No row has another prompt.
    """
    prompts = [_digest(row.tokens[: _start(row)]) for row in rows]
    if len(set(prompts)) < 2:
        raise DataError("KTO needs rows with at least two different prompts: their answers are compared")
    for number, row in enumerate(rows):
        near = number - 1
        while prompts[near] == prompts[number]:
            near -= 1
        other, start = rows[near], _start(row)
        tokens = np.concatenate([row.tokens[:start], other.tokens[_start(other) :]])
        mask = np.concatenate([np.zeros(start, dtype=np.bool_), other.mask[_start(other) :]])
        yield _part(EncodedRow(tokens, mask, row.media), slice(None, max_length))


def _digest(tokens: NDArray[np.int32]) -> bytes:
    return blake2b(tokens.tobytes(), digest_size=16).digest()


def _start(row: EncodedRow) -> int:
    """Where the answer begins: the first token that is trained on."""
    return int(row.mask.argmax())


def _part(row: EncodedRow, kept: slice) -> EncodedRow:
    return replace(row, tokens=row.tokens[kept], mask=row.mask[kept])
