"""The optimizer, its schedule, and what a run writes."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from raytune_rl.config import deepspeed as presets
from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_length = partial(setting, "Length and batch")
_optimizer = partial(setting, "Optimizer")
_output = partial(setting, "Output and checkpoints")

Scheduler = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "cosine_with_min_lr", "inverse_sqrt"
]
SCHEDULE_KWARGS: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "inverse_sqrt": ("timescale",),
}
"""Arguments of Transformers' schedules beside warm-up and length."""
Strategy = Literal["no", "steps", "epoch"]


class TrainingOptions(Options):
    """Length of the run, batch, optimizer, checkpoints and logs."""

    num_train_epochs: float = _length(3.0, "Times to go through the data. --max_steps goes first.", gt=0)
    max_steps: int = _length(-1, "Optimizer steps to do; -1: as --num_train_epochs says.", ge=-1)
    per_device_train_batch_size: int = _length(
        1, "Rows per policy worker and accumulation step. In GRPO it counts completions, not prompts.", ge=1
    )
    per_device_eval_batch_size: int = _length(
        1,
        "Without effect, as all held-out rows are evaluated together: --max_tokens_per_micro_batch says how "
        "many at a time.",
        ge=1,
    )
    gradient_accumulation_steps: int | None = _length(
        None,
        "Accumulation steps per optimizer step. Not set: 1 in GRPO; "
        "in SFT as many as make 16 rows, ceil(16 / (batch size * workers)).",
        ge=1,
    )
    max_tokens_per_micro_batch: int | None = _length(
        None,
        "Most tokens in one forward pass: rows are grouped by length up to this sum. It changes memory and "
        "speed, never the gradient. Not set: 2048 on CPU; on GPU 16384, or what "
        "--per_device_train_batch_size rows of --max_length have where both are given and that is less.",
        ge=1,
    )
    padding_free: bool | None = _length(
        None, "Lay the rows of a micro-batch end to end instead of padding them. Not set: where it works."
    )
    gradient_checkpointing: bool | None = _length(
        None,
        "Recompute activations in the backward pass: less memory, more time. Not set: true on GPU, "
        "false on CPU.",
    )

    learning_rate: float | None = _optimizer(
        None, "Peak learning rate. Not set: 1e-5 for --train_type full, 1e-4 for lora.", gt=0
    )
    lr_scheduler_type: Scheduler = _optimizer("cosine", "Course of the learning rate after warm-up.")
    lr_scheduler_kwargs: dict[str, float] = _optimizer(
        {},
        "More of that course, as JSON: num_cycles of cosine and cosine_with_min_lr; min_lr or min_lr_rate of "
        "cosine_with_min_lr (not set: a tenth of the peak); lr_end (not set: 1e-7) and power of polynomial; "
        "timescale of inverse_sqrt.",
    )
    warmup_ratio: float = _optimizer(
        0.0, "Share of all steps in which the learning rate rises from 0.", ge=0, lt=1
    )
    warmup_steps: int = _optimizer(0, "The same as a number of steps; give only one of the two.", ge=0)
    weight_decay: float = _optimizer(0.1, "AdamW's weight decay.", ge=0)
    adam_beta1: float = _optimizer(0.9, "Decay of the mean of gradients.", ge=0, lt=1)
    adam_beta2: float = _optimizer(0.95, "Decay of the mean of squared gradients.", ge=0, lt=1)
    adam_epsilon: float = _optimizer(1e-8, "Added to the denominator of the update.", gt=0)
    max_grad_norm: float = _optimizer(1.0, "Clip the gradient to this norm; 0: do not clip.", ge=0)
    router_aux_loss_coef: float = _optimizer(
        0.0,
        "Weight of the loss that evens out the load of the experts of a mixture, over all tokens of a step; "
        "it takes a forward pass of its own to count them. 0: none. 0.001 is usual.",
        ge=0,
    )
    seed: int = _optimizer(42, "Seed of initial weights, dropout and sampling.", ge=0)
    deepspeed: str | dict[str, Any] | None = _optimizer(
        None,
        "How DeepSpeed shards the policy: zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, the path "
        "of a JSON file, or JSON. Not set: zero2.",
    )

    output_dir: str = _output("output", "Folder of the run.")
    add_version: bool = _output(True, "Write into a new sub-folder vN-<time> of --output_dir.")
    save_strategy: Strategy = _output(
        "steps",
        "When to write a checkpoint beside the one of the last step: every --save_steps steps, or at the end "
        "of each epoch. no: none at all, neither at the end nor when the run is stopped.",
    )
    save_steps: int = _output(
        500, "Optimizer steps between checkpoints; the last step is always saved.", ge=1
    )
    save_total_limit: int | None = _output(
        None, "Keep only this many checkpoints, the newest. Not set: all.", ge=1
    )
    save_only_model: bool = _output(
        False, "Save the weights only: smaller checkpoints, which cannot be resumed."
    )
    eval_strategy: Strategy | None = _output(
        None,
        "When to evaluate, given validation data, beside before the first step and after the last: every "
        "--eval_steps steps, or at the end of each epoch. no: never. Not set: as --save_strategy.",
    )
    eval_steps: int | None = _output(
        None, "Optimizer steps between evaluations, given validation data. Not set: as --save_steps.", ge=1
    )
    logging_steps: int = _output(5, "Optimizer steps between log lines; step 1 is always logged.", ge=1)
    resume_from_checkpoint: str | None = _output(
        None, "Go on from a checkpoint folder, in its own run folder; auto: the newest whole one."
    )
    report_to: tuple[Literal["tensorboard", "wandb", "swanlab", "none"], ...] = _output(
        ("tensorboard",), "Where metrics go besides logging.jsonl; none: nowhere else."
    )

    @field_validator("save_strategy", "eval_strategy", mode="before")
    @classmethod
    def _no_in_other_words(cls, value: Any) -> Any:
        """YAML reads `no` as false."""
        return "no" if value is False or value in ("none", "None", "false", "False", "NO", "No") else value

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        if self.max_steps == 0:
            raise ConfigError(
                "--max_steps 0 would train nothing: give a number of steps, or -1 for whole epochs."
            )
        if self.warmup_ratio > 0 and self.warmup_steps > 0:
            raise ConfigError(
                f"--warmup_ratio {self.warmup_ratio} and --warmup_steps {self.warmup_steps} both set the "
                "warm-up: "
                "give only one of the two."
            )
        if 0 < self.max_steps < self.warmup_steps:
            raise ConfigError(
                f"--warmup_steps {self.warmup_steps} is more than --max_steps {self.max_steps}: the run "
                "would end "
                "before the learning rate is reached."
            )
        self._check_schedule()
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ConfigError("--report_to none stands alone: leave out none, or the others.")
        presets.check(
            self.deepspeed,
            per_device_train_batch_size=self.per_device_train_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            max_grad_norm=self.max_grad_norm,
        )
        return self

    def _check_schedule(self) -> None:
        schedule, given = self.lr_scheduler_type, self.lr_scheduler_kwargs
        known = SCHEDULE_KWARGS.get(schedule, ())
        if unknown := sorted(given.keys() - set(known)):
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise ConfigError(
                f"--lr_scheduler_kwargs {', '.join(unknown)}: --lr_scheduler_type {schedule} {takes}."
            )
        if {"min_lr", "min_lr_rate"} <= given.keys():
            raise ConfigError("--lr_scheduler_kwargs: give min_lr or min_lr_rate, not both.")
        end = given.get("lr_end", 1e-7)
        if schedule == "polynomial" and self.learning_rate is not None and self.learning_rate <= end:
            raise ConfigError(
                f"--lr_scheduler_type polynomial ends at {end:g}, which is not below --learning_rate "
                f"{self.learning_rate:g}: give --lr_scheduler_kwargs '{{\"lr_end\": 0}}'."
            )
