"""Flags to losses: what is said arrives, what cannot be is refused, and a plugin's loss acts like ours."""

from pathlib import Path

import pytest

from raytune_rl.algorithms.correction import RolloutCorrection
from raytune_rl.algorithms.registry import get_loss
from raytune_rl.config import PPOConfig, RLHFConfig, resolved
from raytune_rl.errors import ConfigError, RewardError
from raytune_rl.pipelines.online_algorithms import Algorithm, algorithm_of, in_words
from raytune_rl.protocol.train import LossSpec

PLUGIN = """
from dataclasses import dataclass
from raytune_rl.algorithms.metrics import MetricSums
from raytune_rl.algorithms.registry import Loss, LossOutput, register_loss

@dataclass(frozen=True)
class Settings:
    sharpness: float = 1.0
    epsilon: float = 0.0
    beta: float = 0.0

def columns(settings):
    return ("ref_logprobs",) if settings.beta else ()

def compute(inputs):
    return LossOutput(-inputs.settings.sharpness * inputs.advantages * inputs.logprobs, MetricSums())

register_loss(Loss("from_a_plugin", Settings, compute, columns, needs_advantages=True, normaliser="dapo"))
"""


def config(**settings: object) -> RLHFConfig:
    base = {"model": "m", "dataset": "d", "reward_funcs": "accuracy"}
    return RLHFConfig(**{**base, "num_generations": 2, **settings})  # type: ignore[arg-type]


def words(chosen: RLHFConfig) -> list[tuple[str, str]]:
    return in_words(chosen, algorithm_of(chosen))


def settings_of(algorithm: Algorithm) -> object:
    return get_loss(algorithm.loss.name).settings_type(**algorithm.loss.settings)


@pytest.mark.parametrize(
    ("loss_type", "normaliser"),
    [("grpo", "rows"), ("bnpo", "tokens"), ("dr_grpo", "constant"), ("dapo", "tokens"), ("sapo", "rows")],
)
def test_every_loss_type_has_a_loss_and_its_own_normaliser(loss_type: str, normaliser: str) -> None:
    algorithm = algorithm_of(config(loss_type=loss_type))
    assert algorithm.loss.name == loss_type
    assert algorithm.loss.normaliser == normaliser
    assert settings_of(algorithm).beta == 0.04  # type: ignore[attr-defined]


def test_every_flag_arrives_in_the_settings() -> None:
    algorithm = algorithm_of(
        config(
            epsilon=0.1,
            epsilon_high=0.3,
            delta=4.0,
            beta=0.5,
            kl_estimator="k2",
            importance_sampling_level="sequence_token",
            rollout_importance_sampling_mode="token_mask",
            rollout_importance_sampling_threshold=3.0,
            rollout_importance_sampling_min=0.5,
            off_policy_sequence_mask_delta=0.2,
            top_entropy_quantile=0.2,
            log_entropy=True,
        )
    )
    assert algorithm.loss.settings == {
        "epsilon": 0.1,
        "epsilon_high": 0.3,
        "delta": 4.0,
        "beta": 0.5,
        "kl_estimator": "k2",
        "importance_sampling_level": "sequence_token",
        "correction": RolloutCorrection("token_mask", 3.0, 0.5),
        "off_policy_delta": 0.2,
        "entropy_filter": True,
    }
    assert algorithm.loss.with_entropy
    sapo = settings_of(algorithm_of(config(loss_type="sapo", tau_pos=2.0, tau_neg=3.0)))
    assert (sapo.tau_pos, sapo.tau_neg) == (2.0, 3.0)  # type: ignore[attr-defined]
    fipo = settings_of(algorithm_of(config(loss_type="fipo", fipo_decay_rate=8, fipo_clip_high_only=False)))
    assert (fipo.fipo_decay_rate, fipo.fipo_clip_high_only) == (8, False)  # type: ignore[attr-defined]
    cispo = settings_of(algorithm_of(config(loss_type="cispo", epsilon_high=5.0)))
    assert cispo.epsilon_high == 5.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "in_reward", "estimator", "in_loss"),
    [
        ({}, False, "k3", 0.04),
        ({"kl_in_reward": True}, True, "k1", 0.0),
        ({"advantage_estimator": "rloo"}, True, "k1", 0.0),
        ({"advantage_estimator": "reinforce_plus_plus", "kl_estimator": "k2"}, True, "k2", 0.0),
        ({"advantage_estimator": "rloo", "kl_in_reward": False}, False, "k3", 0.04),
        ({"advantage_estimator": "rloo", "beta": 0.0}, False, "k3", 0.0),
    ],
)
def test_the_kl_is_in_one_place(
    settings: dict[str, object], in_reward: bool, estimator: str, in_loss: float
) -> None:
    chosen = config(**settings)
    assert resolved.kl_in_reward(chosen) == in_reward
    assert resolved.kl_estimator(chosen) == estimator
    assert algorithm_of(chosen).loss.settings["beta"] == in_loss


def test_dapo_is_a_recipe_whose_parts_can_be_overridden() -> None:
    chosen = config(rlhf_type="dapo", epsilon_high=0.4, dynamic_sample=False)
    assert (chosen.loss_type, chosen.beta, chosen.overlong_filter) == ("dapo", 0.0, True)
    assert (chosen.epsilon_high, chosen.dynamic_sample) == (0.4, False)
    assert RLHFConfig(**chosen.args()) == chosen, "a resumed run reads the same settings"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "gpro"}, r"--loss_type gpro is not one of: .*grpo.*Did you mean grpo"),
        ({"loss_type": "cispo"}, r"cispo needs --epsilon_high"),
        ({"kl_estimator": "k1"}, r"k1 belongs into the reward.*--kl_in_reward true"),
        ({"rollout_importance_sampling_min": 2.0}, r"min 2.0 must be below"),
        ({"scale_rewards": "gdpo", "kl_in_reward": True}, r"gdpo normalises reward functions one by one"),
        ({"delta": 1.1}, r"must be over 1 \+ --epsilon_high = 1.2"),
    ],
)
def test_what_cannot_be_is_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_a_loss_of_a_plugin(tmp_path: Path) -> None:
    file = tmp_path / "my_loss.py"
    file.write_text(PLUGIN)

    def mine(**settings: object) -> Algorithm:
        return algorithm_of(config(loss_type="from_a_plugin", external_plugins=str(file), **settings))

    algorithm = mine(loss_args='{"sharpness": 2}', epsilon=0.1, beta=0.2)
    given = {"epsilon": 0.1, "beta": 0.2, "sharpness": 2}
    assert algorithm.loss == LossSpec("from_a_plugin", given, "tokens", (str(file),), False)
    with pytest.raises(
        ConfigError, match=r"--loss_args: sharpnes is no setting of loss .from_a_plugin., which has: beta"
    ):
        mine(loss_args={"sharpnes": 2})
    with pytest.raises(ConfigError, match="needs ref_logprobs, which this run does not have"):
        mine(loss_args={"beta": 0.5}, beta=0.0)
    with pytest.raises(ConfigError, match=r"no loss is named .other.; known losses: .*from_a_plugin"):
        algorithm_of(config(loss_type="other", external_plugins=str(file)))
    with pytest.raises(ConfigError, match="a loss of another command"):
        algorithm_of(config(loss_type="dpo", external_plugins=str(file)))
    file.write_text("import nothing_of_this_name")
    with pytest.raises(RewardError, match=r"my_loss\.py:1: ModuleNotFoundError"):
        mine()


def test_the_plan_says_what_is_on() -> None:
    plain = dict(words(config()))
    assert plain == {
        "loss": "grpo, clip 0.8 to 1.2",
        "importance ratio": "of the token",
        "advantage": "grpo, scaled by group",
        "KL": "k3 in the loss, beta 0.04",
        "reference": "the policy with its adapter off, no second copy",
    }
    for more, said in (
        ({"train_type": "full"}, "the model before its first step"),
        (
            {"train_type": "full", "sync_ref_model": True},
            "the model before its first step, follows the policy",
        ),
        ({"adapters": "a"}, "the model before its first step"),
        ({"adapters": "a", "ref_adapters": "a"}, "m with a"),
        ({"ref_model": "r"}, "r"),
    ):
        assert dict(words(config(**more)))["reference"] == said
    rich = dict(
        words(
            config(
                rlhf_type="dapo",
                beta=0.1,
                advantage_estimator="rloo",
                importance_sampling_level="sequence_token",
                rollout_importance_sampling_mode="token_mask",
                off_policy_sequence_mask_delta=0.2,
                top_entropy_quantile=0.2,
            )
        )
    )
    assert rich["loss"] == "dapo, clip 0.8 to 1.28"
    assert rich["importance ratio"] == "of the sequence, by token"
    assert rich["advantage"] == "rloo, not scaled"
    assert rich["KL"] == "k1 off the reward, beta 0.1"
    assert rich["rollout correction"] == "token_mask, 0 to 2"
    assert rich["entropy filter"] == "the top 20% of the tokens"
    assert {"off-policy mask", "overlong filter", "dynamic sampling"} <= rich.keys()


def test_the_plan_of_ppo_names_the_critic() -> None:
    found = dict(words(PPOConfig(model="m", dataset="d", reward_funcs="accuracy", lam=0.9)))
    assert found["advantage"] == "against the critic: GAE, gamma 1, lambda 0.9"
