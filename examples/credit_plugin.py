"""A credit of your own, for --external_plugins; chosen by its name. It says what each completion earned.

    raytune-rl rlhf ... --external_plugins credit_plugin.py --advantage_estimator median \
        --advantage_args '{"median_bound": 1}'

`assign` gets a generation (`experience`: trajectories and rewards, groups together) and the batch that is
trained on, row by row the same, and gives each row its advantage. A credit that needs log-probs of the
reference or of the policy, or a critic, says so in `needs`; it has the former as columns of the batch, and
asks `models` for what follows from them, as raytune_rl/algorithms/credit/group.py does.

The same file in raytune_rl/algorithms/credit/ is a built-in credit, and `median_bound` is a flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.lazy import np
from raytune_rl.algorithms.options import option

if TYPE_CHECKING:
    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


@dataclass(frozen=True)
class Median(Credit):
    """The reward less the median of its group; a completion without a reward earns nothing."""

    median_bound: float = option(2.0, "No advantage is farther from 0.", gt=0)

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """One advantage a completion."""
        groups, known = np.array(experience.group_ids), np.isfinite(experience.rewards)
        earned = np.zeros(len(groups), dtype=np.float32)
        for group in set(groups[known].tolist()):
            rows = known & (groups == group)
            earned[rows] = experience.rewards[rows] - np.median(experience.rewards[rows])
        bounded = earned.clip(-self.median_bound, self.median_bound)
        return Credited(batch, bounded, {"median/bounded": float(np.mean(bounded != earned))})

    def in_words(self) -> str:
        """For the plan."""
        return f"the reward less the median of its group, at most {self.median_bound:g}"


register_credit(CreditKind("median", Median, "the reward less the group's median", "Your own"))
