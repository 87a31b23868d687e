"""REINFORCE++-baseline: the group's mean, and the spread over the batch, with the KL in the loss.

Source: Hu et al. 2025 (REINFORCE++, arXiv 2501.03262), the variant "w/ baseline": A = r - mean of the group,
then by the spread of the batch; the KL is a term of the loss (k2 in the paper: --kl_estimator k2).
ms-swift's `reinforce_plus_plus`, and so the one here, is this estimator with the KL in the reward. The paper
and verl take the batch's mean and spread over tokens, so a long completion counts more often; here, as in
ms-swift, each completion counts once.
"""

from __future__ import annotations

from raytune_rl.algorithms.credit.base import CreditKind, register_credit
from raytune_rl.algorithms.credit.group import GroupRelative

REINFORCE_PLUS_PLUS_BASELINE = register_credit(
    CreditKind(
        "reinforce_plus_plus_baseline",
        GroupRelative,
        "as reinforce_plus_plus, with the KL in the loss",
        "Hu et al. 2025 (REINFORCE++)",
        {"estimator": "reinforce_plus_plus"},
    )
)
