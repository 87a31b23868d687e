"""What a run over prepared rows learns: the one place where an algorithm's name becomes a loss, a shape of
data and weights. The loop itself (`offline`) knows no algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.aggregation import pair_weights, row_weights, single_weights
from raytune_rl.algorithms.registry import Loss, get_loss
from raytune_rl.config import PreferenceConfig
from raytune_rl.config.preference import loss_settings
from raytune_rl.data.example import Task

Weights = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Shape:
    """What a unit of the data is: what batches count and what is drawn.

    Attributes:
        task: How rows are read and encoded.
        unit: What a user calls it, in the plural.
        rows: Rows of one unit, next to each other.
        trained: Those of them that are trained on.
        scored: Those that tell where the policy stands, for losses that ask.
        weights: Trained tokens of a step's rows -> the row scalars that hold the step's normalisers.
    """

    task: Task
    unit: str
    rows: int
    trained: tuple[int, ...]
    scored: tuple[int, ...]
    weights: Callable[[NDArray[np.int64]], Weights]

    def rows_of(self, units: NDArray[np.int64], which: tuple[int, ...]) -> NDArray[np.int64]:
        """Row numbers of some rows of each unit, unit by unit."""
        return (units[:, None] * self.rows + np.array(which, dtype=np.int64)).ravel()


def _token_mean(lengths: NDArray[np.int64]) -> Weights:
    return {"weight": row_weights(lengths, "sft")}


def _pair_mean(lengths: NDArray[np.int64]) -> Weights:
    return vars(pair_weights(lengths))


def _row_mean(lengths: NDArray[np.int64]) -> Weights:
    return vars(single_weights(lengths))


CONVERSATIONS = Shape("sft", "rows", 1, (0,), (), _token_mean)
PAIRS = Shape("pairs", "pairs", 2, (0, 1), (0, 1), _pair_mean)
LABELLED = Shape("labels", "rows", 2, (0,), (1,), _row_mean)


@dataclass(frozen=True)
class Objective:
    """What to learn.

    Attributes:
        title: What a user calls it.
        loss: The loss.
        settings: The loss's own settings.
        shape: Of the data.
    """

    title: str
    loss: Loss
    settings: Any
    shape: Shape

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return "ref_logprobs" in self.loss.required_columns(self.settings)

    @property
    def row_values(self) -> tuple[str, ...]:
        """What the loss must be told of each row."""
        return self.loss.required_rows(self.settings)


PREFERENCES: Mapping[str, tuple[str, str, Shape]] = {
    "dpo": ("DPO", "dpo", PAIRS),
    "kto": ("KTO", "kto", LABELLED),
    "orpo": ("ORPO", "orpo", PAIRS),
    "cpo": ("CPO", "cpo", PAIRS),
    "simpo": ("SimPO", "cpo", PAIRS),
    "rm": ("Reward model", "rm", PAIRS),
}
"""rlhf_type -> title, loss and shape of the data."""


def supervised() -> Objective:
    """The likelihood of the assistant's turns."""
    loss = get_loss("sft")
    return Objective("SFT", loss, loss.settings_type(), CONVERSATIONS)


def preference(config: PreferenceConfig) -> Objective:
    """What `rlhf_type` and its flags ask for.

    Raises:
        ConfigError: A setting that the loss refuses.
    """
    title, name, shape = PREFERENCES[config.rlhf_type]
    loss = get_loss(name)
    return Objective(title, loss, loss.settings_type(**loss_settings(config)), shape)
