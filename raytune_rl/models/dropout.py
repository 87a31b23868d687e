"""Turning off the dropout that a model's config brings.

Preferences and RL compare log-probs of one model at two moments, or in two engines. Dropout makes them differ
where nothing was learned: the first loss of DPO is then not ln 2, the first ratio of PPO not 1. Adapters put
on later keep theirs.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

_NOISE = ("jitter_noise", "input_jitter_noise")
"""Of routers: factors on what experts see, in training only."""


def silence_dropout(model: Any) -> str | None:
    """Sets every dropout inside a model to 0: modules, what layers hand to functions, and what they look up
    in their config. The model's own config, which checkpoints are saved with, stays as it is.

    Args:
        model: a PreTrainedModel, no adapters on it.

    Returns:
        What was above 0, for the user; None if nothing was.
    """
    rates: dict[str, float] = _rates(model.config) | _rates(model.config.get_text_config())
    silent: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            if module.p > 0:
                rates.setdefault("dropout", module.p)
            module.p = 0.0
            continue
        for name, value in _rates(module).items():
            rates.setdefault(name, value)
            setattr(module, name, 0.0)
        config = vars(module).get("config")
        if module is not model and isinstance(config, PreTrainedConfig) and _rates(config):
            if id(config) not in silent:
                silent[id(config)] = copy.copy(config)
                for name in _rates(config):
                    setattr(silent[id(config)], name, 0.0)
            module.config = silent[id(config)]
    return ", ".join(f"{name} {value:g}" for name, value in rates.items()) or None


def _rates(holder: nn.Module | PreTrainedConfig) -> dict[str, float]:
    """Its attributes above 0 that are rates of dropout, by name."""
    return {
        name: value
        for name, value in vars(holder).items()
        if ("drop" in name or name in _NOISE) and type(value) is float and value > 0
    }
