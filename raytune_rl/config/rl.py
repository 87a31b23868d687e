"""The algorithm and its constants."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from raytune_rl.algorithms.credit.base import credit_names, get_credit
from raytune_rl.algorithms.registry import online_losses
from raytune_rl.config.algorithms import (
    AlgorithmFlags,
    credit_choices,
    loss_choices,
    loss_flags,
    wants_kl_in_reward,
)
from raytune_rl.config.base import setting
from raytune_rl.config.explain import did_you_mean
from raytune_rl.config.preference import READS
from raytune_rl.config.recipes import RECIPES, with_recipe
from raytune_rl.errors import ConfigError

_setting = partial(setting, "RL algorithm")
_tuner = partial(setting, "Tuner")

BUILT = ("grpo", *RECIPES)
"""The values of `rlhf_type` that run."""


class RLOptions(AlgorithmFlags):
    """Policy losses, advantages and the KL to the reference, with ms-swift's names and defaults."""

    WITH_CRITIC: ClassVar[bool] = False
    """Whether a critic says what completions are worth, instead of a comparison within their group."""

    rlhf_type: Literal["grpo", "dapo", "ppo", "dpo", "kto", "orpo", "cpo", "simpo", "rm", "gkd"] = _setting(
        "grpo",
        "Algorithm. grpo; dapo, which is grpo with DAPO's settings; ppo, which has flags of its own: "
        "raytune-rl rlhf --rlhf_type ppo --help; and so have dpo, kto, orpo, cpo, simpo and rm, which learn "
        "from preferences in the data. gkd: distillation from a --teacher_model, on the policy's own answers "
        "and on the data's.",
    )
    loss_type: str = _setting(
        "grpo",
        f"The loss, and how its token losses become one: {loss_choices()}; or the name of a loss that a "
        f"file of "
        "--external_plugins registers.",
    )
    loss_args: dict[str, Any] = _setting({}, "Settings of a loss from a plugin, as JSON: '{\"alpha\": 1}'.")
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = _setting(
        "token",
        "What the importance ratio is of: each token; the whole completion (sequence: GSPO); or the "
        "completion, with gradients by token (sequence_token).",
    )
    epsilon: float = _setting(0.2, "Clip the ratio below 1 - epsilon.", gt=0, lt=1)
    epsilon_high: float | None = _setting(
        None,
        "Clip the ratio above 1 + epsilon_high. Not set: --epsilon. With --loss_type cispo it is the cap "
        "itself, and must be given; 5.0 is usual.",
        gt=0,
    )
    delta: float | None = _setting(
        None, "Upper cap on the ratio where the advantage is negative. Not set: no cap.", gt=1
    )

    advantage_estimator: str = _setting(
        "grpo",
        f"Who earned what. {credit_choices()}; or the name of a credit that a file of --external_plugins "
        "registers.",
    )
    advantage_args: dict[str, Any] = _setting(
        {}, "Settings of a credit from a plugin, as JSON: '{\"alpha\": 1}'."
    )
    scale_rewards: Literal["group", "batch", "none", "gdpo"] | None = _setting(
        None,
        "Divide advantages by the spread of rewards in the group, in the batch, or not; gdpo: each reward "
        "function by its own spread in the group, and their sum by that of the batch. Not set: group for "
        "grpo, none for rloo, batch for reinforce_plus_plus.",
    )
    beta: float = _setting(
        0.04, "Weight of the KL term that ties the policy to the reference; 0: no reference model.", ge=0
    )
    kl_in_reward: bool | None = _setting(
        None,
        "Take the KL off the reward instead of adding it to the loss. Not set: true for "
        "--advantage_estimator rloo and reinforce_plus_plus, false for the others.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = _setting(
        None,
        "How the KL is estimated from a sampled token (Schulman 2020). Not set: k1 in the reward, k3 in the "
        "loss.",
    )
    ref_model: str | None = _setting(
        None, "The reference model of the KL. Not set: the model as it is before the first step."
    )
    ref_adapters: tuple[str, ...] = _setting(
        (), "LoRA adapters of the reference model. Not set: those of --adapters, unless --ref_model is given."
    )
    sync_ref_model: bool = _setting(
        False,
        "Let the reference follow the policy (--train_type full): mix the policy's weights into it at times. "
        "It is then part of checkpoints.",
    )
    ref_model_sync_steps: int = _setting(512, "--sync_ref_model: optimizer steps between two times.", ge=1)
    ref_model_mixup_alpha: float = _setting(
        0.6, "--sync_ref_model: the policy's share in the mixture.", gt=0, le=1
    )
    top_entropy_quantile: float = _setting(
        1.0, "Train on this share of the step's tokens, those of highest entropy; 1: on all.", gt=0, le=1
    )
    log_entropy: bool = _setting(False, "Log the entropy of the policy's distribution over tokens.")
    overlong_filter: bool = _setting(
        False, "Leave completions that ran into --max_completion_length out of the loss."
    )
    dynamic_sample: bool = _setting(
        False, "Replace groups whose completions all have one reward, and so teach nothing, by fresh prompts."
    )
    max_resample_times: int = _setting(
        3, "--dynamic_sample: most times that fresh prompts are sampled for one generation.", ge=1
    )

    num_iterations: int = _setting(1, "Times that each generation is trained on.", ge=1)
    steps_per_generation: int | None = _setting(
        None, "Accumulation steps per generation. Not set: --gradient_accumulation_steps.", ge=1
    )
    generation_batch_size: int | None = _setting(
        None, "The same as a number of completions; give only one of the two.", ge=1
    )
    log_completions: bool = _setting(False, "Write prompts, completions and rewards to completions.jsonl.")
    lora_dropout: float = _tuner(
        0.0,
        "Share of the adapter's inputs dropped while training. 0 here: log-probs under dropout cannot be "
        "compared with those of the engine that sampled.",
        ge=0,
        lt=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, values: Any) -> Any:
        return with_recipe(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_rl(self) -> Self:
        if self.rlhf_type in READS:
            raise ConfigError(
                f"--rlhf_type {self.rlhf_type} learns from preferences in the data: its settings are a "
                "PreferenceConfig, not an RLHFConfig."
            )
        if self.rlhf_type == "ppo" and not self.WITH_CRITIC:
            raise ConfigError("--rlhf_type ppo has flags of its own: in Python, make a PPOConfig.")
        if self.rlhf_type not in (*BUILT, "ppo"):
            runs = ", ".join((*BUILT, "ppo", *READS))
            raise ConfigError(f"--rlhf_type {self.rlhf_type} is not built yet; what runs today: {runs}.")
        if self.steps_per_generation is not None and self.generation_batch_size is not None:
            raise ConfigError(
                f"--steps_per_generation {self.steps_per_generation} and --generation_batch_size "
                f"{self.generation_batch_size} set the same thing: give only one of the two."
            )
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        reads = loss_flags()["delta"]
        if self.delta is not None and self.loss_type in reads and self.delta <= 1 + high:
            raise ConfigError(
                f"--delta {self.delta} must be over 1 + --epsilon_high = {1 + high:g}, or it would cut into "
                "the clip range."
            )
        in_reward = wants_kl_in_reward(self) if self.beta else bool(self.kl_in_reward)
        if self.scale_rewards == "gdpo" and (self.advantage_estimator != "grpo" or in_reward):
            raise ConfigError(
                "--scale_rewards gdpo normalises reward functions one by one: it goes with "
                "--advantage_estimator grpo and without --kl_in_reward."
            )
        if self.kl_estimator == "k1" and not in_reward and self.beta > 0:
            raise ConfigError(
                "--kl_estimator k1 belongs into the reward: in the loss its gradient is 0 in expectation. "
                "Add --kl_in_reward true, or use k2 or k3."
            )
        return self


def check_names(loss_type: str, estimator: str, plugins: tuple[str, ...]) -> None:
    """Without a plugin there are only the built-in losses and credits.

    Raises:
        ConfigError: there is no such loss or credit.
    """
    losses = [loss.name for loss in online_losses()]
    if plugins:
        return
    if estimator in losses and estimator not in credit_names():
        raise ConfigError(
            f"--advantage_estimator {estimator}: {estimator} is a loss: --loss_type {estimator}."
        )
    get_credit(estimator)
    if loss_type in losses:
        return
    if loss_type in credit_names():
        raise ConfigError(
            f"--loss_type {loss_type}: {loss_type} is a credit: --advantage_estimator {loss_type}."
        )
    if loss_type == "gspo":
        raise ConfigError(
            "--loss_type gspo: GSPO is --loss_type grpo --importance_sampling_level sequence; its paper has "
            "--epsilon 3e-4 --epsilon_high 4e-4 --beta 0."
        )
    raise ConfigError(
        f"--loss_type {loss_type} is not one of: {', '.join(losses)}."
        f"{did_you_mean(loss_type, losses)} A loss of your own comes from a file given to "
        "--external_plugins, which calls register_loss."
    )
