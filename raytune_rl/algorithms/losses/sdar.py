"""SDAR: the clipped loss, and beside it the likelihood of the tokens that a teacher finds likelier.

Source: "Self-distilled agentic reinforcement learning", 2026 (arXiv 2605.15155), as ms-swift has it: with
log T the log-prob that a teacher with privileged context gives a token, and d = log T - log pi,

    loss_t = GRPO_t + coef * sg(sigmoid(beta d)) * d

The gate is the more open the likelier the teacher finds the token; the gradient is that of -log pi times the
gate. The advantage knows nothing of the teacher. ms-swift averages the term over the tokens of a micro-batch
whatever the loss does; here both are averaged over all tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytune_rl.algorithms.distillation import TEACHER_LOGPROBS
from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.losses.grpo import GRPOSettings, clip_in_words, clipped_by_settings
from raytune_rl.algorithms.metrics import MetricSums, mean_of
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import bounded
from raytune_rl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SDARSettings(GRPOSettings):
    """Hyper-parameters of SDAR.

    Attributes:
        sdar_loss_coef: weight of the gated term.
        sdar_gate_beta: how sharp the gate is, per nat.
    """

    sdar_loss_coef: float = option(0.1, "Weight of the teacher's term; the paper has 0.01 to 0.1.", gt=0)
    sdar_gate_beta: float = option(5.0, "How sharply the gate opens with the gap of log-probs.", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sdar_loss_coef <= 0 or self.sdar_gate_beta <= 0:
            raise ConfigError(
                f"sdar_loss_coef is {self.sdar_loss_coef} and sdar_gate_beta {self.sdar_gate_beta}; both "
                "must be positive"
            )


def sdar_loss(inputs: LossInputs) -> LossOutput:
    """`grpo_loss` with the gated term; metrics `sdar/gate` and `sdar/gap` (log T - log pi), token means."""
    settings: SDARSettings = inputs.settings
    shared = policy_loss(inputs, clipped_by_settings)
    assert shared.token_loss is not None
    gap = bounded(inputs.columns[TEACHER_LOGPROBS] - inputs.logprobs)
    gate = torch.sigmoid(settings.sdar_gate_beta * gap.detach())
    stats = {"sdar/gate": mean_of(gate), "sdar/gap": mean_of(gap.detach())}
    token_loss = shared.token_loss + settings.sdar_loss_coef * gate * gap
    return LossOutput(token_loss, shared.metrics.merge(MetricSums(stats)))


def _columns(settings: SDARSettings) -> tuple[str, ...]:
    return (*policy_columns(settings), TEACHER_LOGPROBS)


SDAR = register_loss(
    Loss(
        "sdar",
        SDARSettings,
        sdar_loss,
        _columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="tokens",
        summary="adds the likelihood of the tokens that a teacher finds likelier, behind a gate",
        paper="Self-distilled agentic RL, arXiv 2605.15155 (SDAR)",
        in_words=lambda settings: (
            f"{clip_in_words(settings)}, teacher's term {settings.sdar_loss_coef:g}, gate "
            f"{settings.sdar_gate_beta:g}"
        ),
    )
)
