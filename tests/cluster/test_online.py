"""GRPO from config to checkpoint on the real stack: DeepSpeed, vLLM, reference and rewards, in Ray actors."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError, DataError, EngineMismatchError, PlacementError
from raytune_rl.groups.logprobs import ReferenceGroup
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import save_model
from raytune_rl.pipelines import online
from raytune_rl.pipelines.lifecycle import RunResult
from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.model import TunerSettings
from tests.cluster.conftest import Tiny
from tests.faults.runs import without_clocks

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
# A random model answers nothing right; it does write some digits, more in one completion than in another.
PLUGIN = """
from swift.rewards import ORM, orms

class Digits(ORM):
    def __call__(self, completions, **kwargs):
        return [sum(c.isdigit() for c in text) / 8 for text in completions]

orms["digits"] = Digits
"""
GAP = "rollout_correction/logp_abs_diff_max"


def config(tiny: Tiny, output: Path, **settings: Any) -> RLHFConfig:
    plugin = output / "plugin.py"
    plugin.parent.mkdir(parents=True, exist_ok=True)
    plugin.write_text(PLUGIN)
    small: dict[str, Any] = {
        "model": str(tiny.untied),
        "dataset": str(tiny.data.train),
        "reward_funcs": ["accuracy", "format", "digits"],
        "external_plugins": [str(plugin)],
        "train_type": "full",
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "output_dir": str(output / "out"),
        "log_completions": True,
    }
    return RLHFConfig(**{**small, **settings})


def log_lines(result: RunResult) -> list[dict[str, Any]]:
    lines = (result.run_dir / "logging.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(result: RunResult) -> dict[int, dict[str, Any]]:
    found = [line for line in log_lines(result) if "loss" in line]
    return {int(line["global_step/max_steps"].split("/")[0]): line for line in found}


def arrays_in(value: Any) -> Iterator[np.ndarray]:
    """Every array inside what the driver received."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Ragged):
        yield value.values
    elif isinstance(value, dict):
        for item in value.values():
            yield from arrays_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from arrays_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from arrays_in(getattr(value, name))


@pytest.fixture(scope="module")
def uninterrupted(cluster: None, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four steps with two policy ranks, two engines, a reference and held-out prompts; what the driver read
    is kept.
    """
    received: list[Any] = []
    plain = ray.get

    def watched(*args: Any, **kwargs: Any) -> Any:
        value = plain(*args, **kwargs)
        received.append(value)
        return value

    ray.get = watched
    try:
        chosen = config(
            tiny,
            tmp_path_factory.mktemp("run"),
            policy_workers=2,
            rollout_workers=2,
            per_device_train_batch_size=4,
            val_dataset=str(tiny.data.held_out),
            num_generations_eval=2,
            eval_steps=2,
        )
        result = online.run(chosen)
    finally:
        ray.get = plain
    return chosen, result, received


def test_it_learns_nothing_wrong_and_writes_everything_down(uninterrupted: Any) -> None:
    chosen, result, _ = uninterrupted
    assert (result.status, result.steps) == ("finished", 4)
    lines = steps(result)
    assert sorted(lines) == [1, 2, 3, 4]
    for step, line in lines.items():
        assert line[GAP] < 1e-4, "the engine samples with the policy's own weights, after real updates"
        assert line["weight_version"] == step - 1
        for name in (
            "reward",
            "reward_std",
            "kl",
            "grad_norm",
            "learning_rate",
            "completions/mean_length",
            "step_time",
        ):
            assert np.isfinite(line[name]), name
        for phase in ("generate", "reward", "reference", "train"):
            assert line[f"profiling/{phase}"] > 0
        assert {
            "rewards/MathAccuracy/mean",
            "rewards/Format/mean",
            "completions/clipped_ratio",
        } <= line.keys()
        assert line["rewards/Digits/std"] > 0
        assert line["reward_std"] > 0
    assert lines[1]["kl"] == pytest.approx(0, abs=1e-6), "the policy starts as its reference"
    assert lines[4]["kl"] > 1e-4, "and moves away from it"
    assert [line["global_step/max_steps"] for line in log_lines(result) if "eval_reward" in line] == [
        "0/4",
        "2/4",
        "4/4",
    ]

    run = result.run_dir
    assert run.name.startswith("v0-")
    assert json.loads((run / "args.json").read_text())["model"] == chosen.model
    assert (run / "images" / "train_reward.png").stat().st_size > 5_000 or list(
        (run / "images").glob("*reward*.png")
    )
    assert list((run / "runs").iterdir())
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 8
    assert {row["step"] for row in rows} == {1, 2, 3, 4}
    assert all(row["prompt"].endswith("<|im_start|>assistant\n") and row["tokens"] > 0 for row in rows)


def test_no_token_or_weight_array_reaches_the_driver(uninterrupted: Any) -> None:
    _, _, received = uninterrupted
    assert len(received) > 50, "the watch saw the run"
    arrays = [array for value in received for array in arrays_in(value)]
    assert arrays, "scalars per completion do arrive: rewards, and lengths of prompts"
    # Rewards are float64; the lengths of the prompts are the only integers: one a prompt.
    assert {str(a.dtype) for a in arrays} <= {"float64", "int64"}
    assert all(a.ndim == 1 and len(a) in (64, 8) for a in arrays if a.dtype == np.int64)
    assert all(a.size <= 32 for a in arrays if a.dtype == np.float64)


class Disturbed(online.OnlineRun):
    """Loses an engine in the middle of its sampling, and every reference and reward worker."""

    def publish(self, version: int) -> None:
        super().publish(version)
        if version == 1:
            pid = self.actors.rollout.workers.call("ping")[1]["pid"]
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
            assert isinstance(self.actors.reference, ReferenceGroup)
            scorers = self.actors.rewards._scorers  # type: ignore[attr-defined]
            for group in (self.actors.reference.workers, *(scorer.workers for scorer in scorers)):
                for actor in group._actors:
                    ray.kill(actor)


def test_stateless_workers_may_die_and_nothing_changes(
    uninterrupted: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen, result, _ = uninterrupted
    monkeypatch.setattr(online, "OnlineRun", Disturbed)
    again = online.run(RLHFConfig(**{**chosen.args(), "output_dir": str(tmp_path)}))
    output = capsys.readouterr().out
    assert re.search(r"rollout\[1\] died during '", output), output
    assert re.search(r"workers lost and replaced +4 \(2 reward, 1 reference, 1 rollout\)", output)
    whole, disturbed = steps(result), steps(again)
    counted = [line.get("lost_workers", 0) for line in disturbed.values()]
    # A reward worker is seen to be lost when it is asked, which is as groups are finished.
    assert (counted[0], sorted(counted), counted[-1]) == (0, counted, 4)
    for step, line in whole.items():
        for name in ("loss", "grad_norm", "reward", "kl", "completions/mean_length", "weight_version", GAP):
            assert disturbed[step][name] == line[name], (step, name)
    rows = [(run.run_dir / "completions.jsonl").read_text() for run in (result, again)]
    assert rows[0] == rows[1]
    account = {"dispatched": 8, "finished": 8, "filtered": {}, "failed": {}, "unaccounted": 0, "ahead": 0}
    assert log_lines(again)[-1]["prompts"] == account, "every prompt came back once"


def test_resume_is_exact_and_asynchrony_without_staleness_is_the_synchronous_loop(
    uninterrupted: Any, tiny: Tiny
) -> None:
    """From the checkpoint of step 2, in the same directory, with --async_generate true --max_staleness 0:
    steps 3 and 4 repeat the synchronous run that was never stopped, log, completions and weights.
    """
    chosen, result, _ = uninterrupted
    whole, rows_before = steps(result), (result.run_dir / "completions.jsonl").read_text()
    checkpoint = str(result.run_dir / "checkpoint-2")
    more = {"resume_from_checkpoint": checkpoint, "async_generate": True, "max_staleness": 0}
    resumed = online.run(RLHFConfig(**{**chosen.args(), **more}))
    assert resumed.run_dir == result.run_dir
    again = steps(resumed)
    assert sorted(again) == [1, 2, 3, 4]
    for step in (3, 4):
        assert without_clocks(again[step]) == without_clocks(whole[step])
    rows = (resumed.run_dir / "completions.jsonl").read_text()
    assert rows == rows_before
    assert [json.loads(row)["step"] for row in rows.splitlines()] == [
        s for s in (1, 2, 3, 4) for _ in range(8)
    ]
    (superseded,) = result.run_dir.glob("superseded-checkpoint-4-*")
    weights = [(at / "model.safetensors").read_bytes() for at in (superseded, resumed.last_checkpoint)]
    assert weights[0] == weights[1]


def test_an_engine_that_is_not_the_policy_ends_the_run(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    other = {"hf_overrides": {"rms_norm_eps": 10.0}}  # the same weights, and another function of them
    chosen = config(tiny, tmp_path, beta=0, vllm_engine_kwargs=other)
    with pytest.raises(EngineMismatchError, match=r"differ by [\d.e+]+ nats a token .*--max_logp_gap"):
        online.run(chosen)
    assert not list((tmp_path / "out").glob("*/checkpoint-*")), "nothing was trained"


def trained_adapter(tiny: Tiny, directory: Path) -> Path:
    """As an earlier run leaves it, of another rank than the flags' default."""
    tuned = apply_tuner(load_model(str(tiny.tied)).model, TunerSettings(lora_rank=24)).model
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    save_model(tuned, directory, load_tokenizer(str(tiny.tied)))
    return directory


ALONE: dict[str, Any] = {"vllm_enable_lora": True}
MERGED: dict[str, Any] = {
    "quant_method": "bnb",
    "quant_bits": 4,
    "vllm_tensor_parallel_size": 2,
    "reference_workers": 1,
    "target_modules": ("all-linear", "lm_head"),
}


@pytest.mark.parametrize(
    "settings",
    [pytest.param(ALONE, id="adapter"), pytest.param(MERGED, id="merged", marks=pytest.mark.variants)],
)
def test_lora_weights_arrive_either_way(
    cluster: None, tiny: Tiny, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """LoRA, several optimizer steps a generation and two iterations: off-policy, so old log-probs are
    kept. The adapter that travels alone is one of an earlier run. The merged one lies on a base that is
    quantised for the policy alone, and unties the head; the engine's two workers are processes that pull
    the weights themselves.
    """
    result = online.run(
        config(
            tiny,
            tmp_path,
            model=str(tiny.tied),
            train_type="lora",
            **settings,
            adapters=[str(trained_adapter(tiny, tmp_path / "start"))] if settings is ALONE else (),
            steps_per_generation=2,
            num_iterations=2,
            max_steps=8,
            save_steps=8,
            learning_rate=3e-2,
        )
    )
    lines = steps(result)
    assert len(lines) == 8
    first_of_generation = [1, 5]
    for step in first_of_generation:
        assert lines[step][GAP] < 1e-4
    assert lines[5]["weight_version"] == 1
    assert lines[1]["kl"] == pytest.approx(0, abs=1e-6), "the policy starts as its reference"
    assert lines[5]["kl"] > 1e-5, "and moves away from it"
    assert lines[1]["clip_ratio/region_mean"] == 0, "the first step of a generation is on-policy"
    ratios = [lines[s]["rollout_correction/logp_abs_diff_max"] for s in first_of_generation]
    assert max(ratios) > 0, "both sides computed them on their own"
    assert (result.last_checkpoint / "adapter_model.safetensors").is_file()  # type: ignore[operator]
    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained(result.last_checkpoint)


def test_what_does_not_fit_is_said_at_once(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"policy: 64 worker\(s\)[\s\S]*node .*: .*CPU"):
        online.run(
            config(
                tiny,
                tmp_path,
                policy_workers=64,
                cpus_per_policy_worker=1.0,
                per_device_train_batch_size=4,
                max_steps=1,
            )
        )


def test_a_bad_row_names_file_and_line_or_is_set_aside(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    good = tiny.data.train.read_text().splitlines()[:3]
    data.write_text("\n".join([good[0], '{"messages": [{"role": "user"', *good[1:]]) + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl.*2"):
        online.run(config(tiny, tmp_path / "a", dataset=str(data)))
    with pytest.raises(ConfigError, match="prompts"):
        # Set aside, the three others are too few for --generation_batch_size 16 / 4 = 4 prompts.
        online.run(
            config(tiny, tmp_path / "b", dataset=str(data), strict=False, per_device_train_batch_size=16)
        )
    quarantined = list((tmp_path / "b" / "out").glob("v0-*/quarantine.jsonl"))
    assert len(quarantined) == 1
    assert json.loads(quarantined[0].read_text())["line"] == 2
