"""Direct preference optimisation: a pair loss on the log ratios of two completions to a reference.

Source: Rafailov et al. 2023 (DPO); the pair losses are in `dpo_losses`, their combination with weights is
that of MPO (Wang et al. 2024); rpo_alpha, Pang et al. 2024 (Iterative RPO); ld_alpha, Liu et al. 2024
(LD-DPO). Names and defaults as in ms-swift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms import aot
from raytune_rl.algorithms.divergence import DIVERGENCES, Divergence, divergence_reward
from raytune_rl.algorithms.dpo_losses import PAIR_LOSSES, WITH_DIVERGENCE, Ratios
from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import row_counts
from raytune_rl.algorithms.pairs import PAIR, Pair, both_sides, check_pairs, split_pairs
from raytune_rl.algorithms.preference import chosen_nll, preference_metrics
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import positions, sum_rows
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

LOSS_TYPES = (*PAIR_LOSSES, "aot", "aot_unpaired", "sft")
BCO_SHIFT = "bco_shift"


@dataclass(frozen=True, kw_only=True)
class DPOSettings:
    """Hyper-parameters of DPO.

    Attributes:
        loss_type: one or more of `LOSS_TYPES`, added up. "sft" is the likelihood of the chosen completion.
        loss_weights: one weight a loss type; None: all 1.
        beta: temperature: how closely the policy stays with the reference.
        label_smoothing: probability that a label is wrong; of sigmoid, robust, exo_pair and aot.
        f_divergence_type: what ties the policy to the reference (`divergence`).
        f_alpha_divergence_coef: alpha of the alpha-divergence, as the paper counts it.
        rpo_alpha: weight of the likelihood of the chosen completion, added to the whole; None: 0.
        ld_alpha: weight of the tokens beyond the length of the shorter completion; None: 1.
        discopop_tau: of discopop.
        bco_shift: bco_pair subtracts the row value "bco_shift" from rewards: BCO's delta, half the mean of
            beta x plus half that of beta y over the step (ms-swift: over all steps so far). Without it delta
            is 0, as in TRL 1.x.
    """

    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    rpo_alpha: float | None = None
    ld_alpha: float | None = None
    discopop_tau: float = 0.05
    bco_shift: bool = True

    def __post_init__(self) -> None:
        kinds = self.loss_type
        unknown = [kind for kind in kinds if kind not in LOSS_TYPES]
        if unknown or not kinds:
            raise ConfigError(
                f"loss_type {' '.join(unknown) or 'is empty'}; choose from {', '.join(LOSS_TYPES)}"
            )
        if self.loss_weights is not None and len(self.loss_weights) != len(kinds):
            raise ConfigError(
                f"loss_weights has {len(self.loss_weights)} values for {len(kinds)} loss types; give each one"
            )
        if self.beta < 0 or (self.beta == 0 and {"ipo", "sppo_hard"} & set(kinds)):
            raise ConfigError(f"beta is {self.beta}; it must be positive (ipo and sppo_hard divide by it)")
        self._check_smoothing()
        if self.f_divergence_type not in DIVERGENCES:
            raise ConfigError(
                f"f_divergence_type is '{self.f_divergence_type}'; it must be one of {', '.join(DIVERGENCES)}"
            )
        misfits = [kind for kind in kinds if kind not in (*WITH_DIVERGENCE, "sft")]
        if self.f_divergence_type != "reverse_kl" and misfits:
            raise ConfigError(
                f"f_divergence_type {self.f_divergence_type} has no meaning for loss_type "
                f"{' '.join(misfits)}; it goes with {', '.join(WITH_DIVERGENCE)}"
            )
        if self.f_divergence_type == "alpha_divergence" and not 0 < self.f_alpha_divergence_coef < 1:
            raise ConfigError(
                f"f_alpha_divergence_coef is {self.f_alpha_divergence_coef}; it must be between 0 "
                "(reverse_kl) and 1 (forward_kl)"
            )
        if self.rpo_alpha is not None and self.rpo_alpha < 0:
            raise ConfigError(f"rpo_alpha is {self.rpo_alpha}; it must not be negative")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ConfigError(f"ld_alpha is {self.ld_alpha}; it must be in [0, 1]")
        if self.ld_alpha is not None and (self.shifts or {"aot", "aot_unpaired"} & set(kinds)):
            raise ConfigError(
                f"ld_alpha {self.ld_alpha} weighs tokens, but aot, aot_unpaired and bco_shift compare whole "
                "completions over the step: leave out one of the two (bco_pair: bco_shift false)"
            )
        if self.discopop_tau <= 0:
            raise ConfigError(f"discopop_tau is {self.discopop_tau}; it divides, so it must be positive")

    def _check_smoothing(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 0.5)")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ConfigError(
                "loss_type exo_pair takes the logarithm of label_smoothing, so it must be positive: 0.001 is "
                "usual"
            )
        takers = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}
        if self.label_smoothing > 0 and not takers & set(self.loss_type):
            raise ConfigError(
                f"label_smoothing {self.label_smoothing} does nothing for loss_type "
                f"{' '.join(self.loss_type)}"
            )

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """Each loss type with its weight."""
        weights = (1.0,) * len(self.loss_type) if self.loss_weights is None else self.loss_weights
        return tuple(zip(self.loss_type, weights, strict=True))

    @property
    def shifts(self) -> bool:
        """Whether BCO's delta takes part."""
        return self.bco_shift and "bco_pair" in self.loss_type

    @property
    def likelihood(self) -> float:
        """Weight of the likelihood of the chosen completion, from rpo_alpha and sft."""
        return (self.rpo_alpha or 0.0) + sum(weight for kind, weight in self.terms if kind == "sft")


def length_desensitised(values: Tensor, row_of: Tensor, n_rows: int, ld_alpha: float) -> Tensor:
    """Tokens beyond the length of the shorter completion of their pair, weighted by ld_alpha; [N]."""
    counts = row_counts(row_of, n_rows)
    shorter = torch.minimum(counts[0::2], counts[1::2]).repeat_interleave(2)
    beyond = positions(row_of, n_rows) >= shorter[row_of]
    return torch.where(beyond, ld_alpha * values, values)


def pair_losses(
    kind: str, ratios: Ratios, policy: Pair, row_values: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses of one type, as those of chosen and of rejected rows, float64 [n_pairs] each."""
    if kind == "aot":
        reference = split_pairs(row_values[aot.REFERENCE]).chosen
        loss = aot.aot(policy.margin, reference, ratios.beta, ratios.label_smoothing)
    elif kind == "aot_unpaired":
        partner = split_pairs(row_values[aot.PARTNER])
        x, y = ratios.log_ratio.chosen, ratios.log_ratio.rejected
        sides = (partner.chosen, partner.rejected)
        return aot.aot_unpaired(x, y, sides, ratios.beta, ratios.label_smoothing)
    else:
        loss = PAIR_LOSSES[kind](ratios)
    return loss, torch.zeros_like(loss)


def dpo_loss(inputs: LossInputs) -> LossOutput:
    """Row losses of the pair terms, and token losses of the likelihood of the chosen completions.

    Weights: `aggregation.pair_weights`. Metrics as in TRL and ms-swift: `rewards/chosen`, `rewards/rejected`
    (beta times the log ratio), `rewards/accuracies`, `rewards/margins`, `logps/chosen`, `logps/rejected`, and
    `nll_loss` where the likelihood takes part.
    """
    settings: DPOSettings = inputs.settings
    check_pairs(inputs.row_values, inputs.n_rows)
    logprobs, reference = inputs.logprobs, inputs.columns["ref_logprobs"]
    if settings.ld_alpha is not None:
        logprobs, reference = (
            length_desensitised(column, inputs.row_of, inputs.n_rows, settings.ld_alpha)
            for column in (logprobs, reference)
        )
    policy = split_pairs(sum_rows(logprobs, inputs.row_of, inputs.n_rows))
    log_ratio = policy - split_pairs(sum_rows(reference, inputs.row_of, inputs.n_rows))
    counts = row_counts(inputs.row_of, inputs.n_rows).clamp(min=1)
    kind, alpha = settings.f_divergence_type, settings.f_alpha_divergence_coef
    zero = torch.zeros(inputs.n_rows, dtype=torch.float64, device=logprobs.device)
    shift = inputs.row_values[BCO_SHIFT] if settings.shifts else zero
    ratios = Ratios(
        log_ratio,
        Pair(
            divergence_reward(log_ratio.chosen, kind, alpha),
            divergence_reward(log_ratio.rejected, kind, alpha),
        ),
        split_pairs(counts),
        settings.beta,
        settings.label_smoothing,
        settings.discopop_tau,
        split_pairs(shift).chosen,
    )
    chosen = rejected = torch.zeros_like(log_ratio.chosen)
    for term, weight in settings.terms:
        if term != "sft":
            won, lost = pair_losses(term, ratios, policy, dict(inputs.row_values))
            chosen, rejected = chosen + weight * won, rejected + weight * lost
    metrics = preference_metrics(policy, log_ratio, settings.beta)
    if settings.likelihood == 0:
        return LossOutput(None, metrics, both_sides(chosen, rejected))
    nll, measured = chosen_nll(inputs)
    return LossOutput(settings.likelihood * nll, metrics.merge(measured), both_sides(chosen, rejected))


def _rows(settings: DPOSettings) -> tuple[str, ...]:
    needs = {"aot": aot.REFERENCE, "aot_unpaired": aot.PARTNER}
    extra = tuple(needs[kind] for kind in settings.loss_type if kind in needs)
    return (PAIR, *extra, *((BCO_SHIFT,) if settings.shifts else ()))


DPO = register_loss(
    Loss(
        "dpo",
        DPOSettings,
        dpo_loss,
        lambda settings: ("ref_logprobs",),
        required_rows=_rows,
        rows="pairs",
        paper="Rafailov et al. 2023 (DPO)",
    )
)
