"""Learning from preferences on the real stack: every algorithm learns, whatever the number of ranks, and
resumes to the last digit.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raytune_rl import PreferenceConfig, run_preference
from raytune_rl.errors import DataError
from raytune_rl.pipelines.lifecycle import RunResult
from raytune_rl.tiny.preferences import PreferenceFiles, write_preferences
from raytune_rl.tiny.shapes import write_shapes
from raytune_rl.tiny.vision import make_tiny_vision_model
from tests.cluster.conftest import Tiny
from tests.pipelines.test_objective import PLUGIN

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Toy:
    """Where the tiny model and the preferences are."""

    tiny: Tiny
    files: PreferenceFiles
    output: Path

    def config(self, kind: str, **settings: Any) -> PreferenceConfig:
        single = kind == "kto"
        small: dict[str, Any] = {
            "rlhf_type": kind,
            "model": self.tiny.tied,
            "dataset": self.files.labelled if single else self.files.pairs,
            "val_dataset": self.files.held_out_labelled if single else self.files.held_out_pairs,
            "train_type": "full",
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "eval_steps": 4,
            "save_only_model": True,
            "report_to": "none",
            "output_dir": self.output,
        }
        return PreferenceConfig(**{**small, **settings})

    def run(self, kind: str, **settings: Any) -> RunResult:
        return run_preference(self.config(kind, **settings))


@pytest.fixture(scope="module")
def toy(cluster: None, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    root = tmp_path_factory.mktemp("preferences")
    return Toy(tiny, write_preferences(root / "data", train=96, held_out=16), root / "out")


def steps(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def evaluated(run: Path) -> list[str]:
    """Steps of all steps at which there was an evaluation."""
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    return [line["global_step/max_steps"] for line in lines if "eval_loss" in line]


def test_dpo_learns_the_same_on_one_rank_and_on_two_and_resumes_exactly(toy: Toy) -> None:
    """32 pairs, 16 a step: the checkpoint gone on from is the one of the first epoch's end."""
    settings: dict[str, Any] = {
        "dataset": f"{toy.files.pairs}#32",
        "rpo_alpha": 0.1,
        "save_only_model": False,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "eval_steps": None,
    }
    one = toy.run("dpo", **settings, max_tokens_per_micro_batch=800)
    before, after = one.before, one.after
    assert sorted(p.name for p in one.run_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert evaluated(one.run_dir) == ["0/4", "2/4", "4/4"]
    assert one.best_checkpoint == one.run_dir / "checkpoint-4"
    # The policy is its own reference at first: no margin, and the loss of a coin.
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert before["eval_loss"] - 0.1 * before["eval_nll_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert after["eval_rewards/margins"] > 0.05
    assert after["eval_rewards/accuracies"] > 0.8

    # 2 micro-batches on one rank, 1 on each of two; 16 pairs a step either way.
    two = toy.run("dpo", policy_workers=2, **settings | {"per_device_train_batch_size": 8})
    for mine, theirs in zip(steps(one.run_dir), steps(two.run_dir), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "nll_loss", "logps/rejected"):
            assert theirs[name] == pytest.approx(mine[name], rel=2e-3, abs=2e-5), name
    first = [steps(r.run_dir)[0] for r in (one, two)]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], abs=1e-6)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-5)

    whole = steps(one.run_dir)
    again = toy.run(
        "dpo",
        **settings,
        max_tokens_per_micro_batch=800,
        resume_from_checkpoint=str(one.run_dir / "checkpoint-2"),
    )
    assert again.run_dir == one.run_dir
    repeated = steps(one.run_dir)
    assert [line["loss"] for line in repeated] == [line["loss"] for line in whole]
    assert again.after == after
    assert evaluated(one.run_dir) == ["0/4", "2/4", "4/4"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("orpo", {"beta": 1}, marks=pytest.mark.variants),
        ("cpo", {"cpo_alpha": 0.1}),
        pytest.param("simpo", {"cpo_alpha": 0}, marks=pytest.mark.variants),
        ("rm", {"center_rewards_coefficient": 0.01}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_held_out_margin_rises(toy: Toy, kind: str, settings: dict[str, Any]) -> None:
    result = toy.run(kind, **settings)
    before, after = (metrics["eval_rewards/margins"] for metrics in (result.before, result.after))
    assert after > before + 0.05
    assert result.after["eval_loss"] < result.before["eval_loss"]


def test_a_loss_of_a_plugin_learns(toy: Toy, tmp_path: Path) -> None:
    file = tmp_path / "my_pairs.py"
    file.write_text(PLUGIN)
    result = toy.run("dpo", loss_type="my_pairs", external_plugins=file, loss_args={"power": 2})
    before, after = (metrics["eval_rewards/margins"] for metrics in (result.before, result.after))
    assert before == pytest.approx(0, abs=1e-4)
    assert after > before + 0.05
    assert result.before["eval_loss"] == pytest.approx(1, abs=1e-4)


def test_kto_with_a_reference_of_its_own(toy: Toy) -> None:
    """The policy starts away from it, and its group is gone when training begins."""
    settings = {"train_type": "lora", "learning_rate": 1e-2, "policy_workers": 2}
    result = toy.run("kto", ref_model=toy.tiny.untied, **settings)
    before, after = (metrics["eval_rewards/margins"] for metrics in (result.before, result.after))
    assert abs(result.before["eval_rewards/chosen"]) > 1e-3
    assert after > before + 0.05
    assert result.after["eval_loss"] < result.before["eval_loss"]


def test_pairs_about_pictures_under_losses_that_look_at_the_whole_step(toy: Toy, tmp_path: Path) -> None:
    """Some pairs have no picture; two ranks, so that one may meet none."""
    shapes = write_shapes(tmp_path / "shapes", train=40, held_out=8)
    wrong = {"rejected_response": "There is nothing to be seen on this picture."}
    pairs = [{**json.loads(line), **wrong} for line in shapes.sft.read_text().splitlines()]
    pairs += [{"query": "Is it red?", "response": f"It is number {n}.", **wrong} for n in range(8)]
    dataset = tmp_path / "pairs.jsonl"
    dataset.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    result = toy.run(
        "dpo",
        model=make_tiny_vision_model(tmp_path / "model"),
        dataset=dataset,
        val_dataset=(),
        split_dataset_ratio=0.2,
        policy_workers=2,
        per_device_train_batch_size=8,
        loss_type=["aot", "aot_unpaired", "bco_pair"],
        loss_weights=[1, 0.5, 0.5],
    )
    before, after = result.before, result.after
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert after["eval_rewards/margins"] > 0.05
    assert after["eval_loss"] < before["eval_loss"]


def test_bad_rows_are_named(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = toy.files.pairs.read_text().splitlines()[:4]
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        "\n".join([*rows, '{"query": "1+1", "response": "2", "rejected_response": "2"}']) + "\n"
    )
    with pytest.raises(DataError, match=r"broken.jsonl:5: the rejected answer is the same"):
        toy.run("dpo", dataset=broken)
