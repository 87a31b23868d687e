"""ReMax: the reward less that of the likeliest answer to the same prompt.

Source: Li et al. 2024, "ReMax: a simple, effective, and efficient reinforcement learning method for aligning
large language models" (arXiv 2310.10505), algorithm 2: one more answer a prompt, decoded greedily under the
same weights, is the baseline. It does not depend on the sample, so the gradient stays unbiased, and one
sample a prompt is enough. The paper takes a KL off the reward of each token; here it is a term of the loss,
as with any credit that does not say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


def remax_advantages(rewards: NDArray[np.float64], greedy: NDArray[np.float64]) -> NDArray[np.float32]:
    """A_i = r_i - r_i(greedy), float32 `[n]`; 0 where either is not known.

    Args:
        rewards: float64 `[n]`.
        greedy: Those of the likeliest answers, float64 `[n]`.
    """
    gap = rewards - greedy
    return np.where(np.isfinite(gap), gap, 0.0).astype(np.float32)


@dataclass(frozen=True)
class GreedyBaseline(Credit):
    """See `remax_advantages`."""

    no_signal: ClassVar[str] = "no completion has another reward than the likeliest answer to its prompt"
    wants_greedy: ClassVar[bool] = True

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """One advantage a completion; metric `remax/greedy_reward`, the baselines' mean."""
        assert experience.greedy is not None, "whoever samples does as `wants_greedy` says"
        known = experience.greedy[np.isfinite(experience.greedy)]
        metrics = {
            "remax/greedy_reward": float(known.mean()) if len(known) else float("nan"),
            "unscored_completions": float((~np.isfinite(experience.rewards)).sum()),
        }
        return Credited(batch, remax_advantages(experience.rewards, experience.greedy), metrics)

    def informative(self, experience: Experience) -> set[int]:
        """Groups in which a reward differs from the greedy answer's."""
        assert experience.greedy is not None, "whoever samples does as `wants_greedy` says"
        earned = remax_advantages(experience.rewards, experience.greedy)
        return {group for group, gap in zip(experience.group_ids, earned, strict=True) if gap != 0}

    def in_words(self) -> str:
        """For the plan."""
        return "remax: the reward less that of the greedy answer, one more completion a prompt"


REMAX = register_credit(
    CreditKind(
        "remax",
        GreedyBaseline,
        "the reward less that of the likeliest answer, which is sampled beside; --num_generations may be 1",
        "Li et al. 2024 (ReMax)",
        compares=False,
    )
)
