"""No credit but the teachers': pure on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


@dataclass(frozen=True)
class TeachersAlone(Credit):
    """Rewards are logged and teach nothing; each token earns what `algorithms.distillation` says."""

    no_signal: ClassVar[str] = "there is no completion"

    @property
    def needs(self) -> frozenset[str]:
        """Somebody to learn from."""
        return frozenset({"teacher_advantages"})

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """Nothing to anybody: the teachers' part comes to it."""
        return Credited(batch, np.zeros(len(batch), dtype=np.float32))

    def informative(self, experience: Experience) -> set[int]:
        """Every group: a teacher has an opinion of all."""
        return set(experience.groups)

    def in_words(self) -> str:
        """For the plan."""
        return "the teachers' alone"


DISTILL = register_credit(
    CreditKind(
        "distill",
        TeachersAlone,
        "what the --teacher_model thinks of each token, alone; rewards are logged only",
        "Agarwal et al. 2024, On-policy distillation of language models",
        compares=False,
    )
)
