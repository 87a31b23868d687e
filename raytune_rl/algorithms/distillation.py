"""On-policy distillation: the teacher's opinion of a sampled token as its advantage.

The reverse KL of the policy to a teacher, KL(pi || T) = E_pi[log pi(y) - log T(y)], has the policy gradient
E[(log T(y_t) - log pi(y_t)) grad log pi(y_t)] if each token counts for itself alone (discount 0): the
difference of log-probs is the advantage of the token. Gu et al. 2024 (MiniLLM), equation 2, and Agarwal et
al. 2024 (On-policy distillation of language models), section 3; ms-swift adds it to the reward's advantage
with `teacher_kl_coef`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEACHER_COLUMNS = ("teacher_ids", "teacher_top_logprobs")
"""Columns of a loss that needs a teacher's distribution: its likeliest tokens and their log-probs, k a loss
token."""

TEACHER_LOGPROBS = "teacher_logprobs"
"""Column of a loss that needs a teacher's log-probs of the tokens."""


class Advice(Protocol):
    """What becomes of a row's advantages when a teacher has seen its tokens."""

    def __call__(
        self, earned: NDArray[np.float32], teacher: NDArray[np.float32], old: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The new ones.

        Args:
            earned: What each token earned otherwise, float32 `[N]`.
            teacher: The teacher's log-probs, float32 `[N]`.
            old: Those of the policy before the step, float32 `[N]`.
        """
        ...


@dataclass(frozen=True)
class ReverseKL:
    """Adds the teacher's opinion; see the file.

    Attributes:
        coefficient: Its weight.
    """

    coefficient: float

    def __call__(
        self, earned: NDArray[np.float32], teacher: NDArray[np.float32], old: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `advantages`."""
        return advantages(earned, teacher, old, self.coefficient)


def advantages(
    earned: NDArray[np.float32], teacher: NDArray[np.float32], old: NDArray[np.float32], coefficient: float
) -> NDArray[np.float32]:
    """A_t = earned_t + coefficient * (log T(y_t) - log pi_old(y_t)), computed in float64.

    Args:
        earned: What each token earned otherwise, float32 `[N]`.
        teacher: The teacher's log-probs, float32 `[N]`.
        old: Those of the policy before the step, float32 `[N]`.
        coefficient: Weight of the teacher's part.
    """
    difference = teacher.astype(np.float64) - old.astype(np.float64)
    return (earned.astype(np.float64) + coefficient * difference).astype(np.float32)
