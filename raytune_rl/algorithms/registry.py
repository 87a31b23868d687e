"""Losses by name, so that neither pipelines nor the policy worker know an algorithm.

A loss turns log-probs of N loss tokens into N token losses. Whoever calls it multiplies by the row weights
(`aggregation.row_weights`) and adds up; no loss divides by anything that depends on the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import Tensor

from raytune_rl.algorithms.metrics import MetricSums
from raytune_rl.errors import ConfigError


@dataclass(frozen=True)
class LossInputs:
    """What a loss may look at for one micro-batch; all tensors are flat over its N loss tokens.

    Attributes:
        logprobs: float32 [N], of the policy being trained, with gradient.
        row_of: int64 [N], row of each token inside the micro-batch.
        n_rows: rows in the micro-batch, including those without loss tokens.
        settings: the loss's own frozen dataclass (`Loss.settings_type`).
        columns: float32 [N] each: "old_logprobs", "ref_logprobs", "rollout_logprobs", whatever the step has.
        advantages: float32 [N], already spread over tokens, or None for losses that need none.
        entropy: float32 [N] of the policy's distribution in nats, or None when it was not computed.
        correct: bool [N], the target was the arg-max, or None.
    """

    logprobs: Tensor
    row_of: Tensor
    n_rows: int
    settings: Any
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    advantages: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """token_loss [N] with gradient, not weighted, not averaged; and detached, mergeable metrics."""

    token_loss: Tensor
    metrics: MetricSums


def no_columns(settings: Any) -> tuple[str, ...]:
    """For losses that need nothing but the policy's own log-probs."""
    return ()


@dataclass(frozen=True)
class Loss:
    """A registered loss: call it with `LossInputs`, get a `LossOutput`.

    Attributes:
        name: registry name.
        settings_type: frozen dataclass of the loss's hyper-parameters; its defaults are those of ms-swift.
        compute: the function itself.
        required_columns: settings -> names of the columns it cannot do without (e.g. ref_logprobs when beta >
            0).
        needs_advantages: whether `LossInputs.advantages` must be there.
    """

    name: str
    settings_type: type
    compute: Callable[[LossInputs], LossOutput]
    required_columns: Callable[[Any], tuple[str, ...]] = no_columns
    needs_advantages: bool = False

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Checks that nothing is missing, then computes.

        Raises:
            ConfigError: a required column or the advantages are absent, or the settings are another loss's.
        """
        if not isinstance(inputs.settings, self.settings_type):
            given = type(inputs.settings).__name__
            raise ConfigError(f"loss '{self.name}' takes {self.settings_type.__name__}, got {given}")
        missing = [c for c in self.required_columns(inputs.settings) if c not in inputs.columns]
        if missing or (self.needs_advantages and inputs.advantages is None):
            wanted = ", ".join(missing + (["advantages"] if inputs.advantages is None else []))
            raise ConfigError(f"loss '{self.name}' needs {wanted}; the batch has {sorted(inputs.columns)}")
        return self.compute(inputs)


_LOSSES: dict[str, Loss] = {}
# Modules that register the built-in losses; imported on first use, so that this file depends on none of them.
_BUILT_IN = ("raytune_rl.algorithms.policy_loss", "raytune_rl.algorithms.sft")


def register_loss(loss: Loss) -> Loss:
    """Makes a loss available by name.

    Raises:
        ConfigError: the name is taken.
    """
    if loss.name in _LOSSES:
        raise ConfigError(f"a loss named '{loss.name}' is already registered")
    _LOSSES[loss.name] = loss
    return loss


def get_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    names = loss_names()
    if name not in _LOSSES:
        raise ConfigError(f"no loss is named '{name}'; known losses: {', '.join(names)}")
    return _LOSSES[name]


def loss_names() -> tuple[str, ...]:
    """All registered names, sorted."""
    for module in _BUILT_IN:
        import_module(module)
    return tuple(sorted(_LOSSES))
