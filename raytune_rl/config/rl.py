"""The algorithm and its constants."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.config.explain import did_you_mean
from raytune_rl.config.preference import READS
from raytune_rl.config.recipes import RECIPES, with_recipe
from raytune_rl.errors import ConfigError

_setting = partial(setting, "RL algorithm")
_tuner = partial(setting, "Tuner")

BUILT = ("grpo", *RECIPES)
"""The values of `rlhf_type` that run."""

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "fipo")
"""The values of `loss_type` that need no plugin."""

NOT_BUILT = ("real",)
"""Those of ms-swift that are not here yet."""


class RLOptions(Options):
    """Policy losses, advantages and the KL to the reference, with ms-swift's names and defaults."""

    WITH_CRITIC: ClassVar[bool] = False
    """Whether a critic says what completions are worth, instead of a comparison within their group."""

    rlhf_type: Literal["grpo", "dapo", "ppo", "dpo", "kto", "orpo", "cpo", "simpo", "rm", "gkd"] = _setting(
        "grpo",
        "Algorithm. grpo; dapo, which is grpo with DAPO's settings; ppo, which has flags of its own: "
        "raytune-rl rlhf --rlhf_type ppo --help; and so have dpo, kto, orpo, cpo, simpo and rm, which learn "
        "from preferences in the data. gkd is not built yet.",
    )
    loss_type: str = _setting(
        "grpo",
        "How token losses become one. grpo averages over each completion first; bnpo and dapo over all "
        "tokens of the step; dr_grpo divides by completions * --max_completion_length; cispo caps the weight "
        "of a token instead of clipping it; sapo has a smooth gate instead of a clip; fipo is dapo with more "
        "weight on tokens before what is reinforced; or the name of a loss that a file of --external_plugins "
        "registers.",
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
    tau_pos: float = _setting(1.0, "--loss_type sapo: the gate's temperature for positive advantages.", gt=0)
    tau_neg: float = _setting(1.05, "--loss_type sapo: the gate's temperature for the others.", gt=0)
    fipo_decay_rate: float = _setting(
        32.0, "--loss_type fipo: tokens after which what follows counts half.", gt=0
    )
    fipo_clip_range: float = _setting(
        0.2, "--loss_type fipo: how far a token's weight may be from 1; 0: no bounds.", ge=0, le=1
    )
    fipo_clip_high_only: bool = _setting(True, "--loss_type fipo: no token's weight is below 1.")
    fipo_safety_threshold: float | None = _setting(
        4.0,
        "--loss_type fipo: ratio over which a token with a negative advantage gets no weight over 1.",
        gt=0,
    )

    advantage_estimator: Literal["grpo", "rloo", "reinforce_plus_plus"] = _setting(
        "grpo",
        "What a reward is compared with: the group's mean (grpo, reinforce_plus_plus), or the mean of the "
        "group's other rewards (rloo). With rloo, --loss_type grpo divides each completion's loss by its "
        "length; dr_grpo is the estimator of its paper. reinforce_plus_plus takes the KL of the whole "
        "completion off every token's reward, as ms-swift does; its paper takes off, at each token, the KL "
        "from there on.",
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
        "Take the KL off the reward instead of adding it to the loss. Not set: false for "
        "--advantage_estimator grpo, true for the others.",
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
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ConfigError(
                "--loss_type cispo needs --epsilon_high: it caps a token's weight at epsilon_high itself, "
                "not at 1 + epsilon_high, so no other loss's default fits; 5.0 is usual."
            )
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.loss_type != "cispo" and self.delta <= 1 + high:
            raise ConfigError(
                f"--delta {self.delta} must be over 1 + --epsilon_high = {1 + high:g}, or it would cut into "
                "the clip range."
            )
        in_reward = self.advantage_estimator != "grpo" if self.kl_in_reward is None else self.kl_in_reward
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


def check_loss_type(loss_type: str, plugins: tuple[str, ...]) -> None:
    """Without a plugin there are only the built-in losses.

    Raises:
        ConfigError: there is no such loss.
    """
    if loss_type in LOSS_TYPES or plugins:
        return
    if loss_type in NOT_BUILT:
        raise ConfigError(
            f"--loss_type {loss_type} is a loss of ms-swift that is not built yet; what there is: "
            f"{', '.join(LOSS_TYPES)}."
        )
    if loss_type == "gspo":
        raise ConfigError(
            "--loss_type gspo: GSPO is --loss_type grpo --importance_sampling_level sequence; its paper has "
            "--epsilon 3e-4 --epsilon_high 4e-4 --beta 0."
        )
    raise ConfigError(
        f"--loss_type {loss_type} is not one of: {', '.join(LOSS_TYPES)}."
        f"{did_you_mean(loss_type, LOSS_TYPES)} A loss of your own comes from a file given to "
        "--external_plugins, which calls register_loss."
    )
