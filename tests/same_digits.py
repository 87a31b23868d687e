"""Does a change of the code change a digit? Records what fixed runs give, and compares two records.

    python tests/same_digits.py record before.json        # in the tree before the change
    python tests/same_digits.py record after.json         # in the tree after it
    python tests/same_digits.py compare before.json after.json

A record holds, run by run, every log line without its clock readings, every completion with its rewards and
advantages, and a digest of the final weights. The runs are tiny, on the real stack: SFT (full; LoRA, packed),
DPO, KTO, GRPO with and without KL, DAPO with refill, PPO, GRPO on images, several turns, adapter sync and
two ranks with a resume. `--only NAME ...` records some of them; `compare` then compares those.

Not part of the test suite: it takes ten minutes, and within one tree there is nothing to compare.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

CLOCKS = (
    "step_time",
    "profiling/",
    "tokens_per_second",
    "memory(GiB)",
    "elapsed_time",
    "remaining_time",
    "train_speed",
    "train_runtime",
)
"""Beginnings of the log's keys that hold clock or memory readings."""
PATHS = ("last_model_checkpoint", "best_model_checkpoint")
"""Keys of the log that name files."""

PLUGIN = """
from swift.plugin import ORM, orms
from swift.plugin.multi_turn import MultiTurnScheduler, multi_turns

class Odd(ORM):
    def __call__(self, completions, **kwargs):
        return [float(len(text) % 2) for text in completions]

class Length(ORM):
    def __call__(self, completions, **kwargs):
        return [len(text) % 7 / 7 for text in completions]

class Echo(MultiTurnScheduler):
    def step(self, infer_request, response_choice, current_turn):
        said = infer_request.data_dict["solution"]
        infer_request.messages.append({"role": "tool", "content": f"it is {said}"})
        return {"infer_request": infer_request}

orms["odd"] = Odd
orms["length"] = Length
multi_turns["echo"] = Echo
"""


class Parts:
    """Models and data, made once in a folder."""

    def __init__(self, root: Path) -> None:
        from raytune_rl.tiny.arithmetic import write_dataset
        from raytune_rl.tiny.model import make_tiny_model
        from raytune_rl.tiny.preferences import write_preferences
        from raytune_rl.tiny.shapes import write_shapes
        from raytune_rl.tiny.vision import make_tiny_vision_model

        self.root = root
        self.plugin = root / "plugin.py"
        self.plugin.write_text(PLUGIN)
        self.tied = make_tiny_model(root / "tied", tied=True, hidden=128, layers=2)
        self.untied = make_tiny_model(root / "untied", tied=False, hidden=128, layers=2)
        self.vision = make_tiny_vision_model(root / "vision")
        self.data = write_dataset(root / "data", train=64, held_out=8, sft=64)
        self.pairs = write_preferences(root / "pairs", train=32, held_out=8)
        self.shapes = write_shapes(root / "shapes", train=32, held_out=8)

    def offline(self, **settings: Any) -> dict[str, Any]:
        """Three steps of a run over prepared rows."""
        common = {
            "model": str(self.tied),
            "train_type": "full",
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": 3,
            "learning_rate": 1e-3,
        }
        return {**common, **settings}

    def online(self, **settings: Any) -> dict[str, Any]:
        """Three steps of an online run."""
        common = {
            "model": str(self.tied),
            "dataset": str(self.data.train),
            "train_type": "full",
            "reward_funcs": ["odd", "length"],
            "external_plugins": [str(self.plugin)],
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "max_completion_length": 16,
            "stop_words": ["w"],
            "learning_rate": 3e-3,
            "max_steps": 3,
            "beta": 0.0,
            "log_completions": True,
        }
        return {**common, **settings}


def runs(parts: Parts) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Name -> (function of the package, class of its settings, settings)."""
    online = parts.online
    sft = str(parts.data.sft)
    return {
        "sft_full": (
            "run_sft",
            "SFTConfig",
            parts.offline(dataset=sft, val_dataset=str(parts.data.sft), eval_steps=3),
        ),
        "sft_lora_packed": (
            "run_sft",
            "SFTConfig",
            parts.offline(
                dataset=sft, train_type="lora", packing=True, max_length=256, per_device_train_batch_size=2
            ),
        ),
        "dpo": (
            "run_preference",
            "PreferenceConfig",
            parts.offline(dataset=str(parts.pairs.pairs), rlhf_type="dpo"),
        ),
        "kto": (
            "run_preference",
            "PreferenceConfig",
            parts.offline(dataset=str(parts.pairs.labelled), rlhf_type="kto"),
        ),
        "grpo": ("run_rlhf", "RLHFConfig", online(val_dataset=str(parts.data.held_out), eval_steps=2)),
        "grpo_kl_two_ranks_resumed": (
            "run_rlhf",
            "RLHFConfig",
            online(
                beta=0.04,
                policy_workers=2,
                per_device_train_batch_size=4,
                steps_per_generation=2,
                num_iterations=2,
                max_steps=8,
                save_steps=4,
                log_entropy=True,
                top_entropy_quantile=0.5,
            ),
        ),
        "grpo_gdpo": ("run_rlhf", "RLHFConfig", online(scale_rewards="gdpo")),
        "dapo_refill": (
            "run_rlhf",
            "RLHFConfig",
            online(
                rlhf_type="dapo",
                reward_funcs=["odd"],
                num_generations=2,
                per_device_train_batch_size=8,
                advantage_estimator="rloo",
                beta=0.1,
                max_resample_times=2,
            ),
        ),
        "ppo": (
            "run_ppo",
            "PPOConfig",
            online(rlhf_type="ppo", num_generations=1, beta=0.05, kl_coef=0.05),
        ),
        "grpo_lora_adapter": (
            "run_rlhf",
            "RLHFConfig",
            online(train_type="lora", model=str(parts.untied), beta=0.04),
        ),
        "grpo_images": (
            "run_rlhf",
            "RLHFConfig",
            online(model=str(parts.vision), dataset=str(parts.shapes.rl), freeze_vit=False),
        ),
        "grpo_several_turns": ("run_rlhf", "RLHFConfig", online(multi_turn_scheduler="echo", max_turns=2)),
    }


def without_clocks(line: Mapping[str, Any]) -> dict[str, Any]:
    """A log line without what no two runs share."""
    kept = {key: value for key, value in line.items() if not key.startswith(CLOCKS) and key not in PATHS}
    return {
        key: value
        for key, value in kept.items()
        if not key.startswith("eval_") or not key.endswith("runtime")
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def weights_digest(checkpoint: Path) -> str:
    """SHA-256 over names, shapes and bytes of all tensors of the checkpoint's model, critic and adapter."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    for path in sorted(checkpoint.rglob("*.safetensors")):
        if "optimizer" in path.parts:
            continue
        with safe_open(path, "pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                digest.update(
                    f"{path.relative_to(checkpoint)} {name} {tuple(tensor.shape)} {tensor.dtype}".encode()
                )
                digest.update(tensor.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def record_of(
    root: Path, function: str, kind: str, settings: dict[str, Any], resumed: bool
) -> dict[str, Any]:
    """Runs it, and gives what it left."""
    import raytune_rl

    fixed = {"output_dir": str(root), "report_to": "none", "logging_steps": 1, "seed": 42}
    make: Callable[..., Any] = getattr(raytune_rl, kind)
    run: Callable[..., Any] = getattr(raytune_rl, function)
    result = run(make(**fixed, **settings))
    if resumed:
        first = result.run_dir / f"checkpoint-{settings['save_steps']}"
        result = run(make(**fixed, **settings, resume_from_checkpoint=str(first)))
    assert result.last_checkpoint is not None
    completions = lines_of(result.run_dir / "completions.jsonl")
    return {
        "log": [without_clocks(line) for line in lines_of(result.run_dir / "logging.jsonl")],
        "completions": [{k: v for k, v in row.items() if k != "media"} for row in completions],
        "weights": weights_digest(result.last_checkpoint),
    }


def record(path: Path, only: list[str]) -> None:
    """Runs everything on one Ray cluster of this process and writes the record, run by run."""
    import ray

    from tests.local_ray import start_ray

    start_ray()
    known = json.loads(path.read_text()) if path.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, (function, kind, settings) in runs(Parts(root)).items():
            if (only and name not in only) or name in known:
                continue
            known[name] = record_of(root / name, function, kind, settings, name.endswith("resumed"))
            path.write_text(json.dumps(known, indent=1))
            print(
                f"recorded {name}: {len(known[name]['log'])} lines, weights {known[name]['weights'][:12]}",
                flush=True,
            )
    ray.shutdown()


def differences(before: Any, after: Any, where: str) -> Iterator[str]:
    """Every place at which two records are not equal to the last digit."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            if key not in before or key not in after:
                yield f"{where}/{key}: only {'before' if key in before else 'after'}"
            else:
                yield from differences(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{where}: {len(before)} entries before, {len(after)} after"
        for number, (one, other) in enumerate(zip(before, after, strict=False)):
            yield from differences(one, other, f"{where}[{number}]")
    elif before != after and not (before != before and after != after):
        yield f"{where}: {before!r} before, {after!r} after"


def compare(before: Path, after: Path) -> int:
    """Prints what differs; 0 if nothing does in the runs that both records have."""
    one, other = json.loads(before.read_text()), json.loads(after.read_text())
    bad = 0
    for name in [name for name in one if name in other]:
        found = list(differences(one[name], other[name], name))
        print(f"{name}: {'equal' if not found else f'{len(found)} differences'}")
        for line in found[:12]:
            print(f"  {line}")
        bad += bool(found)
    for name in sorted(one.keys() ^ other.keys()):
        print(f"{name}: only in one of the two records")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument("--only", nargs="*", default=[])
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.before, given.after)
    record(given.file, given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
