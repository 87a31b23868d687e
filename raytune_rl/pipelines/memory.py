"""A run's plan with the estimate of GPU memory in it."""

from __future__ import annotations

from dataclasses import replace

from raytune_rl.config import PreferenceConfig, RLHFConfig, SFTConfig
from raytune_rl.errors import PlacementError
from raytune_rl.groups import memory_check, memory_plan, specs
from raytune_rl.groups.sizes import Groups
from raytune_rl.tracking.plan import RunPlan, Section

TrainConfig = SFTConfig | PreferenceConfig | RLHFConfig


def added(
    plan: RunPlan,
    config: TrainConfig,
    groups: Groups,
    gpu_bytes: int | None,
    *,
    max_model_len: int | None = None,
    store_bytes: int | None = None,
) -> tuple[RunPlan, PlacementError | None]:
    """The plan with the estimate, and why it cannot run, if it cannot: it is worth seeing either way.

    Args:
        plan: Without it.
        config: Of the run.
        groups: Its groups.
        gpu_bytes: Memory of the smallest GPU; None where nobody can tell.
        max_model_len: Tokens of an engine's longest sequence, where it is known.
        store_bytes: Ray's object store of all nodes together, where it is known.

    Raises:
        ModelError: A model's config cannot be read.
    """
    if not groups.on_gpu:
        return plan, None
    from raytune_rl.models.size import UnknownSizeError  # imports torch

    try:
        sizes = memory_check.measured(config, groups)
    except UnknownSizeError as error:
        return replace(plan, notices=[*plan.notices, f"GPU memory is not estimated: {error}"]), None
    problem, doubts = None, []
    if gpu_bytes is None:
        doubts = ["no node tells how much memory its GPUs have: the estimate is compared with nothing"]
    else:
        try:
            doubts = memory_check.check_memory(config, groups, sizes, gpu_bytes, max_model_len)
        except PlacementError as error:
            problem = error
    doubts += memory_check.store_doubts(config, sizes, store_bytes)
    section = _section(config, groups, sizes, gpu_bytes)
    return replace(plan, sections=[*plan.sections, section], notices=[*plan.notices, *doubts]), problem


def _section(
    config: TrainConfig, groups: Groups, sizes: memory_check.Sizes, gpu_bytes: int | None
) -> Section:
    """The estimate, a line a phase."""
    rows = memory_plan.rows_of(memory_check.device_plans(config, groups, sizes, gpu_bytes), gpu_bytes)
    rows.append(("micro-batch", f"at most {specs.max_tokens(config, groups.on_gpu):,} tokens"))
    if isinstance(config, RLHFConfig) and groups.colocated:
        why = "" if config.sleep_level is not None else ", the default here"
        rows.append(("engines asleep", f"level {specs.sleep_level(config, groups)} (--sleep_level{why})"))
    return Section("GPU memory, estimated", rows)
