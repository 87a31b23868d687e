"""GKD: the divergence of the student's distribution from the teacher's, at every token.

Source: Agarwal et al. 2024 (On-policy distillation of language models: learning from self-generated
mistakes), equations 3 and 4; flags and defaults are ms-swift's. The divergence itself is in
`models.distribution`. TRL takes it at temperature 1 whatever the sampling temperature was; here, as for all
log-probs, both sides are taken at `--temperature`.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytune_rl.algorithms.distillation import TEACHER_COLUMNS
from raytune_rl.algorithms.metrics import MetricSums, Stat, mean_of
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss


@dataclass(frozen=True, kw_only=True)
class GKDSettings:
    """Hyper-parameters of GKD.

    Attributes:
        jsd_beta: 0: forward KL(T || S); 1: reverse KL(S || T); between: generalised Jensen-Shannon.
        sft_alpha: weight of the negative log-likelihood on rows that the policy did not sample itself.
    """

    jsd_beta: float = option(
        0.5,
        "Which divergence from the teacher: 0 the forward KL, 1 the reverse KL, between the two a mixture "
        "(generalised Jensen-Shannon). With --rlhf_type gkd, --beta is read as this.",
        ge=0,
        le=1,
    )
    sft_alpha: float = option(
        0.0, "Weight of the likelihood of the data's own answers, where a step trains on them.", ge=0
    )


def gkd_loss(inputs: LossInputs) -> LossOutput:
    """JSD_beta(T, S) per token, plus sft_alpha * -log S(token) where the row has "off_policy".

    Metrics: `gkd/divergence`, the token mean in nats.
    """
    settings: GKDSettings = inputs.settings
    assert inputs.divergence is not None, "the worker takes it where `divergence_beta` says so"
    token_loss = inputs.divergence
    stats: dict[str, Stat] = {"gkd/divergence": mean_of(token_loss)}
    given = inputs.row_values.get("off_policy")
    if settings.sft_alpha and given is not None:
        from_data = given[inputs.row_of].to(token_loss.dtype)
        likelihood = -inputs.logprobs * from_data
        stats["gkd/nll"] = mean_of(likelihood.detach())
        token_loss = token_loss + settings.sft_alpha * likelihood
    return LossOutput(token_loss, MetricSums(stats))


GKD = register_loss(
    Loss(
        "gkd",
        GKDSettings,
        gkd_loss,
        lambda settings: TEACHER_COLUMNS,
        needs_advantages=True,
        normaliser="tokens",
        divergence_beta=lambda settings: settings.jsd_beta,
        summary="is the divergence from a teacher's distribution, whatever the rewards say",
        paper="Agarwal et al. 2024 (GKD)",
        in_words=lambda settings: f"generalised JSD, beta {settings.jsd_beta:g}",
    )
)
