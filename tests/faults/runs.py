"""The runs that faults are made in, and what must be equal afterwards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_rl.config import PPOConfig
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.weights import save_model
from raytune_rl.pipelines import ppo
from raytune_rl.pipelines.lifecycle import RunResult
from tests.cluster.conftest import Tiny

PLUGIN = """
from swift.rewards import ORM, orms

class Digits(ORM):
    def __call__(self, completions, **kwargs):
        return [sum(c.isdigit() for c in text) / 8 for text in completions]

orms["digits"] = Digits
"""
CLOCKS = ("time", "profiling/", "tokens_per_second", "memory", "train_speed", "train_runtime", "faults/")
"""Keys of a log line that hold readings of clocks or memory, or tell of the faults themselves."""
GRPO: dict[str, Any] = {"num_generations": 4, "max_steps": 4, "save_steps": 2, "beta": 0.0}
"""Settings of a run with policy, engine and reward functions alone, beside those of `small`."""
OTHERS = ("lost_workers", "last_model_checkpoint", "best_model_checkpoint")


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Attributes:
        result: As the run gives it.
        log: Its lines without clock readings.
        completions: Digest of all completions with their rewards and advantages.
        weights: Digests of the last checkpoint's files, by name: model, critic, optimizer, reference.
        faults: Lines of faults.jsonl.
        unaccounted: Prompts that did not come back exactly once.
    """

    result: RunResult
    log: list[dict[str, Any]]
    completions: str
    weights: dict[str, str]
    faults: list[dict[str, Any]]
    unaccounted: int


def small(tiny: Tiny, output: Path, **settings: Any) -> dict[str, Any]:
    """Settings of a run of a few seconds beside its start."""
    plugin = output / "plugin.py"
    plugin.parent.mkdir(parents=True, exist_ok=True)
    plugin.write_text(PLUGIN)
    return {
        "model": str(tiny.untied),
        "dataset": str(tiny.data.train),
        "reward_funcs": ["digits"],
        "external_plugins": [str(plugin)],
        "train_type": "full",
        "per_device_train_batch_size": 4,
        "policy_workers": 2,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "output_dir": str(output / "out"),
        "log_completions": True,
        "hang_timeout": 20.0,
        **settings,
    }


def run_ppo(tiny: Tiny, output: Path, **settings: Any) -> Outcome:
    """Four steps of PPO, policy and critic of two ranks each."""
    more = {"num_mini_batches": 1, "num_ppo_epochs": 1, "max_steps": 4, "save_steps": 2, "critic_workers": 2}
    return outcome(ppo.run(PPOConfig(**small(tiny, output, **{**more, **settings}))))


def run_all(tiny: Tiny, output: Path, **settings: Any) -> Outcome:
    """Six steps of PPO with everybody in it: two ranks each of policy and critic, a reference that moves,
    reward functions, a reward model, an engine; evaluated and saved every second step."""
    judge = output / "reward_model"
    torch.manual_seed(3)
    save_model(load_model(str(tiny.untied), scalar=True).model, judge, load_tokenizer(str(tiny.untied)))
    everybody = {
        "reward_model": [str(judge)],
        "reward_weights": [1.0, 0.1],
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 0.5,
        "val_dataset": str(tiny.data.held_out),
        "num_generations_eval": 2,
        "eval_steps": 2,
        "max_steps": 6,
        "max_restarts": 30,
    }
    return run_ppo(tiny, output, **{**everybody, **settings})


def outcome(result: RunResult) -> Outcome:
    """Reads what a run left."""
    lines = [json.loads(line) for line in (result.run_dir / "logging.jsonl").read_text().splitlines()]
    completions = (result.run_dir / "completions.jsonl").read_bytes()
    checkpoint = result.last_checkpoint
    assert checkpoint is not None
    files = sorted(checkpoint.rglob("*.safetensors"))
    faults = result.run_dir / "faults.jsonl"
    return Outcome(
        result,
        [without_clocks(line) for line in lines],
        hashlib.sha256(completions).hexdigest(),
        {str(f.relative_to(checkpoint)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
        [json.loads(line) for line in faults.read_text().splitlines()] if faults.exists() else [],
        lines[-1].get("prompts", {}).get("unaccounted", 0),
    )


def without_clocks(line: dict[str, Any]) -> dict[str, Any]:
    """A log line by what must repeat."""
    return {k: v for k, v in line.items() if k not in OTHERS and not any(clock in k for clock in CLOCKS)}


def assert_same(disturbed: Outcome, undisturbed: Outcome) -> None:
    """Bit by bit: every number of the log, every completion, every weight and moment."""
    assert_complete(disturbed)
    for one, other in zip(disturbed.log, undisturbed.log, strict=True):
        assert one == other
    assert disturbed.completions == undisturbed.completions
    assert disturbed.weights == undisturbed.weights


def assert_complete(run: Outcome) -> None:
    """It came to its end, and every prompt came back once."""
    assert run.result.status == "finished"
    assert run.result.steps == run.result.total_steps
    assert run.unaccounted == 0
