"""Every way of sampling ahead on the real stack, one run each: `make variants`, not part of the test suite.

Each run saves after every step, so its checkpoints are the weights of all versions. A plain Transformers
forward pass with the weights of a token's own version must come to the engine's log-prob of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.algorithms.credit.base import Credited
from raytune_rl.config import PPOConfig, RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.groups.trajectory_data import TrajectoryStore
from raytune_rl.pipelines import online, ppo
from raytune_rl.pipelines.collect import Collected
from raytune_rl.pipelines.generation_log import GenerationLog
from raytune_rl.pipelines.lifecycle import RunResult
from raytune_rl.tiny.shapes import write_shapes
from raytune_rl.tiny.vision import make_tiny_vision_model
from tests.cluster.conftest import Tiny
from tests.cluster.test_online import log_lines, steps
from tests.faults.runs import assert_same, outcome

pytestmark = [pytest.mark.cluster, pytest.mark.variants, pytest.mark.timeout(400)]
PLUGIN = """
import time

from swift.rewards import ORM, orms
from swift.plugin.multi_turn import MultiTurnScheduler, multi_turns

class Digits(ORM):
    def __call__(self, completions, **kwargs):
        return [sum(c.isdigit() for c in text) / 8 for text in completions]

class Odd(ORM):
    def __call__(self, completions, **kwargs):
        return [float(len(text) % 2) for text in completions]

class Slow(ORM):
    def __call__(self, completions, trainer_state, **kwargs):
        if trainer_state.global_step >= 8:
            time.sleep(7)
        return [0.0 for _ in completions]

class Echo(MultiTurnScheduler):
    def step(self, infer_request, response_choice, current_turn):
        said = infer_request.data_dict["solution"]
        infer_request.messages.append({"role": "tool", "content": f"it is {said}"})
        return {"infer_request": infer_request}

orms["digits"] = Digits
orms["odd"] = Odd
orms["slow"] = Slow
multi_turns["echo"] = Echo
"""
TEMPERATURE = 0.9
GAP = 1e-4
"""Between the engine's log-prob of a token and that of a forward pass with its version's weights, nats."""
LONG = {"max_completion_length": 64, "vllm_max_num_seqs": 4}
"""Completions that take longer than a training step, so that weights arrive while they are half written."""
LORA = {"train_type": "lora", "lora_rank": 4, "learning_rate": 1e-3}


@dataclass(frozen=True)
class Variant:
    """A run.

    Attributes:
        settings: Of it.
        staleness: Its bound.
        half_written: What must have become of half-written completions at least once.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    staleness: int = 1
    half_written: str | None = None


VARIANTS = {
    "keep": Variant({**LONG}, half_written="kept"),
    "recompute": Variant({**LONG, "rollout_in_flight": "recompute"}, half_written="recomputed"),
    "abort": Variant({**LONG, "rollout_in_flight": "abort"}, half_written="aborted"),
    "drain": Variant({**LONG, "rollout_in_flight": "drain"}),
    "drain_k2": Variant({"rollout_in_flight": "drain", "max_staleness": 2}, staleness=2),
    "adapter_keep": Variant({**LONG, **LORA}, half_written="kept"),
    "adapter_recompute": Variant(
        {**LONG, **LORA, "rollout_in_flight": "recompute"}, half_written="recomputed"
    ),
    "merged_keep": Variant({**LONG, **LORA, "vllm_enable_lora": False}, half_written="kept"),
    "merged_recompute": Variant(
        {**LONG, **LORA, "vllm_enable_lora": False, "rollout_in_flight": "recompute"},
        half_written="recomputed",
    ),
    "ppo": Variant({"rlhf_type": "ppo"}),
    "ppo_recompute": Variant(
        {**LONG, "rlhf_type": "ppo", "rollout_in_flight": "recompute"}, half_written="recomputed"
    ),
    "images": Variant({**LONG, "images": True, "freeze_vit": False}, half_written="recomputed"),
    "images_abort": Variant({**LONG, "images": True, "rollout_in_flight": "abort"}, half_written="aborted"),
    "several_turns": Variant({"multi_turn_scheduler": "echo", "max_turns": 3, **LONG}),
    "several_turns_drain": Variant(
        {"multi_turn_scheduler": "echo", "max_turns": 3, **LONG, "rollout_in_flight": "drain"}
    ),
    "dapo": Variant({"rlhf_type": "dapo", "reward_funcs": ["odd"], "num_generations": 2}),
    "two_engines": Variant({"rollout_workers": 2, **LONG, "rollout_in_flight": "recompute"}),
    "kl": Variant({"beta": 0.04}),
    "k3": Variant({"max_staleness": 3}, staleness=3),
}


def settings_of(tiny: Tiny, output: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run of six steps."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "plugin.py").write_text(PLUGIN)
    model, data = str(tiny.untied), str(tiny.data.train)
    own = dict(own)
    if own.pop("images", False):
        model = str(make_tiny_vision_model(output / "model"))
        data = str(write_shapes(output / "data", train=32).rl)
        own["root_image_dir"] = str(output / "data")
    if own.get("rlhf_type") == "ppo":
        own = {"num_mini_batches": 1, "num_ppo_epochs": 1, "critic_learning_rate": 1e-4, **own}
    else:
        own = {"num_generations": 4, "beta": 0.0, **own}
    return {
        "model": model,
        "dataset": data,
        "reward_funcs": ["digits"],
        "external_plugins": [str(output / "plugin.py")],
        "train_type": "full",
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "temperature": TEMPERATURE,
        "learning_rate": 1e-4,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 1,
        "output_dir": str(output / "out"),
        "log_completions": True,
        "report_to": "none",
        "async_generate": True,
        **own,
    }


def run(settings: Mapping[str, Any]) -> RunResult:
    if settings.get("rlhf_type") == "ppo":
        return ppo.run(PPOConfig(**settings))
    return online.run(RLHFConfig(**settings))


def completions(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]


def prompt_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a completion's prompt from others: its text, and its pictures."""
    return row["prompt"], *row.get("media", ())


@dataclass(frozen=True)
class Row:
    """A completion that was trained on; log-probs and versions of its sampled tokens."""

    tokens: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """All completions that the test's runs train on."""
    rows: list[Row] = []
    tell = GenerationLog.tell

    def told(log: GenerationLog, step: int, collected: Collected, credited: Credited) -> dict[str, float]:
        data = TrajectoryStore(60.0).read(collected.kept.batch).columns
        columns = [data[name] for name in ("tokens", "loss_mask", "logprobs", "versions")]
        for number in range(len(collected.kept.batch)):
            tokens, mask, logprobs, versions = (np.asarray(column[number]) for column in columns)
            rows.append(Row(tokens, np.flatnonzero(mask), logprobs, versions))
        return tell(log, step, collected, credited)

    monkeypatch.setattr(GenerationLog, "tell", told)
    return rows


def forward_pass(base: Path, run_dir: Path) -> Callable[[int, np.ndarray], np.ndarray]:
    """Log-probs of tokens, each behind those before it, by the weights of a version."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    @cache
    def model_of(version: int) -> Any:
        at = run_dir / f"checkpoint-{version}"
        if version and not (at / "adapter_config.json").exists():
            return AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32).eval()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return (PeftModel.from_pretrained(model, at) if version else model).eval()

    def logprobs(version: int, tokens: np.ndarray) -> np.ndarray:
        ids = torch.tensor(tokens[None].astype(np.int64))
        with torch.no_grad():
            logits = model_of(version)(ids).logits[0, :-1].double() / TEMPERATURE
        picked = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0]
        return np.concatenate([[0.0], picked.numpy()])

    return logprobs


def gaps(rows: Sequence[Row], base: Path, run_dir: Path) -> dict[bool, list[float]]:
    """Of each completion the largest gap; by whether weights arrived while it was half written."""
    logprobs = forward_pass(base, run_dir)
    found: dict[bool, list[float]] = {False: [], True: []}
    for row in rows:
        own, gap = np.unique(row.versions), 0.0
        for version in own.tolist():
            expected = logprobs(version, row.tokens)[row.sampled]
            gap = max(gap, float(np.abs(expected - row.logprobs)[row.versions == version].max()))
        found[len(own) > 1].append(gap)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_a_way_of_sampling_ahead(
    name: str, cluster: None, tiny: Tiny, tmp_path: Path, trained: list[Row]
) -> None:
    """Each prompt once, nothing older than the bound, each token's log-prob that of its version."""
    variant = VARIANTS[name]
    settings = settings_of(tiny, tmp_path, variant.settings)
    result = run(settings)
    assert (result.status, result.steps) == ("finished", 6)
    lines, prompts = steps(result), log_lines(result)[-1]["prompts"]
    print(name, prompts)
    for step, line in lines.items():
        shown = ("staleness/", "in_flight/", "idle/", "rollout_correction/", "loss", "grad_norm", "fleet/")
        print(step, {k: v for k, v in line.items() if k.startswith(shown)})
    assert all(line["staleness/max"] <= variant.staleness for line in lines.values())
    assert max(line["staleness/max"] for line in lines.values()) == variant.staleness
    assert all(np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"]) for line in lines.values())
    if variant.half_written:
        assert sum(line[f"in_flight/{variant.half_written}"] for line in lines.values()) > 0

    group = settings.get("num_generations", 1)
    rows = completions(result.run_dir)
    kept = [row for row in rows if row["advantage"] is not None]
    assert Counter(row["step"] for row in kept) == dict.fromkeys(range(1, 7), 8)
    assert prompts["unaccounted"] == 0
    assert prompts["finished"] == 6 * 8 // group
    assert prompts["dispatched"] == len(rows) // group
    assert not prompts["failed"]
    if name != "dapo" and not settings.get("multi_turn_scheduler"):
        assert set(Counter(map(prompt_of, rows)).values()) == {group}, "each prompt of the epoch once"

    if not settings.get("root_image_dir"):
        of = gaps(trained, Path(settings["model"]), result.run_dir)
        for mixed, found in of.items():
            versions = "several versions" if mixed else "one version"
            print(name, f"{len(found)} completions of {versions}, largest gap {max(found, default=0):.1e}")
        assert max(of[False], default=0) < GAP
        in_flight = settings.get("rollout_in_flight", "keep")
        if in_flight in ("drain", "abort"):
            assert not of[True]
        if in_flight == "recompute":
            assert max(of[True], default=0) < GAP
        if variant.half_written == "kept":
            assert len(of[True]) > 0
            assert max(of[True]) < 1, "a cache of the old weights: near, and not the same"


def test_without_staleness_it_is_the_synchronous_loop(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    """Two engines, two ranks, a KL to the reference: log, completions, weights and moments are equal."""
    outcomes = []
    for name, own in (("ahead", {"max_staleness": 0}), ("synchronous", {"async_generate": False})):
        more = {"max_steps": 4, "beta": 0.04, "policy_workers": 2, "rollout_workers": 2}
        settings = settings_of(tiny, tmp_path / name, {**more, "per_device_train_batch_size": 4, **own})
        outcomes.append(outcome(run(settings)))
    assert_same(*outcomes)


REFUSED = {
    "demonstrations": (
        {"rlhf_type": "gkd", "lmbda": 0.5, "teacher_model": "self"},
        "--async_generate true is for completions of the policy",
    ),
    "images_keep": (
        {"images": True, "rollout_in_flight": "keep"},
        "--rollout_in_flight keep: half-written .* Write --rollout_in_flight recompute",
    ),
    "least_above_most": ({"rollout_workers": "2:1"}, "the least comes first, the most behind it: 1:2"),
    "negative": ({"max_staleness": -1}, "max_staleness"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    name: str, cluster: None, tiny: Tiny, tmp_path: Path
) -> None:
    own, sentence = REFUSED[name]
    if own.get("teacher_model"):
        own = {**own, "teacher_model": [str(tiny.untied)]}
    with pytest.raises(ConfigError, match=sentence) as refused:
        run(settings_of(tiny, tmp_path, own))
    print(refused.value)
    assert not list((tmp_path / "out").glob("*/checkpoint-*"))
