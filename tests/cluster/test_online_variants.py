"""The switches of online RL on the real stack: what they do to the loss, and that a run with them resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_rl import cli
from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines import online
from tests.cluster.conftest import Tiny
from tests.cluster.test_online import GAP, log_lines, steps

pytestmark = [pytest.mark.cluster, pytest.mark.variants, pytest.mark.timeout(400)]
# About half of a random model's completions have an odd length, so half of the groups of two have one reward.
PLUGIN = """
from raytune_rl.rewards import ORM, orms

class Odd(ORM):
    def __call__(self, completions, **kwargs):
        return [float(len(text) % 2) for text in completions]

orms["odd"] = Odd
"""
EXAMPLES = Path(__file__).parents[2] / "examples"


def config(tiny: Tiny, output: Path, **settings: Any) -> RLHFConfig:
    output.mkdir(parents=True, exist_ok=True)
    (output / "plugin.py").write_text(PLUGIN)
    small: dict[str, Any] = {
        "model": str(tiny.tied),
        "dataset": str(tiny.data.train),
        "reward_funcs": ["odd"],
        "external_plugins": [str(output / "plugin.py")],
        "train_type": "full",
        "num_generations": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "stop_words": ["w"],
        "learning_rate": 3e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "output_dir": str(output / "out"),
        "log_completions": True,
        "report_to": "none",
    }
    return RLHFConfig(**{**small, **settings})


def completions(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]


def test_dapo_with_the_kl_in_the_reward_and_an_exact_resume(
    cluster: None, tiny: Tiny, tmp_path: Path
) -> None:
    """Dynamic sampling, overlong filter, RLOO, the KL (to a reference that moves) off the reward: the logged
    completions give back the logged loss, and the second half of the run repeats itself from its checkpoint.
    """
    chosen = config(
        tiny,
        tmp_path,
        rlhf_type="dapo",
        advantage_estimator="rloo",
        beta=0.1,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        max_resample_times=2,
        rollout_importance_sampling_mode="sequence_truncate",
        val_dataset=str(tiny.data.held_out),
        eval_temperature=0.0,
        num_generations_eval=1,
        eval_steps=4,
    )
    result = online.run(chosen)
    whole, rows = steps(result), completions(result.run_dir)
    assert sorted(whole) == [1, 2, 3, 4]
    for step, line in whole.items():
        mine = [r for r in rows if r["step"] == step]
        trained = [r for r in mine if r["advantage"] is not None]
        replaced = [r for r in mine if r["advantage"] is None]
        assert len(trained) == 8
        assert len(replaced) == 2 * line["dynamic_sample/replaced_prompts"]
        assert len(mine) == 2 * line["dynamic_sample/sampled_prompts"]
        assert all(a["reward"] == b["reward"] for a, b in zip(replaced[::2], replaced[1::2], strict=True))
        if not line["dynamic_sample/filled_without_signal"]:
            assert all(a["reward"] != b["reward"] for a, b in zip(trained[::2], trained[1::2], strict=True))
        kept = [r for r in trained if r["finish_reason"] != "length"]
        assert len(kept) > 0
        expected = -sum(r["advantage"] * r["tokens"] for r in kept) / sum(r["tokens"] for r in kept)
        assert line["loss"] == pytest.approx(expected, abs=1e-4), "on-policy, every ratio is 1"
        assert line[GAP] < 1e-4
        assert line["rollout_correction/is_weight_mean"] == pytest.approx(1, abs=1e-4)
    assert {r["finish_reason"] for r in rows} == {"stop", "length"}, "stop words act, and some are cut off"
    assert sum(line["dynamic_sample/replaced_prompts"] for line in whole.values()) > 0
    assert abs(whole[1]["kl"]) < 1e-6
    assert abs(whole[4]["kl"]) > 1e-6
    assert (result.run_dir / "checkpoint-2" / "reference" / "model.safetensors").is_file()
    drawn = sum(line["dynamic_sample/sampled_prompts"] for line in whole.values())
    assert whole[4]["epoch"] == drawn / 64
    evaluated = [line for line in log_lines(result) if "eval_reward" in line]
    assert [line["eval_rewards/Odd/pass@1"] for line in evaluated] == [
        line["eval_reward"] for line in evaluated
    ]

    replaced_prompts = sum(line["dynamic_sample/replaced_prompts"] for line in whole.values())
    account = {
        "dispatched": drawn,
        "finished": 4 * 4,
        "filtered": {"one reward in the group": replaced_prompts},
        "failed": {},
        "unaccounted": 0,
        "ahead": 0,
    }
    assert drawn == 4 * 4 + replaced_prompts
    assert log_lines(result)[-1]["prompts"] == account

    again = steps(
        online.run(
            RLHFConfig(**{**chosen.args(), "resume_from_checkpoint": str(result.run_dir / "checkpoint-2")})
        )
    )
    for step in (3, 4):
        for name in ("loss", "grad_norm", "reward", "kl", "epoch", "dynamic_sample/sampled_prompts"):
            assert again[step][name] == whole[step][name], (step, name)
    assert completions(result.run_dir) == rows
    assert log_lines(result)[-1]["prompts"] == account, "a resumed run goes on counting"


def words_of(chosen: RLHFConfig) -> list[str]:
    """The command line that says the same."""
    words = []
    for name in sorted(chosen.model_fields_set):
        value = getattr(chosen, name)
        many = value if isinstance(value, tuple) else (value,)
        words += [f"--{name}", *(one if isinstance(one, str) else json.dumps(one) for one in many)]
    return words


def test_loss_and_credit_of_plugins_with_every_filter(
    cluster: None, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of `examples`, from the command line, off-policy over two ranks; entropy filter, off-policy mask
    and level act on the loss."""
    plugins = [str(EXAMPLES / "loss_plugin.py"), str(EXAMPLES / "credit_plugin.py")]
    words = words_of(
        config(
            tiny,
            tmp_path,
            external_plugins=[str(tmp_path / "plugin.py"), *plugins],
            loss_type="power",
            loss_args={"power": 2},
            advantage_estimator="median",
            advantage_args={"median_bound": 0.25},
            beta=0.0,
            num_generations=4,
            policy_workers=2,
            per_device_train_batch_size=4,
            steps_per_generation=2,
            num_iterations=2,
            importance_sampling_level="sequence_token",
            top_entropy_quantile=0.5,
            log_entropy=True,
            off_policy_sequence_mask_delta=1e-3,
            rollout_importance_sampling_mode="token_mask",
            rollout_importance_sampling_threshold=1.5,
            rollout_importance_sampling_min=0.5,
        )
    )
    assert cli.main(["rlhf", *words]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "power, from a plugin, ratio to the power of 2" in said
    assert "the reward less the median of its group, at most 0.25" in said
    (run_dir,) = (tmp_path / "out").iterdir()
    log = [json.loads(line) for line in (run_dir / "logging.jsonl").read_text().splitlines()]
    lines = {int(line["global_step/max_steps"].split("/")[0]): line for line in log if "loss" in line}
    assert sorted(lines) == [1, 2, 3, 4]
    found = {row["advantage"] for row in completions(run_dir)}
    assert found <= {-0.25, 0.0, 0.25}, "0.5 and 1 from the median are out of bounds"
    assert len(found) > 1
    for line in lines.values():
        assert line["power/ratio_max"] > 0
        assert 0 <= line["median/bounded"] <= 1
        assert "kl" not in line, "beta 0: there is no reference"
        assert 0.5 <= line["entropy_kept"] < 0.55, "the top half of the step's tokens, and ties"
        assert 0 < line["entropy/threshold"] < np.log(512)
        assert 0 < line["entropy/min"] < line["entropy/mean"] < np.log(512)
        assert line["rollout_correction/clipped_frac"] == 0
        assert np.isfinite(line["grad_norm"])
    assert lines[1]["grad_norm"] > 0, "later all that is left of a step may have drifted and be masked"
    assert lines[1]["off_policy_masked"] == 0
    assert max(line["off_policy_masked"] for line in lines.values()) > 0, "it has moved within the generation"
