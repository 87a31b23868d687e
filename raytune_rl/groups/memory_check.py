"""A run's memory plan: from its config and its groups to an estimate for each GPU, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from raytune_rl.config import PPOConfig, PreferenceConfig, RLHFConfig, SFTConfig, deepspeed, resolved
from raytune_rl.errors import PlacementError
from raytune_rl.groups import memory_plan, specs, teacher_specs
from raytune_rl.groups.lora_sync import publish_mode
from raytune_rl.groups.memory_plan import GIB, DevicePlan, Engine, Process, Training
from raytune_rl.groups.sizes import Groups, teacher_groups
from raytune_rl.protocol.model import ModelSize, ModelSpec, TunerSettings
from raytune_rl.protocol.rollout import GPU_SHARE

TrainConfig = SFTConfig | PreferenceConfig | RLHFConfig

SAMPLING, TRAINING, JUDGING = "sampling", "training the policy", "reward models"
AWAKE = (SAMPLING, JUDGING)
"""Phases in which engines that share GPUs are awake."""
UNKNOWN_DEVICE = 80 * GIB
"""Taken for an engine's share where nobody knows the GPU."""


@dataclass(frozen=True)
class Sizes:
    """How large the models of a run are.

    Attributes:
        policy: With what is trained.
        reference, critic: Where they are there.
        reward_models: One after the other.
        teachers: Each a group of its own.
    """

    policy: ModelSize
    reference: ModelSize | None = None
    critic: ModelSize | None = None
    reward_models: tuple[ModelSize, ...] = ()
    teachers: tuple[ModelSize, ...] = ()


def measured(config: TrainConfig, groups: Groups) -> Sizes:
    """The sizes of the models that a run loads. Only their configs are read.

    Raises:
        ModelError: One cannot be read.
    """
    from raytune_rl.models.size import size_of  # imports torch, which a driver without GPUs can do without

    policy = specs.model_spec(config, groups.on_gpu)
    tuner = specs.tuner(config, config.lora_dropout)
    reference = critic = None
    if "reference" in groups:
        other = getattr(config, "ref_model", None) or policy.path
        reference = size_of(replace(policy, path=other))
    judges: tuple[ModelSize, ...] = ()
    teachers: tuple[ModelSize, ...] = ()
    if isinstance(config, RLHFConfig):
        judges = tuple(size_of(replace(policy, path=path), scalar=True) for path in config.reward_model)
        if config.has_teachers:
            teachers = tuple(size_of(spec) for spec in teacher_specs.loaded(config, policy))
    if "critic" in groups:
        start = resolved.critic_start(cast(PPOConfig, config)) or policy.path
        critic = size_of(_based(replace(policy, path=start)), tuner, scalar=True)
    return Sizes(size_of(policy, _for_size(tuner)), reference, critic, judges, teachers)


def _based(spec: ModelSpec) -> ModelSpec:
    from raytune_rl.workers.reward_model import with_base

    return replace(with_base(replace(spec, adapters=())), adapters=())


def _for_size(tuner: TunerSettings) -> TunerSettings:
    return replace(tuner, init_weights="true")  # whatever the adapter starts from, it is as large


def training_of(config: TrainConfig, groups: Groups, name: str = "policy") -> Training:
    """How a group of ranks trains, as far as memory is concerned."""
    zero = deepspeed.load(config.deepspeed).get("zero_optimization", {})
    on_cpu = [
        zero.get(part, {}).get("device", "none") != "none" for part in ("offload_optimizer", "offload_param")
    ]
    shared = groups.colocated and isinstance(config, RLHFConfig)
    checkpointing = config.gradient_checkpointing
    return Training(
        ranks=groups[name].workers,
        stage=deepspeed.stage(config.deepspeed),
        tokens=specs.max_tokens(config, groups.on_gpu),
        bytes_each=_weight_bytes(config, groups.on_gpu),
        quant_bits=config.quant_bits,
        checkpointing=groups.on_gpu if checkpointing is None else checkpointing,
        cpu_optimizer=on_cpu[0],
        cpu_weights=on_cpu[1],
        offload_model=shared and getattr(config, "offload_model", False),
        offload_optimizer=shared and getattr(config, "offload_optimizer", False),
        logits=name == "policy",
        narrow_adapters=specs.dtype(config, groups.on_gpu) in ("bfloat16", "bf16")
        and deepspeed.stage(config.deepspeed) < 3
        and not config.use_dora,
    )


def _weight_bytes(config: TrainConfig, on_gpu: bool) -> int:
    return 4 if specs.dtype(config, on_gpu) in ("float32", "fp32") else 2


def device_plans(
    config: TrainConfig, groups: Groups, sizes: Sizes, device_bytes: int | None
) -> list[DevicePlan]:
    """The memory plan of a GPU: one plan for all where groups share them, else one a group."""
    how = training_of(config, groups)
    processes = [memory_plan.trainer("policy", TRAINING, sizes.policy, how)]
    if isinstance(config, RLHFConfig):
        engine = Engine(
            share=specs.gpu_share(config, groups),
            device_bytes=device_bytes or UNKNOWN_DEVICE,
            tensor_parallel=config.vllm_tensor_parallel_size,
            bytes_each=how.bytes_each,
            sleep_level=specs.sleep_level(config, groups),
            on_one_gpu=_beside(groups, "rollout"),
        )
        processes.insert(0, memory_plan.engine("rollout", SAMPLING, sizes.policy, engine))
    if sizes.reference is not None:
        processes.append(_scorer("reference", "reference log-probs", (sizes.reference,), how, groups))
    for number, size in enumerate(sizes.teachers):
        processes.append(_teacher(cast(RLHFConfig, config), number, size, how, groups, device_bytes))
    if sizes.critic is not None:
        critic = replace(training_of(config, groups, "critic"), quant_bits=None)
        processes.append(memory_plan.trainer("critic", "training the critic", sizes.critic, critic))
    if sizes.reward_models:
        processes.append(_scorer("reward_model", JUDGING, sizes.reward_models, how, groups))
    if groups.colocated:
        return [DevicePlan(tuple(processes))]
    return [DevicePlan((process,)) for process in processes]


def _scorer(name: str, phase: str, models: Sequence[ModelSize], how: Training, groups: Groups) -> Process:
    largest = max(models, key=lambda size: size.parameters)
    whole = replace(largest, parameters=sum(size.parameters for size in models))
    scored = memory_plan.scorer(name, phase, whole, replace(how, logits=name != "reward_model"))
    return replace(scored, on_one_gpu=_beside(groups, name))


def _teacher(
    config: RLHFConfig, number: int, size: ModelSize, how: Training, groups: Groups, device_bytes: int | None
) -> Process:
    name, phase = teacher_groups(config)[number], "teacher log-probs"
    if config.teacher_backend != "vllm":
        return _scorer(name, phase, (size,), how, groups)
    gpus = teacher_specs.gpus_of_one(groups, name)
    served = Engine(GPU_SHARE, device_bytes or UNKNOWN_DEVICE, gpus, how.bytes_each)
    return memory_plan.engine(name, phase, size, served)


def _beside(groups: Groups, name: str) -> int:
    return -(-groups[name].workers // groups["policy"].workers) if groups.colocated else 1


# -- whether it fits -----------------------------------------------------------------------------------------


def check_memory(
    config: TrainConfig, groups: Groups, sizes: Sizes, device_bytes: int, max_model_len: int | None = None
) -> list[str]:
    """Compares the plan with a GPU's memory.

    Args:
        config: Of the run.
        groups: Its groups.
        sizes: Of its models.
        device_bytes: Memory of the smallest GPU.
        max_model_len: Tokens of an engine's longest sequence, where it is known.

    Returns:
        Sentences for the user: what is likely to be short.

    Raises:
        PlacementError: What is allocated by count alone is more than there is.
    """
    if isinstance(config, RLHFConfig):
        _check_engine(config, groups, sizes.policy, device_bytes, max_model_len)
    doubts = []
    for plan in device_plans(config, groups, sizes, device_bytes):
        for phase in plan.phases:
            needs, sure = plan.total(phase), plan.total(phase, counted_only=True)
            if needs <= device_bytes:
                continue
            sentence = _short(plan, phase, needs, device_bytes) + _try(config, groups, phase)
            if sure > device_bytes:
                raise PlacementError(sentence)
            doubts.append(f"this may run out of GPU memory: {sentence}")
    return doubts


def store_doubts(config: TrainConfig, sizes: Sizes, store_bytes: int | None) -> list[str]:
    """A sentence if two versions of whole weights, the one served and the one that comes, are more than Ray's
    object store holds: it then writes them to disk at every publication. With `--weight_delta` the one served
    may have a difference of half its size beside it.

    Args:
        config: Of the run.
        sizes: Of its models.
        store_bytes: The object store of all nodes together; None where nobody can tell.
    """
    if not isinstance(config, RLHFConfig) or store_bytes is None or publish_mode(config) == "adapter":
        return []
    versions = 2.5 if config.weight_delta else 2
    needed = versions * sizes.policy.parameters * _weight_bytes(config, on_gpu=True)
    if needed <= store_bytes:
        return []
    return [
        f"{versions:g} versions of the policy's weights take {needed / GIB:.1f} GiB of Ray's object store "
        f"and it has {store_bytes / GIB:.1f}: each publication goes through a disk. A larger store (`ray "
        "start --object-store-memory`, /dev/shm of a container) or --train_type lora helps"
    ]


def _short(plan: DevicePlan, phase: str, needs: int, device_bytes: int) -> str:
    group_bytes = {group: sum(parts.values()) for group, parts in plan.held(phase).items()}
    works = next(process.group for process in plan.processes if process.phase == phase)
    beside = " and ".join(
        f"{size / GIB:.0f} GiB of {group}" for group, size in group_bytes.items() if group != works and size
    )
    return (
        f"{phase} needs about {group_bytes[works] / GIB:.0f} GiB of a GPU"
        f"{f' beside {beside}' if beside else ''}, {needs / GIB:.0f} together: {device_bytes / GIB:.0f} "
        "are there. "
    )


def _try(config: TrainConfig, groups: Groups, phase: str) -> str:
    flags = remedies(config, groups, phase)
    return f"Set {', or '.join(flags)}." if flags else "Use more or larger GPUs."


def remedies(config: TrainConfig, groups: Groups, phase: str) -> list[str]:
    """Flags that lower memory in a phase, the cheapest first; only those that are not set so yet."""
    zero = deepspeed.stage(config.deepspeed)
    ranks = groups["policy"].workers
    tokens = specs.max_tokens(config, groups.on_gpu)
    flags = []
    if isinstance(config, RLHFConfig) and groups.colocated:
        level = specs.sleep_level(config, groups)
        if phase not in AWAKE and level == 0:
            flags.append("--sleep_level 2" if config.train_type == "full" else "--sleep_level 1")
        if phase in AWAKE:
            if not config.offload_model and zero:
                flags.append("--offload_model true")
            if not config.offload_optimizer and zero in (1, 2):
                flags.append("--offload_optimizer true")
            share = specs.gpu_share(config, groups)
            if share > 0.25:
                flags.append(f"--vllm_gpu_memory_utilization {max(share - 0.15, 0.2):.2f}")
    if phase not in AWAKE:
        if config.gradient_checkpointing is False:
            flags.append("--gradient_checkpointing true")
        if tokens > 2048:
            flags.append(f"--max_tokens_per_micro_batch {max(tokens // 4, 2048)}")
        if ranks > 1 and zero < 3 and config.train_type == "full":
            flags.append("--deepspeed zero3")
        if "offload" not in str(config.deepspeed):
            flags.append(
                "--deepspeed zero3_offload" if ranks > 1 and zero == 3 else "--deepspeed zero2_offload"
            )
        if config.train_type == "full":
            flags.append("--train_type lora")
        elif config.quant_bits is None and zero < 3:
            flags.append("--quant_method bnb --quant_bits 4")
    if isinstance(config, RLHFConfig) and groups.colocated:
        flags.append("--colocate false")
    return flags


def _check_engine(
    config: RLHFConfig, groups: Groups, size: ModelSize, device_bytes: int, max_model_len: int | None
) -> None:
    """An engine that has no room for one sequence does not start.

    Raises:
        PlacementError: It has none.
    """
    share, parallel = specs.gpu_share(config, groups), config.vllm_tensor_parallel_size
    given: Any = int(share * device_bytes)
    weights = size.parameters * (4 if specs.dtype(config, groups.on_gpu) == "float32" else 2) // parallel
    cache = memory_plan.cache_bytes(size, max_model_len or config.max_completion_length, parallel)
    if weights + cache <= given:
        return
    more = min(0.95, (weights + cache + memory_plan.ENGINE_WORKING) / device_bytes)
    raise PlacementError(
        f"an engine gets {given / GIB:.0f} GiB ({share:.0%} of a GPU with {device_bytes / GIB:.0f}), but its "
        f"weights take {weights / GIB:.1f} and the cache of one sequence {cache / GIB:.1f}: set "
        f"--vllm_gpu_memory_utilization {more:.2f}, or --vllm_max_model_len lower, or --colocate false with "
        "--vllm_tensor_parallel_size 2."
    )
