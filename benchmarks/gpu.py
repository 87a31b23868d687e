"""What one GPU does with a policy and with an engine: tokens a second, MFU, and memory by phase.

The policy is the product's own: its tuner, scorer, DeepSpeed engine, offload and publishing, on a random
Qwen2 of a real one's shape, in one process and without a cluster. The engine is the product's vLLM engine
with its arguments for GPUs, on a small random model. Nothing is downloaded.

  python benchmarks/gpu.py                         1.5B, LoRA, 16,384 tokens a micro-batch
  python benchmarks/gpu.py --shape 7b --train_type full --tokens 8192
  python benchmarks/gpu.py --shape tiny --tokens 256 --no_engine      on a CPU, to see that it runs

Memory is what the allocator gives out at most in a phase (on a CPU: what the process has), GiB; of "offload"
what is left then. MFU leaves out what gradient checkpointing computes again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import flops  # noqa: E402 - found once the root is on the path
from benchmarks.table import machine, median, render  # noqa: E402

_FIELDS = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    name: dict(zip(_FIELDS, values, strict=True))
    for name, values in {
        "tiny": (64, 2, 128, 4, 2, 512, True),
        "1.5b": (1536, 28, 8960, 12, 2, 151936, True),
        "7b": (3584, 28, 18944, 28, 4, 152064, False),
    }.items()
}
"""Of Qwen2.5, but for the first."""
GIB = 2**30


@dataclass(frozen=True)
class Settings:
    """A policy to be measured.

    Attributes:
        shape: Of `SHAPES`.
        train_type: "lora" or "full".
        tokens: Of a micro-batch.
        row: Tokens of one row.
        steps: Optimizer steps.
        narrow: Adapters are in 16 bits.
        mask: Padding is masked, as on a CPU.
        deepspeed: A preset.
        chunk: Tokens a pass through the head; None: the product's choice.
    """

    shape: str = "1.5b"
    train_type: Literal["full", "lora"] = "lora"
    tokens: int = 16384
    row: int = 1024
    steps: int = 3
    narrow: bool = True
    mask: bool = False
    deepspeed: str = "zero2"
    chunk: int | None = None


@dataclass
class Found:
    """What was measured: by phase seconds, CPU-seconds and memory, GiB; and what the steps gave."""

    device: str
    operations: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what is done inside."""
        reset_peak()
        started, cpu = time.perf_counter(), time.process_time()
        yield
        synchronise()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)
        self.memory[name] = max(self.memory.get(name, 0.0), peak())


def device() -> Any:
    """The GPU, or the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronise() -> None:
    """Waits for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Begins a new phase of the allocator's books."""
    import torch

    synchronise()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    """Most memory of the phase, GiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def held() -> float:
    """Memory that tensors take now, GiB."""
    import torch

    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else peak()


class Policy:
    """A policy as a rank builds it; see `workers.trainer`."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from torch import distributed
        from transformers import AutoModelForCausalLM, Qwen2Config

        from raytune_rl.config.deepspeed import for_engine
        from raytune_rl.models.load import enable_gradient_checkpointing
        from raytune_rl.models.scorer import TokenScorer
        from raytune_rl.models.tuner import apply_tuner, narrow_adapters
        from raytune_rl.models.weights import WeightExporter, whole
        from raytune_rl.protocol.model import TunerSettings
        from raytune_rl.protocol.train import OptimizerSpec
        from raytune_rl.workers.engine import start_engine
        from raytune_rl.workers.offload import Offload
        from raytune_rl.workers.publishing import Publisher

        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        if device().type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        backend = "nccl" if device().type == "cuda" else "gloo"
        if not distributed.is_initialized():
            distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        self.settings = settings
        self.found = Found(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU")
        config = Qwen2Config(**SHAPES[settings.shape], max_position_embeddings=32768)
        torch.manual_seed(0)
        with self.found.phase("load"), device():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tuned = apply_tuner(model, TunerSettings(tuner_type=settings.train_type, lora_dropout=0.0)).model
        if settings.narrow:
            narrow_adapters(tuned, torch.bfloat16)
        enable_gradient_checkpointing(tuned)
        self.scorer = TokenScorer(tuned, settings.chunk)
        self.scorer.masks_padding = settings.mask
        exporter = WeightExporter(self.scorer, "adapter" if settings.train_type == "lora" else "full")
        optimizer = OptimizerSpec(
            1e-4, "constant", 0, 99, (0.9, 0.95), 1e-8, 0.1, 1.0, for_engine(settings.deepspeed)
        )
        with self.found.phase("DeepSpeed"):
            self.engine, _ = start_engine(self.scorer, optimizer, torch.bfloat16)
        self.offload = Offload(self.engine)
        self.publisher = Publisher(exporter, whole, 0, 1)
        self.publisher.index()
        rows = max(1, settings.tokens // settings.row)
        self.batch = self._rows(rows, settings.row, config.vocab_size)
        shape = flops.Shape.of(config)
        lengths = [settings.row] * rows
        self.found.operations = flops.step(
            shape, lengths, rows * (settings.row - 1), frozen=settings.train_type == "lora"
        )

    def _rows(self, rows: int, length: int, vocabulary: int) -> dict[str, Any]:
        """Random rows of one length: the arguments of the scorer."""
        import torch

        ids = torch.randint(0, vocabulary, (rows, length), device=device())
        places = torch.arange(rows * length, device=device()).view(rows, length)
        return {
            "input_ids": ids,
            "position_ids": torch.arange(length, device=device()).expand(rows, length),
            "attention_mask": torch.ones_like(ids),
            "predict_index": places[:, :-1].reshape(-1),
            "targets": ids[:, 1:].reshape(-1),
        }

    def train(self) -> None:
        """Some steps."""
        self.engine.train()
        for _ in range(self.settings.steps):
            with self.found.phase("forward and backward"):
                loss = -self.engine(**self.batch).logprobs.mean()
                self.engine.backward(loss, scale_wrt_gas=False)
            with self.found.phase("optimizer"):
                self.engine.step()
            self.found.losses.append(loss.item())

    def score(self) -> None:
        """Log-probs without a gradient."""
        import torch

        self.engine.eval()
        with self.found.phase("log-probs"), torch.no_grad():
            scored = self.engine(**self.batch).logprobs
        self.found.logprobs = scored.float().cpu().tolist()

    def publish(self, times: int = 2) -> list[Any]:
        """Copies what travels to the host, as the object store gets it; the first time makes the memory."""
        buckets: list[Any] = []
        for _ in range(times):
            with self.found.phase("publish"):
                _, *buckets = self.publisher.publish()
        return buckets

    def away_and_back(self) -> float:
        """Gives weights and optimizer state to the host and takes them back; returns what stayed, GiB."""
        with self.found.phase("offload"):
            self.offload.away(weights=True, optimizer=True)
        left = held()
        with self.found.phase("reload"):
            self.offload.back()
        return left


def measure(settings: Settings) -> Found:
    """A policy's figures."""
    policy = Policy(settings)
    policy.train()
    policy.score()
    policy.publish()
    left = policy.away_and_back()
    policy.found.memory["offload"] = left
    return policy.found


def sample(completions: int = 512, tokens: int = 256, layers: int = 8) -> tuple[float, float, float]:
    """Seconds of an engine's start, of its second generation, and the tokens of that."""
    import ray

    from raytune_rl.protocol.rollout import EngineSpec, Sampling
    from raytune_rl.tiny.model import make_tiny_model
    from raytune_rl.workers.engine_prompt import Ask, EnginePrompt, Sampled
    from raytune_rl.workers.rollout import rollout_env

    os.environ |= rollout_env(os.cpu_count() or 1, 1, device().type == "cuda")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    on_gpu = device().type == "cuda"
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_model(Path(directory) / "model", hidden=512 if on_gpu else 256, layers=layers)
        spec = EngineSpec(
            str(model), "bfloat16" if on_gpu else "float32", 1024, None, 60.0, gpu_memory_utilization=0.5,
            kv_cache_bytes=None if on_gpu else 2**28, enforce_eager=not on_gpu,
        )  # fmt: skip
        from raytune_rl.workers.vllm_engine import VllmEngine

        started = time.perf_counter()
        engine = VllmEngine(spec)
        start = time.perf_counter() - started
        import numpy as np

        ids = np.arange(3, 35, dtype=np.int32)
        sampling = Sampling(1.0, tokens)
        asks = [Ask(EnginePrompt(ids, ids), seed, sampling, tokens) for seed in range(completions)]
        for _ in range(2):
            began = time.perf_counter()
            sampled: list[Sampled] = []
            engine.add(asks)
            while len(sampled) < completions:
                sampled += [one for _, one in engine.step() if isinstance(one, Sampled)]
            seconds = time.perf_counter() - began
    ray.shutdown()
    return start, seconds, float(sum(len(one.tokens) for one in sampled))


def rows_of(found: Found, settings: Settings) -> list[list[str]]:
    """The table: a phase a line."""
    rows = []
    for name, seconds in found.seconds.items():
        later = median(seconds[1:] or seconds)  # the first of several makes memory and kernels
        tokens, used = "", ""
        if name in ("forward and backward", "log-probs"):
            tokens = f"{max(1, settings.tokens // settings.row) * settings.row / later:,.0f}"
        if name == "forward and backward" and found.operations:
            share = flops.mfu(found.operations, later, found.device)
            used = f"{found.operations / later / 1e12:.2f}" + (f" ({share:.0%})" if share else "")
        cpu = median(found.cpu[name][1:] or found.cpu[name])
        rows.append([name, f"{later:.3f}", f"{cpu:.3f}", f"{found.memory[name]:.2f}", tokens, used])
    return rows


HEADER = ("phase", "seconds", "CPU-s", "GiB", "tokens/s", "TFLOP/s (MFU)")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, help="default: 1.5b on a GPU, tiny on a CPU")
    parser.add_argument("--train_type", choices=("lora", "full"), default="lora")
    parser.add_argument("--tokens", type=int, help="of a micro-batch; default: 16384, or 256 on a CPU")
    parser.add_argument("--row", type=int, help="tokens of one row; default: 1024, or 64 on a CPU")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--deepspeed", default="zero2")
    parser.add_argument(
        "--wide_adapters", action="store_true", help="adapters in float32, as PEFT makes them"
    )
    parser.add_argument("--mask", action="store_true", help="mask the padding")
    parser.add_argument("--no_engine", action="store_true", help="without vLLM")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(argv)


def main() -> int:
    """Prints the table."""
    given = parse()
    on_gpu = device().type == "cuda"
    settings = Settings(
        given.shape or ("1.5b" if on_gpu else "tiny"), given.train_type,
        given.tokens or (16384 if on_gpu else 256), given.row or (1024 if on_gpu else 64), given.steps,
        not given.wide_adapters, given.mask, given.deepspeed,
    )  # fmt: skip
    found = measure(settings)
    print(f"{settings.shape}, {settings.train_type}, {settings.tokens:,} tokens, {found.device}")
    print(render(HEADER, rows_of(found, settings), given.markdown))
    if not given.no_engine:
        # On a CPU only to see that it runs.
        start, seconds, tokens = sample() if on_gpu else sample(16, 16, 2)
        speed = f"{tokens:,.0f} tokens in {seconds:.2f} s, {tokens / seconds:,.0f}/s"
        print(f"engine: started in {start:.1f} s; {speed}")
    print(machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
