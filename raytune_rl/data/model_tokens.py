"""Tokens of a model by its own files: how many it has embeddings for, and which end an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.errors import ModelError

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class ModelTokens:
    """Of one model.

    Attributes:
        name: As the user knows the model.
        embeddings: Rows of its input embeddings: ids from there on do not exist for it. None if it does not
            say.
        eos: Ids that end an answer, by its generation_config, else by its config.
    """

    name: str
    embeddings: int | None = None
    eos: tuple[int, ...] = ()

    @classmethod
    def of(cls, folder: str | Path, config: Any, name: str | None = None) -> ModelTokens:
        """Reads a model's folder, whose Transformers config is `config`.

        Raises:
            ModelError: generation_config.json cannot be read.
        """
        text = config.get_text_config()
        rows = getattr(text, "vocab_size", None)
        more = getattr(text, "additional_vocab_size", None) or 0  # Idefics has a second table
        own = read_eos(folder) or as_ids(getattr(text, "eos_token_id", None))
        return cls(name or str(folder), None if rows is None else int(rows) + int(more), own)

    def knows(self, ids: Sequence[int] | NDArray[np.int32]) -> bool:
        """Whether the model has an embedding for each of these tokens."""
        return self.embeddings is None or not len(ids) or int(np.max(ids)) < self.embeddings

    def refuse_beyond(self, ids: Sequence[int] | NDArray[np.int32], tokenizer: Any, where: str) -> None:
        """Refuses tokens that the model has no embedding for.

        Args:
            ids: Tokens.
            tokenizer: That made them.
            where: What has them, in words that begin a sentence.

        Raises:
            ModelError: There are some among `ids`.
        """
        if self.embeddings is None or self.knows(ids):
            return
        found = int(np.max(ids))
        raise ModelError(
            f"{where} has the token {tokenizer.convert_ids_to_tokens(found)!r} (id {found}), but the model "
            f"{self.name} has only {self.embeddings} embeddings, for ids 0 to {self.embeddings - 1}; its "
            f"tokenizer has {len(tokenizer)} tokens. Tokens were added to the tokenizer alone: resize the "
            "model (model.resize_token_embeddings(len(tokenizer)) in Transformers, then save it), or take "
            "the tokenizer that belongs to it"
        )


def read_eos(folder: str | Path) -> tuple[int, ...]:
    """The eos_token_id of a folder's generation_config.json; empty without one.

    Raises:
        ModelError: The file cannot be read.
    """
    file = Path(folder) / GENERATION_CONFIG
    if not file.is_file():
        return ()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    return as_ids(found.get("eos_token_id") if isinstance(found, dict) else None)


def as_ids(value: Any) -> tuple[int, ...]:
    """An eos_token_id of Transformers (None, a number or a list) as a tuple."""
    several = value if isinstance(value, (list, tuple)) else [value]
    return tuple(int(one) for one in several if isinstance(one, int))
