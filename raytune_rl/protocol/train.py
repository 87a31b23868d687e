"""Specs and results of a training rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.protocol.model import ModelSpec, ScoreSettings, Sharing, TunerSettings
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.weights import TensorEntry


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW and its schedule.

    Attributes:
        learning_rate: Peak.
        schedule: A scheduler name of Transformers.
        warmup_steps, total_steps: Optimizer steps.
        betas, epsilon, weight_decay: AdamW's; matrices decay, vectors (biases, norms) do not.
        deepspeed: A DeepSpeed configuration whose "auto" values are filled in here.
        max_grad_norm: Clip the gradient to this norm; 0 does not clip.
        schedule_kwargs: What else the schedule takes, by Transformers' names.
    """

    learning_rate: float
    schedule: str
    warmup_steps: int
    total_steps: int
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    deepspeed: Mapping[str, Any]
    schedule_kwargs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerSpec:
    """Everything a rank needs.

    Attributes:
        model: What to load.
        tuner: What of it is trained.
        optimizer: How.
        loss: Name in the registry of losses. What it looks at (`Loss.forward`) decides the model's head:
            log-probs, one score a row (reward model), or one value a token (critic).
        loss_settings: That loss's own settings, or a mapping to make them of.
        score: How log-probs are taken.
        seed: Of adapter initialisation and dropout.
        gradient_checkpointing: Recompute activations in the backward.
        with_entropy: Compute the distribution's entropy at every loss token.
        publish_mode: How weights leave: "full", "merged" or "adapter"; None when nobody pulls them.
        plugin_files: Files that register the loss, if it is the user's own.
        untied: Whether the engines are built with a head of its own, though the model's config ties it.
        router_aux_loss_coef: Weight of the loss that evens out the load of a mixture's experts
            (`models.routing`).
    """

    model: ModelSpec
    tuner: TunerSettings
    optimizer: OptimizerSpec
    loss: str
    loss_settings: Any
    score: ScoreSettings
    seed: int
    gradient_checkpointing: bool
    with_entropy: bool = False
    publish_mode: str | None = None
    plugin_files: tuple[str, ...] = ()
    untied: bool = False
    router_aux_loss_coef: float = 0.0


@dataclass(frozen=True)
class TrainerFacts:
    """Facts that rank 0 reports after loading.

    Attributes:
        trainable, total: Numbers of parameters.
        dtype: Of the weights.
        layout: Of micro-batches, "padded" or "packed": the one asked for, or what the model can do instead.
        notices: Lines for the user.
        sharing: Whether rows that begin alike share that part; "false" where the model cannot.
    """

    trainable: int
    total: int
    dtype: str
    layout: str
    notices: tuple[str, ...] = field(default=())
    sharing: Sharing = "false"


@dataclass(frozen=True)
class TrainResult:
    """One optimizer step of one rank.

    Attributes:
        metrics: `algorithms.metrics.MetricSums` over this rank's rows, "loss" among them.
        grad_norm: Global gradient norm before clipping; the same on every rank. Infinite: the gradient was
            not finite, and the step was left out.
        learning_rate: Of this step.
        seconds: Time of the step on this rank.
        tokens: Tokens that went through the model, padding included.
        memory_gib: Peak memory of the process's device.
    """

    metrics: Any
    grad_norm: float
    learning_rate: float
    seconds: float
    tokens: int
    memory_gib: float


@dataclass(frozen=True)
class SnapshotPart:
    """What a rank's snapshot consists of; the bytes lie in an object of their own.

    Attributes:
        entries: Names, dtypes and shapes, in the order of the bytes.
        index: What a checkpoint's index says of the state, the loss scale among it.
        seconds: Time of taking it, without the copy into the store.
    """

    entries: tuple[TensorEntry, ...]
    index: Mapping[str, Any]
    seconds: float

    @property
    def nbytes(self) -> int:
        """Bytes in the object store."""
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step of the whole group.

    Attributes:
        metrics: Of all ranks, as plain numbers ("loss" and what the loss and the mismatch measure).
        tokens: Tokens that went through the model, padding included.
        memory_gib: The largest peak of any rank.
    """

    metrics: dict[str, float]
    tokens: int
    memory_gib: float


@dataclass(frozen=True)
class RowLogprobs:
    """Log-probs of rows under one model.

    Attributes:
        columns: Where each row's {"logprobs"} lies.
        sums: Sum over each row's loss tokens, float64 `[n]`.
    """

    columns: list[RowPointer]
    sums: NDArray[np.float64]


@dataclass(frozen=True)
class TokenOrder:
    """An order of a step's tokens by the covariance of log-prob and advantage (`algorithms.covariance`).

    Attributes:
        mean_logprob: Over the tokens of the step.
        mean_advantage: The same.
        bounds: Tokens whose covariance lies between these come at random, the others never; None: the largest
            covariance comes first.
        step: Number of the step, for that draw.
        seed: The same.
    """

    mean_logprob: float
    mean_advantage: float
    bounds: tuple[float, float] | None = None
    step: int = 0
    seed: int = 0


@dataclass(frozen=True)
class EstimateSettings:
    """Constants of the estimate; see `algorithms.ppo`.

    Attributes:
        kl_coef: Price of a nat of KL to the reference; with 0 there are no reference log-probs.
        gamma: Discount of rewards.
        lam: GAE's lambda.
    """

    kl_coef: float
    gamma: float
    lam: float


@dataclass(frozen=True)
class EstimateFacts:
    """Facts on a worker's share, for the driver.

    Attributes:
        advantages, returns, errors: `algorithms.moments.Moments` over the tokens of rows that have a score;
            an error is a return less the value that the critic gave.
        metrics: `objective/*` under TRL's names, over those rows, and "kl" over their tokens.
    """

    advantages: Any
    returns: Any
    errors: Any
    metrics: Any


@dataclass(frozen=True)
class Estimates:
    """The critic's estimates for a generation.

    Attributes:
        columns: By name, where each row's column lies: "advantages", whitened, "returns" and "old_values".
        means: Mean advantage of each row's tokens, float64 `[n]`.
        metrics: As plain numbers.
    """

    columns: dict[str, list[RowPointer]]
    means: NDArray[np.float64]
    metrics: dict[str, float]


@dataclass(frozen=True)
class LossSpec:
    """The loss of a run, as the ranks are told.

    Attributes:
        name: In the registry of losses.
        settings: Its own settings, by name: a plugin's class exists only where its file was loaded.
        normaliser: How its token losses add up (`algorithms.aggregation.NORMALISERS`).
        plugin_files: Files that register the loss; empty for a built-in one.
        with_entropy: Whether the loss shall see entropies, to log them.
    """

    name: str
    settings: Mapping[str, Any]
    normaliser: str
    plugin_files: tuple[str, ...] = ()
    with_entropy: bool = False
