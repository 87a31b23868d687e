"""GPG: the policy gradient as it stands, without ratio or clip.

Source: Chu et al. 2025, "GPG: a simple and strong reinforcement learning baseline for model reasoning" (arXiv
2504.02546), eq. 5: -log pi(o_t) A, the mean over all tokens of the step. `--advantage_estimator gpg` is the
credit of the same paper. As there is no ratio, every step after the first of a generation is off-policy
without correction: --num_iterations 1, and one optimizer step a generation, are what the paper has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.metrics import MetricSums
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GPGSettings(PolicySettings):
    """Nothing beside what all policy losses have."""


def gpg_surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
    """-log pi * A, per token; the ratio has no part in it."""
    assert inputs.advantages is not None
    return -inputs.logprobs * inputs.advantages, MetricSums()


def gpg_loss(inputs: LossInputs) -> LossOutput:
    """`policy_loss` with the policy gradient."""
    return policy_loss(inputs, gpg_surrogate)


GPG = register_loss(
    Loss(
        "gpg",
        GPGSettings,
        gpg_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="tokens",
        fixed={"importance_sampling_level": "token"},
        summary="is the policy gradient without ratio or clip",
        paper="Chu et al. 2025 (GPG)",
    )
)
