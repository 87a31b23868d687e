"""Losses by name, so that neither pipelines nor the policy worker know an algorithm.

A loss turns log-probs of N loss tokens into N token losses, or into one loss a row, or both. Whoever calls it
multiplies by the weights that the driver has worked out for the whole step (`aggregation`) and adds up; no
loss divides by anything that depends on the micro-batch. What a loss needs to know of the whole step (a
threshold, a baseline) comes in as a value of each row, so it is the same wherever the row ends up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

from raytune_rl.algorithms.before_step import BeforeStep
from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import MetricSums
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Forward = Literal["logprobs", "scores", "values"]
Rows = Literal["single", "pairs"]

EXPERT = "expert"
"""Row value: 1 for an answer of the data that a step learns beside the policy's own, else 0."""


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a loss for one micro-batch; all token tensors are flat over its N loss tokens.

    A row is never cut: all its loss tokens are in one micro-batch, next to each other and in order.

    Attributes:
        logprobs: float32 [N], of the policy being trained, with gradient; empty where the forward pass gives
            something else (`Loss.forward`).
        row_of: int64 [N], row of each token inside the micro-batch, ascending.
        n_rows: rows in the micro-batch, including those without loss tokens.
        settings: the loss's own frozen dataclass (`Loss.settings_type`).
        columns: float32 [N] each: "old_logprobs", "ref_logprobs", "rollout_logprobs", whatever the step has.
        advantages: float32 [N], already spread over tokens, or None for losses that need none.
        entropy: float32 [N] of the policy's distribution in nats, or None when it was not computed.
        correct: bool [N], the target was the arg-max, or None.
        row_values: float64 [n_rows] each, what the driver says of each row: "pair" (`pairs`), "label" (KTO),
            "margin" (reward model), and quantities of the whole step, equal on every row.
        scores: float [n_rows] with gradient, the scalar head's on each row's last token, or None.
        values: float [N] with gradient, the critic's, or None.
        divergence: float32 [N] in nats with gradient, of the policy's distribution from a teacher's, or None.
    """

    logprobs: Tensor
    row_of: Tensor
    n_rows: int
    settings: Any
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    advantages: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None
    row_values: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    values: Tensor | None = None
    divergence: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """The loss of a micro-batch, not weighted, not averaged.

    Attributes:
        token_loss: [N] with gradient, or None. Weighted by the scalar "weight" of its row.
        metrics: detached and mergeable.
        row_loss: [n_rows] with gradient, or None. Weighted by the scalar "row_weight" of its row. The loss of
            a pair stands on its chosen row; the rejected row has 0.
    """

    token_loss: Tensor | None
    metrics: MetricSums
    row_loss: Tensor | None = None

    def total(self, token_weights: Tensor | None, row_weights: Tensor | None) -> Tensor:
        """This micro-batch's share of the step's loss, a scalar.

        Args:
            token_weights: [N], the weight of each token's row.
            row_weights: [n_rows].

        Raises:
            ConfigError: the loss has a part for which the step brought no weights.
        """
        parts = []
        for name, loss, weights in (
            ("weight", self.token_loss, token_weights),
            ("row_weight", self.row_loss, row_weights),
        ):
            if loss is None:
                continue
            if weights is None:
                raise ConfigError(f"the loss needs the row scalar '{name}', which the step does not have")
            parts.append((weights * loss).sum())
        if not parts:
            raise ConfigError("a loss must return token_loss, row_loss or both")
        return torch.stack([part.double() for part in parts]).sum().float()


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
        required_rows: settings -> names of the row values it cannot do without.
        rows: "pairs" if rows 2k and 2k + 1 of a micro-batch must be the two sides of a pair (`pairs`).
        forward: what the model must give: token log-probs, one score a row, or one value a token.
        normaliser: how its token losses add up: a name of `aggregation.NORMALISERS`, or of a loss that adds
            up in the same way.
        in_words: settings -> what the plan says of its constants; None: nothing.
        divergence_beta: settings -> which divergence from a teacher's distribution it needs
            (`models.distribution`); None: it needs none.
        summary: what it does, for `--help`; of an online loss.
        paper: where it comes from.
        fixed: settings that this name stands for: their flags do not act.
        before_step: what it works out of the whole optimizer step first, or None; of an online loss.
        expert_share: (settings, optimizer step from 0) -> the weight of an expert's answers in the step,
            beside 1 less that of the policy's own; None: there are none. Their rows have `EXPERT` 1.
    """

    name: str
    settings_type: type
    compute: Callable[[LossInputs], LossOutput]
    required_columns: Callable[[Any], tuple[str, ...]] = no_columns
    needs_advantages: bool = False
    required_rows: Callable[[Any], tuple[str, ...]] = no_columns
    rows: Rows = "single"
    forward: Forward = "logprobs"
    normaliser: str = "rows"
    in_words: Callable[[Any], str] | None = None
    divergence_beta: Callable[[Any], float] | None = None
    summary: str = ""
    paper: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    before_step: BeforeStep | None = None
    expert_share: Callable[[Any, int], float] | None = None

    @property
    def is_online(self) -> bool:
        """Whether `--loss_type` of online RL may name it: it has advantages, and rows that stand alone."""
        return self.needs_advantages and self.rows == "single" and self.forward == "logprobs"

    @property
    def is_built_in(self) -> bool:
        """Whether it comes with this package, not from a plugin."""
        return self.compute.__module__.startswith("raytune_rl.")

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Checks that nothing is missing, then computes.

        Raises:
            ConfigError: something it needs is absent, or the settings are another loss's.
        """
        if not isinstance(inputs.settings, self.settings_type):
            given = type(inputs.settings).__name__
            raise ConfigError(f"loss '{self.name}' takes {self.settings_type.__name__}, got {given}")
        missing = [c for c in self.required_columns(inputs.settings) if c not in inputs.columns]
        missing += [r for r in self.required_rows(inputs.settings) if r not in inputs.row_values]
        if self.needs_advantages and inputs.advantages is None:
            missing.append("advantages")
        if self.forward != "logprobs" and getattr(inputs, self.forward) is None:
            missing.append(f"a model that gives {self.forward}")
        if missing:
            available = sorted({*inputs.columns, *inputs.row_values})
            raise ConfigError(f"loss '{self.name}' needs {', '.join(missing)}; the batch has {available}")
        return self.compute(inputs)


_LOSSES: dict[str, Loss] = {}


def register_loss(loss: Loss) -> Loss:
    """Makes a loss available by name. A plugin file that is loaded again replaces its own.

    Raises:
        ConfigError: the name is taken.
    """
    known = _LOSSES.get(loss.name)
    if known is not None and not _loaded_again(known, loss):
        raise ConfigError(f"a loss named '{loss.name}' is already registered")
    _LOSSES[loss.name] = loss
    return loss


def _loaded_again(old: Loss, new: Loss) -> bool:
    """Whether the functions come from one file that was executed twice."""
    one, other = (getattr(loss.compute, "__globals__", {}) for loss in (old, new))
    return old.compute.__module__ == new.compute.__module__ and one is not other


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
    _load_built_in()
    return tuple(sorted(_LOSSES))


def is_built_in_loss(name: str) -> bool:
    """Whether a loss of that name comes with this package."""
    return name in loss_names() and _LOSSES[name].is_built_in


def online_losses() -> tuple[Loss, ...]:
    """Those that come with this package and that `--loss_type` of online RL may name, by name."""
    return tuple(loss for name in loss_names() if (loss := _LOSSES[name]).is_online and loss.is_built_in)


@cache
def _load_built_in() -> None:
    """Imports every file of `losses`; on first use, so that this file depends on none of them."""
    import_package("raytune_rl.algorithms.losses")


def import_package(name: str) -> None:
    """Imports every module of a package, in the order of their names."""
    for module in sorted(found.name for found in iter_modules(import_module(name).__path__)):
        import_module(f"{name}.{module}")
