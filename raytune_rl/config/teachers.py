"""Teachers: frozen models whose opinion of every token the policy learns from."""

from __future__ import annotations

from functools import partial
from typing import Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_setting = partial(setting, "Teachers")
_cluster = partial(setting, "Cluster")


class TeacherOptions(Options):
    """Whom the policy learns from, and how much; names are ms-swift's where it has one."""

    teacher_model: tuple[str, ...] = _setting(
        (),
        "Frozen models to learn from, token by token (on-policy distillation): to the advantage of every "
        "token comes --teacher_kl_coef times the teacher's log-prob less the policy's. They must have the "
        "policy's vocabulary. The --model itself is one for self-distillation: with a column teacher_prompt "
        "the teacher sees that in the place of the last user turn.",
    )
    teacher_adapters: tuple[str, ...] = _setting(
        (),
        "LoRA adapters of the teacher, folders or hub ids; of one teacher only. Without --teacher_model they "
        "are put on --model.",
    )
    teacher_kl_coef: float = _setting(
        1.0, "Weight of the teachers' part of the advantage; the rewards' part has weight 1.", gt=0
    )
    teacher_weights: tuple[float, ...] = _setting(
        (), "Several teachers: the weight of each; they are divided by their sum. Not set: 1 each."
    )
    teacher_column: str | None = _setting(
        None,
        "Several teachers: column of the data that says whose a row is, by its place in --teacher_model "
        "(from 0) or as it is written there. Not set: every teacher judges every row.",
    )
    lmbda: float = _setting(
        0.5,
        "--rlhf_type gkd: probability that a generation is sampled from the policy; else it is the answers "
        "of the data.",
        ge=0,
        le=1,
    )
    gkd_logits_topk: int | None = _setting(
        None,
        "--loss_type gkd: likeliest tokens of the teacher that stand for its distribution, all others "
        "together being one more. Not set: 64, or all of a vocabulary up to 1,024.",
        ge=1,
    )
    teacher_sync_steps: int | None = _setting(
        None,
        "Self-distillation: the teacher, which is then the --model itself, moves towards the policy every so "
        "many optimizer steps. Not set: it stays as it was.",
        ge=1,
    )
    teacher_mixup_alpha: float = _setting(
        0.05,
        "--teacher_sync_steps: the policy's share in the mixture; 1: the teacher is the policy of that step.",
        gt=0,
        le=1,
    )
    teacher_quant_bits: int | None = _setting(
        None, "4: load the teachers quantised to NF4, which needs bitsandbytes. Not set: as they are."
    )
    teacher_backend: Literal["transformers", "vllm"] = _setting(
        "transformers",
        "Who computes the teachers: Transformers, as the policy, or vLLM (prompt log-probs; for texts), "
        "which spreads a large one over --gpus_per_teacher_worker GPUs of its own.",
    )
    teacher_workers: int | None = _cluster(
        None, "Copies of each teacher. Not set: chosen from what the cluster has.", ge=1
    )
    gpus_per_teacher_worker: float | None = _cluster(
        None, "GPUs of one teacher worker. Not set: chosen from what the cluster has.", ge=0
    )
    cpus_per_teacher_worker: float | None = _cluster(
        None, "CPU cores of one teacher worker. Not set: chosen from what the cluster has.", gt=0
    )

    @property
    def has_teachers(self) -> bool:
        """Whether there is anybody to learn from."""
        return bool(self.teacher_model or self.teacher_adapters)

    @model_validator(mode="after")
    def _check_teachers(self) -> Self:
        count = len(self.teacher_model)
        if self.teacher_adapters and count > 1:
            raise ConfigError(
                f"--teacher_adapters belong to one teacher, but --teacher_model names {count}: merge them "
                "into their model first (raytune-rl export --merge_lora true)."
            )
        if self.teacher_weights and len(self.teacher_weights) != count:
            raise ConfigError(
                f"--teacher_weights has {len(self.teacher_weights)} values for {count} --teacher_model: give "
                "one for each."
            )
        if any(weight <= 0 for weight in self.teacher_weights):
            raise ConfigError("--teacher_weights must be above 0: leave out a teacher that has none.")
        if self.teacher_column is not None and count < 2:
            raise ConfigError(
                f"--teacher_column {self.teacher_column} says whose a row is, but there are not several "
                "teachers: name them by --teacher_model."
            )
        if self.teacher_column is not None and self.teacher_weights:
            raise ConfigError(
                "--teacher_column gives each row to one teacher, --teacher_weights has all of them judge "
                "every row: give only one of the two."
            )
        if self.teacher_sync_steps is not None and count != 1:
            raise ConfigError(
                f"--teacher_sync_steps {self.teacher_sync_steps} moves one teacher, the policy as it was, "
                f"but there are {count}: give --model as the one --teacher_model."
            )
        if self.teacher_sync_steps is not None and (self.teacher_adapters or self.teacher_quant_bits):
            raise ConfigError(
                "--teacher_sync_steps mixes whole weights, which a teacher with --teacher_adapters or "
                "--teacher_quant_bits does not have: leave these out."
            )
        if self.teacher_quant_bits not in (None, 4):
            raise ConfigError(f"--teacher_quant_bits {self.teacher_quant_bits}: only 4 (NF4) is offered.")
        if self.teacher_backend == "vllm":
            self._check_served()
        return self

    def _check_served(self) -> None:
        if self.teacher_adapters:
            raise ConfigError(
                "--teacher_backend vllm serves whole models: merge --teacher_adapters into theirs first "
                "(raytune-rl export --merge_lora true)."
            )
        if self.teacher_quant_bits:
            raise ConfigError(
                f"--teacher_backend vllm does not quantise (--teacher_quant_bits {self.teacher_quant_bits}): "
                "leave that out, or name a --teacher_model that is stored quantised."
            )
        if self.teacher_sync_steps is not None:
            raise ConfigError(
                f"--teacher_sync_steps {self.teacher_sync_steps} moves weights that Transformers has: leave "
                "out --teacher_backend vllm."
            )
        gpus = self.gpus_per_teacher_worker or 0.0
        if gpus != int(gpus):
            raise ConfigError(
                f"--gpus_per_teacher_worker {gpus:g}: --teacher_backend vllm takes whole GPUs, over which it "
                "spreads each copy."
            )
