"""Generalised advantage estimation: a critic says what each token was worth (PPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.gae import missing_eos
from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


@dataclass(frozen=True)
class CriticAdvantages(Credit):
    """See `algorithms.gae`; the fields are PPO's flags."""

    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None

    no_signal: ClassVar[str] = "no completion has a reward"

    @property
    def needs(self) -> frozenset[str]:
        """A critic, and the log-probs that the price of the KL is taken from."""
        return frozenset({"values", "old_logprobs"} | ({"ref_logprobs"} if self.kl_coef > 0 else set()))

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """One advantage a token, as the column "advantages"; beside it what the critic is to learn."""
        from raytune_rl.protocol.train import EstimateSettings  # with numpy, which --help does without

        finished = np.array([t.episode.finish_reason != "length" for t in experience.batch])
        estimates = models.estimate(
            batch,
            missing_eos(experience.rewards, finished, self.missing_eos_penalty),
            EstimateSettings(self.kl_coef, self.gamma, self.lam),
            whiten_rewards=self.whiten_rewards,
        )
        known = experience.rewards[np.isfinite(experience.rewards)]
        metrics = {
            "reward_std": float(np.std(known, ddof=1)) if len(known) > 1 else 0.0,
            "unscored_completions": float(len(experience.rewards) - len(known)),
            **estimates.metrics,
        }
        credited = batch.drop("ref_logprobs").with_columns(**estimates.columns)
        return Credited(credited, estimates.means.astype(np.float32), metrics)

    def has_signal(self, experience: Experience) -> bool:
        """A critic learns from any reward."""
        return bool(np.isfinite(experience.rewards).any())

    def in_words(self) -> str:
        """For the plan."""
        return f"against the critic: GAE, gamma {self.gamma:g}, lambda {self.lam:g}"


GAE = register_credit(
    CreditKind(
        "gae",
        CriticAdvantages,
        "against a critic (--rlhf_type ppo)",
        "Schulman et al. 2016 (GAE), 2017 (PPO)",
        kl_in_reward=True,
        compares=False,
    )
)
