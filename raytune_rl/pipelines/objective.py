"""The objective of a run over prepared rows: the one place where an algorithm's name becomes a loss, a
shape of data and weights. The loop itself (`offline`) knows no algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.aggregation import pair_weights, row_weights, single_weights
from raytune_rl.algorithms.losses.kto import LABEL, REFERENCE_POINT
from raytune_rl.algorithms.registry import Loss, get_loss, loss_names
from raytune_rl.config import PreferenceConfig, SFTConfig
from raytune_rl.config.algorithms import settings_of
from raytune_rl.config.preference import WITH_REFERENCE, loss_settings
from raytune_rl.data.example import Task
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines.step_values import FROM_ORDER, FROM_POLICY
from raytune_rl.rewards.plugins import load_plugins

Weights = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Shape:
    """A unit of the data: what batches count and what is drawn.

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
    """The objective.

    Attributes:
        title: What a user calls it.
        loss: The loss.
        settings: The loss's own settings.
        shape: Of the data.
        plugin_files: Files that register the loss; empty for a built-in one.
    """

    title: str
    loss: Loss
    settings: Any
    shape: Shape
    plugin_files: tuple[str, ...] = ()

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return "ref_logprobs" in self.loss.required_columns(self.settings)

    @property
    def row_values(self) -> tuple[str, ...]:
        """The values of each row that the loss needs."""
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


def supervised(config: SFTConfig) -> Objective:
    """The likelihood of the assistant's turns."""
    loss = get_loss("sft")
    settings = loss.settings_type(enable_dft_loss=config.enable_dft_loss)
    return Objective("SFT with DFT" if config.enable_dft_loss else "SFT", loss, settings, CONVERSATIONS)


def preference(config: PreferenceConfig) -> Objective:
    """The objective that `rlhf_type` and its flags ask for.

    Raises:
        ConfigError: A setting that the loss refuses, or a loss of a plugin that cannot be used here.
        RewardError: A plugin file cannot be loaded.
    """
    title, name, shape = PREFERENCES[config.rlhf_type]
    loss = get_loss(name)
    load_plugins(config.external_plugins)
    known = loss_names()
    own = [kind for kind in config.loss_type if kind in known and _of_a_plugin(get_loss(kind))]
    if own:
        return _own(config, loss, shape)
    return Objective(title, loss, loss.settings_type(**loss_settings(config)), shape)


def _of_a_plugin(loss: Loss) -> bool:
    return not loss.compute.__module__.startswith("raytune_rl.")


def _own(config: PreferenceConfig, like: Loss, shape: Shape) -> Objective:
    """A loss of a plugin, on the rows and with the forward pass of a built-in one."""
    if len(config.loss_type) > 1:
        raise ConfigError(
            f"--loss_type {' '.join(config.loss_type)}: a loss of a plugin stands alone; only losses of dpo "
            "are added up."
        )
    loss = get_loss(config.loss_type[0])
    if (loss.rows, loss.forward) != (like.rows, like.forward):
        raise ConfigError(
            f"loss '{loss.name}' is made for {loss.rows} rows and {loss.forward}, but --rlhf_type "
            f"{config.rlhf_type} gives {like.rows} rows and {like.forward}."
        )
    given_settings = {name: value for name, value in loss_settings(config).items() if name != "loss_type"}
    _, settings = settings_of(loss, given_settings, config.loss_args)
    columns = set(loss.required_columns(settings))
    wanted = columns | set(loss.required_rows(settings))
    wanted |= {"advantages"} if loss.needs_advantages else set()
    known_columns = {*FROM_ORDER} if shape is PAIRS else {LABEL}
    if config.rlhf_type in WITH_REFERENCE:
        known_columns.add("ref_logprobs")
        if "ref_logprobs" in columns:  # what depends on where the policy is compares it with the reference
            known_columns |= FROM_POLICY.keys() - {REFERENCE_POINT} if shape is PAIRS else {REFERENCE_POINT}
    if missing := sorted(wanted - known_columns):
        raise ConfigError(
            f"loss '{loss.name}' needs {', '.join(missing)}, which --rlhf_type {config.rlhf_type} does not "
            f"have; it has {', '.join(sorted(known_columns))}."
        )
    return Objective(loss.name, loss, settings, shape, config.external_plugins)
