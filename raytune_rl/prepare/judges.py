"""What rows and vocabularies must be where references and teachers judge the policy's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.config import RLHFConfig
from raytune_rl.config.commands import TrainConfig
from raytune_rl.errors import ConfigError
from raytune_rl.protocol.data import TEACHER_PROMPT


def check_vocabulary(tokenizer: Any, model: str, config: TrainConfig, flag: str) -> None:
    """A reference or teacher is asked about the policy's own tokens, so it must mean the same by them. It may
    know more of them, and lack added ones for which its embedding has an empty place.

    Args:
        tokenizer: The policy's.
        model: The other model.
        config: Of the run.
        flag: It named that model.

    Raises:
        ConfigError: It does not.
    """
    from raytune_rl.models import load

    path, trust = load.resolve_path(model, use_hf=config.use_hf), config.trust_remote_code
    theirs = load.load_tokenizer(path, trust_remote_code=trust).get_vocab()
    places = load.load_config(path, trust_remote_code=trust).get_text_config().vocab_size
    added, taken = tokenizer.get_added_vocab(), set(theirs.values())
    for piece, number in tokenizer.get_vocab().items():
        known = theirs.get(piece)
        has_place = number < places and number not in taken
        if known == number or (known is None and piece in added and has_place):
            continue
        there = "none there" if known is None else f"number {known} there"
        raise ConfigError(
            f"{flag} {model} has another vocabulary than --model {config.model}: the piece {piece!r}, number "
            f"{number} here, is {there}, so the same token means something else to it. Take a model of the "
            "same family."
        )


def refuse_demonstrations(config: RLHFConfig) -> None:
    """A teacher that is asked something else is asked about the policy's own answers.

    Raises:
        ConfigError: Some generations are the answers of the data.
    """
    if config.demonstrates:
        raise ConfigError(
            f"--lmbda {config.lmbda:g} trains on answers of the data too, but the column {TEACHER_PROMPT!r} "
            "says what a teacher sees beside the policy's own: use --lmbda 1, or leave the column out."
        )


def teacher_of_rows(
    extra: Mapping[str, Sequence[Any]], column: str, teachers: Sequence[str]
) -> NDArray[np.float64]:
    """The number of each row's teacher, float64 `[n]`.

    Args:
        extra: The data's columns.
        column: It has the teacher, by number or as in `teachers`.
        teachers: `--teacher_model`.

    Raises:
        ConfigError: The data has no such column, or a row names nobody.
    """
    if column not in extra:
        raise ConfigError(
            f"--teacher_column {column}: the data has no such column, only {', '.join(sorted(extra))}."
        )
    numbers = {**{str(number): number for number in range(len(teachers))}}
    numbers |= {name: number for number, name in enumerate(teachers)}
    found = [numbers.get(str(value)) for value in extra[column]]
    if None in found:
        row = found.index(None)
        raise ConfigError(
            f"--teacher_column {column}: row {row + 1} of the prompts has {extra[column][row]!r}, which is "
            f"none of the {len(teachers)} teachers: write its number, from 0, or its name as in "
            "--teacher_model."
        )
    return np.array(found, dtype=np.float64)
