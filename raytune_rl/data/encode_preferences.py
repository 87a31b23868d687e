"""Preferences to tokens: two rows for each unit, next to each other.

Of a pair row 2k is the chosen side and row 2k + 1 the rejected one. Of a labelled row k, row 2k is the row
itself and row 2k + 1 its prompt with an answer to another prompt, which KTO measures the policy's distance
from the reference on. Such a row is put together from tokens that are there already: nothing is tokenized
twice. In what is returned, `index` and `dropped` are of the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.encode import Dropped, EncodedSFT, ImageSettings, make_job, notices_of, run_job
from raytune_rl.data.encode_rows import EncodedRow, LossScale, Truncation
from raytune_rl.data.example import Example
from raytune_rl.data.pictures import picture_columns
from raytune_rl.data.ragged import Ragged
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
    images: ImageSettings | None = None,
) -> EncodedSFT:
    """Tokenizes both sides of every pair and marks their answers.

    Args:
        examples: With `rejected`.
        tokenizer, strict, num_proc, images: As in `encode_sft`.
        max_length: Most tokens either side may have; None is no limit.
        truncation_strategy: For longer ones: 'delete' drops the pair; 'right' cuts each side's answer; 'left'
            cuts the same tokens off the prompt of both, so that it stays one prompt. Pairs that would lose a
            whole answer, or part of a picture, are dropped.
        loss_scale: 'last_round': the answer is what follows the last user turn; 'default': every assistant
            turn.

    Raises:
        RowError, ModelError, ConfigError, DataError: As in `encode_sft`.
    """
    sides = [side for e in examples for side in (e, replace(e, messages=e.rejected))]
    job = make_job(tokenizer, None, truncation_strategy, loss_scale, images)
    rows, index, dropped = run_job(job, sides, strict, num_proc, None)
    there: dict[int, EncodedRow] = dict(zip(index.tolist(), rows, strict=True))
    lost = zip((n for n in range(len(sides)) if n not in there), dropped, strict=True)
    reasons = {number // 2: drop for number, drop in reversed(list(lost))}
    kept: list[int] = []
    both: list[EncodedRow] = []
    for number, example in enumerate(examples):
        if number in reasons:
            continue
        pair = fit_pair(there[2 * number], there[2 * number + 1], max_length, truncation_strategy)
        if isinstance(pair, str):
            reasons[number] = Dropped(example.source, example.line, pair)
        else:
            kept.append(number)
            both += pair
    if examples and not kept:
        first = reasons[0]
        raise DataError(
            f"none of {len(examples)} pairs can be used. The first: {first.source}:{first.line}: "
            f"{first.reason}"
        )
    values = _margins([examples[number] for number in kept])
    return _encoded(both, kept, [reasons[number] for number in sorted(reasons)], notices_of(job), values)


def encode_labelled(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int | None = None,
    truncation_strategy: Truncation = "delete",
    loss_scale: LossScale = "last_round",
    *,
    strict: bool = True,
    num_proc: int = 1,
    images: ImageSettings | None = None,
) -> EncodedSFT:
    """Tokenizes labelled rows; arguments and errors as in `encode_sft`.

    Raises:
        DataError: All rows have the same prompt, so that none has an answer to another one.
    """
    job = make_job(tokenizer, max_length, truncation_strategy, loss_scale, images)
    rows, index, dropped = run_job(job, examples, strict, num_proc, None)
    both = [row for pair in zip(rows, mismatched(rows, max_length), strict=True) for row in pair]
    labels = np.array([float(bool(examples[number].label)) for number in index])
    values = {"label": np.repeat(labels, 2)}
    return _encoded(both, index.tolist(), dropped, notices_of(job), values)


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
    if chosen.pictures:
        return f"truncation to max_length {max_length} might cut into an image"
    if how == "right":
        sides = [_part(side, slice(None, max_length)) for side in (chosen, rejected)]
        if not all(side.mask.any() for side in sides):
            return f"nothing of an answer is left within max_length {max_length}"
    else:
        cut = longest - max_length
        if cut >= min(_start(chosen), _start(rejected)):
            return f"an answer alone is longer than max_length {max_length}"
        sides = [_part(side, slice(cut, None)) for side in (chosen, rejected)]
    return sides[0], sides[1]


def mismatched(rows: Sequence[EncodedRow], max_length: int | None) -> list[EncodedRow]:
    """For each row its prompt with the answer of the nearest row before it (in a circle) that has another
    prompt, cut to `max_length`.

    Raises:
        DataError: No row has another prompt.
    """
    starts = [_start(row) for row in rows]
    prompts = [row.tokens[:start].tobytes() for row, start in zip(rows, starts, strict=True)]
    if len(set(prompts)) < 2:
        raise DataError("KTO needs rows with at least two different prompts: their answers are compared")
    made = []
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        other = number - 1
        while prompts[other] == prompts[number]:
            other -= 1
        tokens = np.concatenate([row.tokens[:start], rows[other].tokens[starts[other] :]])
        mask = np.concatenate([np.zeros(start, dtype=np.bool_), rows[other].mask[starts[other] :]])
        made.append(_part(EncodedRow(tokens, mask, row.pictures), slice(None, max_length)))
    return made


def _start(row: EncodedRow) -> int:
    """Where the answer begins: the first token that is trained on."""
    return int(row.mask.argmax())


def _part(row: EncodedRow, kept: slice) -> EncodedRow:
    return replace(row, tokens=row.tokens[kept], mask=row.mask[kept])


def _margins(examples: Sequence[Example]) -> dict[str, NDArray[np.float64]]:
    """The column `margin`, if any row has it: by how much the chosen answer is better."""
    if not any("margin" in example.extra for example in examples):
        return {}
    try:
        margins = [float(example.extra.get("margin") or 0.0) for example in examples]
    except (TypeError, ValueError) as error:
        raise DataError(f"the column 'margin' must hold numbers: {error}") from error
    return {"margin": np.repeat(np.array(margins), 2)}


def _encoded(
    rows: Sequence[EncodedRow],
    index: Sequence[int],
    dropped: Sequence[Dropped],
    notices: tuple[str, ...],
    values: dict[str, NDArray[np.float64]],
) -> EncodedSFT:
    return EncodedSFT(
        tokens=Ragged.from_rows([row.tokens for row in rows], np.int32),
        loss_mask=Ragged.from_rows([row.mask for row in rows], np.bool_),
        index=np.array(index, dtype=np.int64),
        dropped=tuple(dropped),
        notices=notices,
        images=picture_columns(row.pictures for row in rows),
        values=values,
    )
