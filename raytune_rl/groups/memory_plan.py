"""How much memory of a GPU each group takes in each phase, by arithmetic.

Exact in what is allocated by count (weights, master weights, optimizer state, gradients, the engine's share),
rough in what kernels and allocators take (activations, CUDA contexts): a plan that does not fit without the
rough part cannot run, one that does not fit with it may. Sources: DeepSpeed `runtime/zero/stage_1_and_2.py`
and `stage3.py`, vLLM `v1/worker/gpu_worker.py`, and Transformers' decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytune_rl.protocol.model import ModelSize

GIB = 2**30
CONTEXT = int(0.6 * GIB)
"""A process's CUDA context, cuBLAS workspaces among it."""
COMMUNICATOR = int(0.3 * GIB)
"""NCCL's buffers of a rank that is not alone."""
LOGIT_BUFFERS = 4 * 2**26 * 4
"""Four float32 buffers of a chunk of logits; see `models.logprobs.CHUNK_LOGITS`."""
ENGINE_WORKING = int(1.5 * GIB)
"""An engine's activations and CUDA graphs."""
ENGINE_ASLEEP = int(1.0 * GIB)
"""Memory that stays of an engine that sleeps, beside its context: CUDA graphs and workspaces."""
BUCKET = int(2e8)
"""Most elements of DeepSpeed's gradient bucket here; see `workers.engine`."""
LIVE = int(1e9)
"""Most parameters that ZeRO-3 holds whole at a time (`stage3_max_live_parameters`)."""
ROUGH = frozenset({"activations", "images", "logits", "CUDA context", "working memory"})
"""Parts that are no counts."""

Parts = Mapping[str, int]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        ranks: Of the world.
        stage: Of ZeRO.
        tokens: Of a micro-batch.
        bytes_each: Of a weight and an activation: 2 or 4.
        quant_bits: Of the frozen base, or None.
        checkpointing: Layers are recomputed in the backward.
        cpu_optimizer: ZeRO keeps master weights and optimizer state on the CPU.
        cpu_weights: ZeRO-3 keeps the weights on the CPU.
        offload_model, offload_optimizer: What goes to the CPU while others need the GPU.
        logits: There is a head over the vocabulary.
        narrow_adapters: They are in 16 bits as their base is, not in float32.
    """

    ranks: int
    stage: int
    tokens: int
    bytes_each: int = 2
    quant_bits: int | None = None
    checkpointing: bool = True
    cpu_optimizer: bool = False
    cpu_weights: bool = False
    offload_model: bool = False
    offload_optimizer: bool = False
    logits: bool = True
    narrow_adapters: bool = False

    def adapter_bytes(self) -> int:
        """Of an adapter's parameter."""
        return self.bytes_each if self.narrow_adapters else 4


@dataclass(frozen=True)
class Process:
    """One worker on a GPU.

    Attributes:
        group: Its role.
        phase: In which it works.
        busy: What it holds then.
        idle: What it holds while others work.
        on_one_gpu: How many such processes share the GPU.
        samples: It works while the engines are awake and what is offloaded is away.
        away: What it holds while others sample and score; None: as idle.
    """

    group: str
    phase: str
    busy: Parts
    idle: Parts
    on_one_gpu: int = 1
    samples: bool = False
    away: Parts | None = None

    def held(self, phase: str, sampling: bool) -> Parts:
        """What it holds in a phase, in which engines are awake or not."""
        if self.phase == phase:
            return self.busy
        return self.away if sampling and self.away is not None else self.idle


@dataclass(frozen=True)
class DevicePlan:
    """The processes of one GPU."""

    processes: tuple[Process, ...]

    @property
    def phases(self) -> tuple[str, ...]:
        """In the order of the processes."""
        return tuple(dict.fromkeys(process.phase for process in self.processes))

    @property
    def groups(self) -> tuple[str, ...]:
        """Who is there."""
        return tuple(process.group for process in self.processes)

    def held(self, phase: str) -> dict[str, dict[str, int]]:
        """Bytes by group and part in a phase."""
        sampling = any(p.samples for p in self.processes if p.phase == phase)
        return {
            p.group: {what: count * p.on_one_gpu for what, count in p.held(phase, sampling).items() if count}
            for p in self.processes
        }

    def total(self, phase: str, *, counted_only: bool = False) -> int:
        """Bytes in a phase, with or without the rough parts."""
        return sum(
            count
            for parts in self.held(phase).values()
            for what, count in parts.items()
            if not (counted_only and what in ROUGH)
        )

    @property
    def peak(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.total)


# -- processes -----------------------------------------------------------------------------------------------


def trainer(group: str, phase: str, size: ModelSize, how: Training) -> Process:
    """A rank that trains."""
    of_world = how.ranks if how.stage >= 1 else 1
    # Adapters beside the base are float32, and DeepSpeed's ZeRO keeps a flat copy of them all the same.
    masters = size.trained * 4 // of_world if how.stage >= 1 or size.trained_16_bit else 0
    state = {"master weights": masters, "optimizer": size.trained * 8 // of_world}
    if how.cpu_optimizer:
        state = {}
    weights = {"weights": _weights(size, how)}
    context = {"CUDA context": _context(how.ranks)}
    grads = _gradients(size, how)
    # The step makes one array in float32 of its share of the gradient.
    step = 0 if how.cpu_optimizer else 4 * size.trained // of_world
    backward = {
        "gradients": grads,
        "activations": activations(size, how),
        "images": tower_activations(size, how),
        "logits": min(LOGIT_BUFFERS, 16 * how.tokens * size.vocabulary) if how.logits else 0,
    }
    stepping = {"gradients": grads + step}
    work = max(backward, stepping, key=lambda parts: sum(parts.values()))
    away = {} if how.offload_model else dict(weights)
    away |= {} if how.offload_optimizer else state
    idle = {**weights, **state, **context}
    return Process(group, phase, {**weights, **state, **work, **context}, idle, away={**away, **context})


def scorer(group: str, phase: str, size: ModelSize, how: Training, models: int = 1) -> Process:
    """A worker that only runs models forward: a reference, whose weights move as the policy's do, or a reward
    model (without `how.logits`), which scores while the engines are awake.
    """
    weights = {"weights": models * size.parameters * how.bytes_each}
    context = {"CUDA context": CONTEXT}
    work = {
        "activations": how.tokens * _layer_bytes(size, how.bytes_each, adapter=False),
        "images": tower_activations(size, how, backward=False),
        "logits": LOGIT_BUFFERS // 4 if how.logits else 0,
    }
    away = {} if how.offload_model and how.logits else weights
    return Process(
        group,
        phase,
        {**weights, **work, **context},
        {**weights, **context},
        samples=not how.logits,
        away={**away, **context},
    )


@dataclass(frozen=True)
class Engine:
    """How an engine takes memory.

    Attributes:
        share: Of the GPU's memory (`gpu_memory_utilization`).
        device_bytes: The GPU's memory.
        tensor_parallel: GPUs that it is spread over.
        bytes_each: Of a weight.
        sleep_level: 0 stays.
        on_one_gpu: Engines there.
        max_model_len: Tokens of the longest sequence, 0 if not known yet.
    """

    share: float
    device_bytes: int
    tensor_parallel: int = 1
    bytes_each: int = 2
    sleep_level: int = 0
    on_one_gpu: int = 1
    max_model_len: int = 0


def engine(group: str, phase: str, size: ModelSize, how: Engine) -> Process:
    """An inference engine: it takes its share, whatever its weights leave of that is key-value cache."""
    weights = size.parameters * how.bytes_each // how.tensor_parallel
    left = max(int(how.share * how.device_bytes) - weights - ENGINE_WORKING, 0)
    busy = {"weights": weights, "working memory": ENGINE_WORKING, "KV cache": left, "CUDA context": CONTEXT}
    idle = busy
    if how.sleep_level:
        idle = {"working memory": ENGINE_ASLEEP, "CUDA context": CONTEXT}
    return Process(group, phase, busy, idle, how.on_one_gpu, samples=True, away=busy)


def cache_bytes(size: ModelSize, tokens: int, tensor_parallel: int = 1) -> int:
    """Key-value cache of so many tokens in 16 bits, a GPU (vLLM `FullAttentionSpec.page_size_bytes`)."""
    return 2 * tokens * size.layers * size.kv_width // tensor_parallel


# -- parts ---------------------------------------------------------------------------------------------------


def _weights(size: ModelSize, how: Training) -> int:
    if how.quant_bits:
        # Double quantisation: the scales take 0.127 bits a value (Dettmers et al. 2023).
        base = int(size.linear * (how.quant_bits + 0.127) / 8)
        # PEFT turns the rest of a quantised model to float32, and DeepSpeed back where adapters are narrow.
        base += (size.parameters - size.linear) * how.adapter_bytes()
    else:
        base = size.parameters * how.bytes_each
    adapter = (size.trained - size.trained_16_bit) * how.adapter_bytes()
    if how.stage < 3:
        return base + adapter
    live = min(LIVE, size.parameters) * how.bytes_each
    return (0 if how.cpu_weights else (base + adapter) // how.ranks) + min(live, base + adapter)


def _gradients(size: ModelSize, how: Training) -> int:
    bits16 = size.trained_16_bit * how.bytes_each
    whole = bits16 + (size.trained - size.trained_16_bit) * how.adapter_bytes()
    if how.stage < 2:
        return whole
    bucket = whole * min(BUCKET, size.trained) // max(size.trained, 1)
    share = 0 if how.cpu_optimizer else size.trained * 4 // how.ranks  # a sum in float32
    return min(bucket + share, whole + share)


def activations(size: ModelSize, how: Training) -> int:
    """Memory that a forward pass keeps for its backward, and that the backward makes on its way."""
    wide = size.trained > size.trained_16_bit and not how.narrow_adapters
    layer = _layer_bytes(size, how.bytes_each, adapter=wide)
    if not how.checkpointing:
        return how.tokens * layer * size.layers
    return how.tokens * (size.layers * size.hidden * how.bytes_each + layer)


def tower_activations(size: ModelSize, how: Training, *, backward: bool = True) -> int:
    """What the images of a micro-batch take in the tower, if all of its tokens were of images. A tower that
    is not trained keeps nothing for a backward: one layer at a time is there.
    """
    tower = size.tower
    if tower is None:
        return 0
    layer = (12 * tower.hidden + 5 * tower.intermediate) * how.bytes_each
    patches = int(how.tokens * tower.patches)
    if not (backward and tower.trained):
        return patches * layer
    kept = tower.hidden * how.bytes_each if how.checkpointing else layer
    return patches * (kept * tower.layers + layer)


def _layer_bytes(size: ModelSize, bytes_each: int, *, adapter: bool) -> int:
    """One decoder layer, a token: with flash attention or sdpa, so that no scores are kept.

    About twelve vectors of the hidden width (two norms in float32, queries, keys, values, what attention
    gives and its projection, two residuals) and five of the inner width (gate, up, product, gradients).
    LoRA in float32 keeps a float32 copy of the input of each of seven linear layers.
    """
    plain = 12 * size.hidden * bytes_each + 5 * size.intermediate * bytes_each
    return plain + (6 * size.hidden + 2 * size.intermediate) * 4 if adapter else plain


def _context(ranks: int) -> int:
    return CONTEXT + (COMMUNICATOR if ranks > 1 else 0)


# -- in words ------------------------------------------------------------------------------------------------


def rows_of(plans: Sequence[DevicePlan], device_bytes: int | None) -> list[tuple[str, str]]:
    """The plan's lines: a phase of a GPU each, the parts of what works then, and what the others hold."""
    rows = []
    for plan in plans:
        for phase in plan.phases:
            of = f" of {device_bytes / GIB:.0f}" if device_bytes else ""
            rows.append((phase, f"{plan.total(phase) / GIB:.1f}{of} GiB: {_by_group(plan, phase)}"))
    return rows


def _by_group(plan: DevicePlan, phase: str) -> str:
    told = []
    for process in plan.processes:
        parts = plan.held(phase)[process.group]
        size = sum(parts.values()) / GIB
        if process.phase != phase:
            told.append(f"{process.group} waiting {size:.1f}")
            continue
        detail = ", ".join(f"{what} {count / GIB:.1f}" for what, count in parts.items() if count > GIB / 20)
        told.append(f"{process.group} {size:.1f} ({detail})")
    return "; ".join(told)
