"""One config class per training command, put together from the topics."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from raytune_rl.algorithms.registry import online_losses
from raytune_rl.config import deepspeed as presets
from raytune_rl.config.algorithms import compares, is_taught, loss_settings
from raytune_rl.config.asynchrony import AsyncOptions
from raytune_rl.config.batching import grpo_batch_of
from raytune_rl.config.cluster import OnlineGroupsOptions, PolicyGroupOptions
from raytune_rl.config.corrections import CorrectionOptions
from raytune_rl.config.data import DataOptions
from raytune_rl.config.experts import ExpertOptions
from raytune_rl.config.model import ModelOptions
from raytune_rl.config.ppo import PPOOptions
from raytune_rl.config.preference import PreferenceOptions
from raytune_rl.config.prefix_sharing import PrefixSharingOptions
from raytune_rl.config.rewards import RewardOptions
from raytune_rl.config.rl import RLOptions, check_names
from raytune_rl.config.rollout import RolloutOptions
from raytune_rl.config.sft import SupervisedOptions
from raytune_rl.config.teachers import TeacherOptions
from raytune_rl.config.training import TrainingOptions
from raytune_rl.config.tuner import TunerOptions
from raytune_rl.errors import ConfigError


class _TrainConfig(PolicyGroupOptions, TrainingOptions, DataOptions, TunerOptions, ModelOptions):
    SUPERVISED: ClassVar[bool] = False
    """Whether it learns to imitate the rows' own answers."""
    ONLINE: ClassVar[bool] = False
    """Whether the policy is trained on what it samples itself."""

    @property
    def packs(self) -> bool:
        """Whether the user asks for packs of rows."""
        return False

    @property
    def streams(self) -> bool:
        """Whether rows are read while training goes on."""
        return False

    @property
    def own_reference(self) -> bool:
        """Whether a reference model is loaded beside the one that is trained."""
        return False

    @model_validator(mode="after")
    def _check_given(self) -> Self:
        if not self.model:
            raise ConfigError("--model is required: the model to train, a local folder or a hub id.")
        if not (self.dataset or self.dry_run):
            raise ConfigError("--dataset is required: the training data, files, folders or hub ids.")
        if getattr(self, "prefix_sharing", None) == "true" and self.router_aux_loss_coef > 0:
            raise ConfigError(
                "--router_aux_loss_coef counts every token of every row, which --prefix_sharing true does "
                "not compute: leave out one of the two."
            )
        if self.quant_bits is not None and presets.stage(self.deepspeed) == 3:
            raise ConfigError(
                "--deepspeed with ZeRO stage 3 cuts every weight up, which weights quantised with "
                "--quant_bits do not allow: use zero2, or leave out --quant_method and --quant_bits."
            )
        return self


class SFTConfig(SupervisedOptions, _TrainConfig):
    """`raytune-rl sft`: supervised fine-tuning."""

    COMMAND: ClassVar[str] = "sft"
    SUPERVISED: ClassVar[bool] = True

    @property
    def packs(self) -> bool:
        """`packing`."""
        return self.packing

    @property
    def streams(self) -> bool:
        """`streaming`."""
        return self.streaming


class PreferenceConfig(PreferenceOptions, PrefixSharingOptions, _TrainConfig):
    """`raytune-rl rlhf --rlhf_type dpo`, and kto, orpo, cpo, simpo, rm: preferences in the data."""

    COMMAND: ClassVar[str] = "rlhf --rlhf_type dpo"


class RLHFConfig(
    OnlineGroupsOptions,
    RewardOptions,
    CorrectionOptions,
    TeacherOptions,
    ExpertOptions,
    RLOptions,
    AsyncOptions,
    RolloutOptions,
    PrefixSharingOptions,
    _TrainConfig,
):
    """`raytune-rl rlhf`: reinforcement learning."""

    COMMAND: ClassVar[str] = "rlhf"
    ONLINE: ClassVar[bool] = True

    @property
    def mini_batches(self) -> int:
        """Optimizer steps that one pass over a generation makes where no flag says its size."""
        return 1

    @property
    def teachers_alone(self) -> bool:
        """Whether rewards teach nothing."""
        return self.advantage_estimator == "distill"

    @property
    def demonstrates(self) -> bool:
        """Whether some generations are the answers of the data."""
        return self.rlhf_type == "gkd" and self.lmbda < 1

    @property
    def own_reference(self) -> bool:
        """Whether the reference of the KL is a model of its own: not if it is the policy without its adapter,
        unless the user gives it workers.
        """
        wants_reference = (
            self.reference_workers, self.gpus_per_reference_worker, self.cpus_per_reference_worker
        ) != (None, None, None)  # fmt: skip
        other = bool(self.ref_model or self.ref_adapters or self.adapters)
        return self.beta > 0 and (self.train_type == "full" or other or wants_reference)

    @model_validator(mode="after")
    def _check_online(self) -> Self:
        if self.num_generations < 2 and compares(self.advantage_estimator):
            raise ConfigError(
                f"--num_generations {self.num_generations}: GRPO compares the completions of one prompt with "
                "each "
                "other, so it needs at least 2."
            )
        if self.teachers_alone and not self.has_teachers:
            raise ConfigError("--advantage_estimator distill needs somebody to learn from: --teacher_model.")
        built_in = {loss.name: loss for loss in online_losses()}
        loss = built_in.get(self.loss_type)
        if loss is not None and is_taught(loss, loss_settings(self, loss, {})[1]):
            self._check_taught()
        if not self.reward_funcs and not self.reward_model and not self.teachers_alone:
            raise ConfigError(
                "--reward_funcs is required: name at least one, such as accuracy, or give a --reward_model; "
                "or learn from a --teacher_model alone, by --advantage_estimator distill."
            )
        check_names(self.loss_type, self.advantage_estimator, self.external_plugins)
        if self.sync_ref_model and (self.train_type != "full" or self.beta == 0):
            why = (
                "there is none with --beta 0"
                if self.beta == 0
                else "with LoRA it is the model without adapter"
            )
            raise ConfigError(f"--sync_ref_model true moves the reference, but {why}.")
        if self.sync_ref_model and self.ref_adapters:
            raise ConfigError(
                "--sync_ref_model true mixes whole weights, but --ref_adapters "
                f"{' '.join(self.ref_adapters)} are weights beside them: merge them first (raytune-rl export "
                "--merge_lora true)."
            )
        if self.teacher_sync_steps is not None and self.train_type != "full":
            raise ConfigError(
                f"--teacher_sync_steps {self.teacher_sync_steps} mixes whole weights, but --train_type "
                f"{self.train_type} trains an adapter: use --train_type full, or leave it out, and the "
                "teacher stays as it was."
            )
        if self.truncation_strategy == "right":
            raise ConfigError("--truncation_strategy right would cut off the question: use left or delete.")
        prompt, completion = self.max_length, self.max_completion_length
        max_model_len = self.vllm_max_model_len
        if max_model_len is not None and prompt is not None and prompt + completion > max_model_len:
            raise ConfigError(
                f"--vllm_max_model_len {max_model_len} cannot hold a prompt of --max_length {prompt} and a "
                "completion of "
                f"--max_completion_length {completion}: it must be at least {prompt + completion}."
            )
        self._check_lora_on_the_wire()
        self._check_offload()
        if (
            self.vllm_mode is not None
            and self.colocate is not None
            and self.colocate != (self.vllm_mode == "colocate")
        ):
            raise ConfigError(
                f"--vllm_mode {self.vllm_mode} and --colocate {str(self.colocate).lower()} say the opposite: "
                "give "
                "only one of the two."
            )
        if isinstance(self.rollout_workers, str) and (self.colocate or self.vllm_mode == "colocate"):
            raise ConfigError(
                f"--rollout_workers {self.rollout_workers}: engines that share the policy's GPUs do not come "
                "and go: give them GPUs of their own with --colocate false, or say one number."
            )
        if self.policy_workers is not None:
            grpo_batch_of(self, self.policy_workers)
        return self

    def _check_taught(self) -> None:
        if not self.has_teachers:
            raise ConfigError(f"--loss_type {self.loss_type} needs somebody to learn from: --teacher_model.")
        if len(self.teacher_model) > 1 and self.teacher_column is None:
            raise ConfigError(
                f"--loss_type {self.loss_type} takes one teacher a row: name one "
                "--teacher_model, or say whose a row is by --teacher_column."
            )
        if self.demonstrates and self.async_generate:
            raise ConfigError(
                f"--async_generate true is for completions of the policy, and with --lmbda {self.lmbda:g} "
                "some generations are answers of the data, which nobody samples: use --lmbda 1, or leave "
                "--async_generate out."
            )
        if self.demonstrates and self.teacher_column is not None:
            raise ConfigError(
                f"--lmbda {self.lmbda:g} trains on answers of the data, which have no --teacher_column: use "
                "--lmbda 1, or one teacher."
            )

    def _check_lora_on_the_wire(self) -> None:
        if self.vllm_enable_lora and self.train_type != "lora":
            raise ConfigError("--vllm_enable_lora true needs --train_type lora: there is no adapter to send.")
        if self.vllm_max_lora_rank is not None and self.vllm_max_lora_rank < self.lora_rank:
            raise ConfigError(
                f"--vllm_max_lora_rank {self.vllm_max_lora_rank} is less than --lora_rank {self.lora_rank}: "
                "the "
                "engine could not take the adapter."
            )

    def _check_offload(self) -> None:
        """DeepSpeed moves what its configuration lets it."""
        zero = presets.load(self.deepspeed).get("zero_optimization", {})
        stage = presets.stage(self.deepspeed)
        flags = [f"--{name} true" for name in ("offload_model", "offload_optimizer") if getattr(self, name)]
        if flags and stage == 0:
            raise ConfigError(f"{', '.join(flags)} needs ZeRO: --deepspeed zero2 rather than zero0.")
        if self.offload_optimizer and stage == 3:
            raise ConfigError(
                "--offload_optimizer true: DeepSpeed cannot move the optimizer's state under ZeRO stage 3. "
                "Leave it out, or use --deepspeed zero3_offload, which keeps that state on the CPU."
            )
        if self.offload_model and zero.get("offload_param", {}).get("device", "none") != "none":
            raise ConfigError(
                "--offload_model true: --deepspeed keeps the weights on the CPU already (offload_param). "
                "Leave it out."
            )


TrainConfig = SFTConfig | PreferenceConfig | RLHFConfig
"""Settings of any run that trains."""


class PPOConfig(PPOOptions, RLHFConfig):
    """`raytune-rl rlhf --rlhf_type ppo`: reinforcement learning with a critic."""

    COMMAND: ClassVar[str] = "rlhf --rlhf_type ppo"
    WITH_CRITIC: ClassVar[bool] = True

    @property
    def mini_batches(self) -> int:
        """`num_mini_batches`."""
        return self.num_mini_batches
