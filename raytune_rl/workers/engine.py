"""The one place that starts DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from raytune_rl.config.deepspeed import fill_auto
from raytune_rl.errors import ConfigError
from raytune_rl.models.sharding import numel_of, shape_of

if TYPE_CHECKING:
    from raytune_rl.protocol.train import OptimizerSpec

Rate = Callable[[int], float]


def start_engine(module: torch.nn.Module, spec: OptimizerSpec, dtype: torch.dtype) -> tuple[Any, Rate]:
    """Wraps a module in a DeepSpeed engine inside the world that torch.distributed has joined.

    Accumulation is left to the caller, who marks the last backward of a step; DeepSpeed itself is told of
    none, so that it scales nothing.

    Args:
        module: What is trained, on its device.
        spec: How.
        dtype: What the model computes in. In float16 DeepSpeed scales the loss, which gradients need there,
            adapters' too. Whatever is trained in 16 bits has float32 master weights.

    Returns:
        The engine, and the learning rate as a function of the optimizer step (from 0).
    """
    import deepspeed

    from raytune_rl.workers.native_ops import leave_out_native_ops

    leave_out_native_ops()
    if torch.cuda.is_available():
        free_memory_by_torch(deepspeed.get_accelerator())
    deepspeed.init_distributed()
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameter_groups(module, spec.weight_decay),
        lr=spec.learning_rate,
        betas=spec.betas,
        eps=spec.epsilon,
        # One pass over memory: torch's default makes fresh arrays as large as what a rank trains.
        fused=True if all(p.device.type in ("cpu", "cuda") for p in trainable) else None,
    )
    # Buckets larger than the model only cost memory.
    preferred: dict[str, Any] = {
        "zero_optimization.reduce_bucket_size": min(sum(map(numel_of, trainable)), int(2e8))
    }
    stage = spec.deepspeed.get("zero_optimization", {}).get("stage")
    known = _known(spec, trainable, dtype)
    # Else the sum over micro-batches is rounded; ZeRO-1 would take another optimizer, which cannot be moved.
    if stage in (2, 3) and (known["bf16.enabled"] or known["fp16.enabled"]):
        preferred["data_types.grad_accum_dtype"] = "fp32"
    config = fill_auto(spec.deepspeed, known, preferred if stage in (1, 2, 3) else None)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if hasattr(engine.optimizer, "fp32_groups"):
        _undo_first_step(engine.optimizer)
    return engine, learning_rate(spec)


def rounded_sums(engine: Any) -> tuple[str, ...]:
    """A line where an engine adds up micro-batches in 16 bits, so that their number changes the gradient."""
    dtype = engine.get_data_types()[1]
    if dtype == torch.float32:
        return ()
    return (
        f"gradients of micro-batches are added up in {str(dtype).removeprefix('torch.')}, and rounded: "
        "--deepspeed zero2 or zero3 adds them up in float32",
    )


def free_memory_by_torch(accelerator: Any) -> None:
    """DeepSpeed 0.19.8 takes the names in CUDA_VISIBLE_DEVICES for numbers as it asks the driver how much is
    free (`accelerator/cuda_accelerator.py`, `_get_nvml_gpu_id`): UUIDs, and parts of a GPU (MIG), have none.
    torch knows its device.
    """
    accelerator.available_memory = lambda device_index=None: torch.cuda.mem_get_info(device_index)[0]


def _undo_first_step(optimizer: Any) -> None:
    """In 16 bits without ZeRO, DeepSpeed makes AdamW's state by a step on zeros: it would count as one, and
    decays the master weights.
    """
    for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for master, weight in zip(masters, weights, strict=True):
            master.data.copy_(weight.data)
    optimizer.optimizer.state.clear()


def step(engine: Any) -> float:
    """One optimizer step on the gradient that has been accumulated.

    Returns:
        The gradient's norm over all ranks, before clipping. Where it is infinite the step was left out,
        because the gradient was not finite: weights and optimizer state are as they were.
    """
    if not (engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled()):
        # DeepSpeed neither looks at the gradient here nor tells its norm.
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in trained(engine) if p.grad is not None]))
        if not math.isfinite(norm):
            engine.zero_grad()
            return math.inf
        engine.step()
        return norm
    unfused = getattr(engine.optimizer, "loss_scale_config", None)
    scale = 1.0 if unfused is None else unfused.cur_scale  # ZeRO's norm is without the scale already
    engine.step()
    return float(engine.get_global_grad_norm()) / scale if engine.was_step_applied() else math.inf


def trained(engine: Any) -> list[torch.nn.Parameter]:
    """The parameters that the engine trains."""
    return [p for p in engine.module.parameters() if p.requires_grad]


def shards_parameters(engine: Any) -> bool:
    """Whether no rank holds a whole parameter between two forward passes (ZeRO-3)."""
    return bool(engine.zero_optimization_stage() == 3)


@contextmanager
def gathered(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Makes sharded parameters whole inside: a collective, for which every rank must name the same ones.

    Parameters that are whole already, and buffers, may be among them.
    """
    import deepspeed

    cut = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    with deepspeed.zero.GatheredParameters(cut, enabled=bool(cut)):
        yield


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms, which are vectors, do not. Empty groups are left out."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if len(shape_of(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if len(shape_of(p)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(spec: OptimizerSpec) -> Rate:
    """The schedule as a pure function of the step, taken from Transformers' schedulers.

    Raises:
        ConfigError: The schedule cannot be had from this learning rate.
    """
    from transformers import get_scheduler

    given = dict(spec.schedule_kwargs)
    if spec.schedule == "cosine_with_min_lr" and not given.keys() & {"min_lr", "min_lr_rate"}:
        given["min_lr_rate"] = 0.1
    # With the peak itself: where some schedules end is no share of it.
    placeholder = torch.optim.SGD([torch.zeros(1)], lr=spec.learning_rate)
    try:
        scheduler = get_scheduler(
            spec.schedule,
            placeholder,
            num_warmup_steps=spec.warmup_steps,
            num_training_steps=spec.total_steps,
            scheduler_specific_kwargs=given,
        )
    except ValueError as error:
        raise ConfigError(f"--lr_scheduler_type {spec.schedule}: {error}") from None
    factor = scheduler.lr_lambdas[0]
    return lambda step: spec.learning_rate * float(factor(step))


def _known(spec: OptimizerSpec, trainable: list[torch.nn.Parameter], dtype: torch.dtype) -> dict[str, Any]:
    """The numbers for DeepSpeed's "auto" values."""
    # Adapters beside a bfloat16 base are float32 and can stay so; modules trained whole are as their base.
    bf16 = dtype == torch.bfloat16 and (
        spec.deepspeed.get("bf16", {}).get("enabled") is True
        or any(p.dtype == torch.bfloat16 for p in trainable)
    )
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": spec.max_grad_norm,
        "bf16.enabled": bf16,
        "fp16.enabled": dtype == torch.float16,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
