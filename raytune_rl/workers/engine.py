"""The one place that starts DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from raytune_rl.config.deepspeed import fill_auto

if TYPE_CHECKING:
    from raytune_rl.workers.policy import OptimizerSpec

Rate = Callable[[int], float]


def start_engine(module: torch.nn.Module, spec: OptimizerSpec) -> tuple[Any, Rate]:
    """Wraps a module in a DeepSpeed engine inside the world that torch.distributed has joined.

    Accumulation is left to the caller, who marks the last backward of a step; DeepSpeed itself is told of
    none, so that it scales nothing.

    Returns:
        The engine, and the learning rate as a function of the optimizer step (from 0).
    """
    import deepspeed

    deepspeed.init_distributed()
    optimizer = torch.optim.AdamW(
        parameter_groups(module, spec.weight_decay),
        lr=spec.learning_rate,
        betas=spec.betas,
        eps=spec.epsilon,
    )
    trainable = [p for p in module.parameters() if p.requires_grad]
    config = fill_auto(spec.deepspeed, _known(spec, trainable))
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine, learning_rate(spec)


def is_sharded(engine: Any) -> bool:
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
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(spec: OptimizerSpec) -> Rate:
    """The schedule as a pure function of the step, taken from Transformers' schedulers."""
    from transformers import get_scheduler

    placeholder = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        spec.schedule,
        placeholder,
        num_warmup_steps=spec.warmup_steps,
        num_training_steps=spec.total_steps,
        scheduler_specific_kwargs={"min_lr_rate": 0.1} if spec.schedule == "cosine_with_min_lr" else None,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: spec.learning_rate * float(factor(step))


def _known(spec: OptimizerSpec, trainable: list[torch.nn.Parameter]) -> dict[str, Any]:
    """What DeepSpeed's "auto" values come to."""
    dtype = trainable[0].dtype
    # Buckets larger than the model only cost memory.
    numel = sum(p.numel() for p in trainable)
    known: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": spec.max_grad_norm,
        "bf16.enabled": dtype == torch.bfloat16,
        "fp16.enabled": dtype == torch.float16,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    zero = spec.deepspeed.get("zero_optimization", {})
    if zero.get("stage") == 3:
        known["zero_optimization.reduce_bucket_size"] = min(numel, int(2e8))
    return known
