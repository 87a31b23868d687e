"""RLSD: rewards say whether a completion was right, a teacher which of its tokens made it so.

Source: "Self-distilled RLVR", 2026 (arXiv 2604.03128), as ms-swift has it (`advantage_reweight rlsd`): with
the group's advantage A of a completion, and log T the log-prob that a teacher with privileged context gives a
token,

    A_t = A ((1 - lambda) + lambda clip(exp(sign(A) (log T(y_t) - log pi_old(y_t))), 1 - eps, 1 + eps))

So a token of a right completion that the teacher finds likelier than the policy did earns more, one of a
wrong completion loses less, and no advantage changes its sign. Who the teacher is, and what it sees, are the
teacher's own flags. In ms-swift any group-relative estimator can be reweighed; here it is GRPO's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.advantages import Scale
from raytune_rl.algorithms.credit.base import CreditKind, register_credit
from raytune_rl.algorithms.credit.group import GroupRelative
from raytune_rl.algorithms.lazy import np
from raytune_rl.algorithms.options import option
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raytune_rl.algorithms.distillation import Advice


@dataclass(frozen=True)
class Reweighed:
    """The formula of the file; computed in float64.

    Attributes:
        share: lambda.
        clip: eps.
        negative_only: Leave completions with A >= 0 as they are.
    """

    share: float
    clip: float
    negative_only: bool = False

    def __call__(
        self, earned: NDArray[np.float32], teacher: NDArray[np.float32], old: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `algorithms.distillation.Advice`."""
        own = earned.astype(np.float64)
        # Beyond 50 nats the clip has long decided.
        gap = np.clip(teacher.astype(np.float64) - old.astype(np.float64), -50.0, 50.0)
        weight = np.clip(np.exp(np.sign(own) * gap), 1.0 - self.clip, 1.0 + self.clip)
        weight = (1.0 - self.share) + self.share * weight
        if self.negative_only:
            weight = np.where(own < 0, weight, 1.0)
        return (own * weight).astype(np.float32)


@dataclass(frozen=True)
class SelfDistilled(GroupRelative):
    """GRPO's advantages, which a teacher spreads over the tokens; see the file."""

    scale_rewards: Scale | None = None
    rlsd_lambda: float = option(0.5, "How much the teacher's opinion weighs; 0: GRPO as it is.", ge=0, le=1)
    rlsd_reweight_clip_range: float = option(
        0.2, "How far from 1 a token's weight may be, to either side.", ge=0, le=1
    )
    rlsd_lambda_warmup_steps: int = option(0, "Steps in which lambda rises from 0.", ge=0)
    rlsd_lambda_decay_steps: int = option(
        0, "Steps in which lambda falls to 0, after the warm-up; 0: it stays.", ge=0
    )
    rlsd_negative_only: bool = option(False, "Weigh the tokens of completions with A < 0 only.")

    def __post_init__(self) -> None:
        if not (0 <= self.rlsd_lambda <= 1 and 0 <= self.rlsd_reweight_clip_range <= 1):
            raise ConfigError(
                f"rlsd_lambda is {self.rlsd_lambda} and rlsd_reweight_clip_range "
                f"{self.rlsd_reweight_clip_range}; both must be from 0 to 1"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Somebody to learn from."""
        return super().needs | {"teacher_advantages"}

    def share(self, step: int) -> float:
        """lambda at an optimizer step, from 0; warm-up and decay are linear."""
        warm, decay = self.rlsd_lambda_warmup_steps, self.rlsd_lambda_decay_steps
        if step < warm:
            return self.rlsd_lambda * step / warm
        return self.rlsd_lambda * (max(0.0, 1.0 - (step - warm) / decay) if decay else 1.0)

    def advice(self, step: int) -> Advice:
        """The teacher spreads what was earned."""
        return Reweighed(self.share(step), self.rlsd_reweight_clip_range, self.rlsd_negative_only)

    def in_words(self) -> str:
        """For the plan."""
        return f"rlsd: {super().in_words()}, spread by the teacher, lambda {self.rlsd_lambda:g}"


RLSD = register_credit(
    CreditKind(
        "rlsd",
        SelfDistilled,
        "GRPO's, which the --teacher_model, told more by the column teacher_prompt, spreads over the tokens",
        "Self-distilled RLVR, arXiv 2604.03128 (RLSD)",
        {"estimator": "grpo"},
    )
)
