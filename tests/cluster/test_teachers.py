"""Teachers on the real stack, a run or two each: `make variants`, not part of the test suite."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines import online
from raytune_rl.tiny.model import make_tiny_model
from tests.cluster.conftest import Tiny
from tests.cluster.test_online import steps
from tests.faults.runs import Outcome, assert_complete, assert_same, outcome
from tests.faults.strikes import Strike, struck

pytestmark = [pytest.mark.cluster, pytest.mark.variants, pytest.mark.timeout(600)]


def run(tiny: Tiny, output: Path, **settings: Any) -> Outcome:
    given: dict[str, Any] = {
        "model": str(tiny.untied),
        "dataset": str(tiny.data.train),
        "teacher_model": str(tiny.tied),
        "train_type": "full",
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "temperature": 0.8,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 2,
        "log_completions": True,
        "output_dir": str(output / "out"),
    }
    return outcome(online.run(RLHFConfig(**{**given, **settings})))


GKD: dict[str, Any] = {"rlhf_type": "gkd", "lmbda": 0.5, "reward_funcs": "format"}


@pytest.mark.parametrize("own", [GKD, {**GKD, "gkd_logits_topk": 20}], ids=["whole", "top 20"])
def test_a_teacher_that_vllm_serves_says_what_transformers_says(
    own: dict[str, Any], cluster: None, tiny: Tiny, tmp_path: Path
) -> None:
    by_transformers, by_vllm = (
        steps(run(tiny, tmp_path / name, **own, dataset=str(tiny.data.sft), teacher_backend=name).result)
        for name in ("transformers", "vllm")
    )
    for step, line in by_transformers.items():
        print(step, line["gkd/divergence"], by_vllm[step]["gkd/divergence"])
        assert by_vllm[step]["gkd/divergence"] == pytest.approx(line["gkd/divergence"], abs=1e-5)
        assert by_vllm[step]["loss"] == pytest.approx(line["loss"], abs=1e-5)
    assert by_vllm[1]["gkd/divergence"] > 0.01


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"rlhf_type": "gkd", "lmbda": 1, "reward_funcs": "format"}, "gkd/divergence"),
        ({"advantage_estimator": "distill"}, "teacher_kl"),
    ],
    ids=["gkd", "distill"],
)
def test_a_run_with_a_teacher_that_follows_the_policy_resumes_to_the_last_digit(
    own: dict[str, Any], told: str, cluster: None, tiny: Tiny, tmp_path: Path
) -> None:
    """Self-distillation by a hint; the teacher is a moving average of the policy."""
    rows = [json.loads(line) for line in tiny.data.train.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "hints.jsonl").write_text(
        "".join(json.dumps({**row, "teacher_prompt": row["solution"]}) + "\n" for row in rows),
        encoding="utf-8",
    )
    own = {
        **own,
        "dataset": str(tmp_path / "hints.jsonl"),
        "model": str(tiny.tied),
        "policy_workers": 2,
        "max_steps": 4,
        "teacher_sync_steps": 1,
        "teacher_mixup_alpha": 0.3,
    }
    whole = run(tiny, tmp_path, **own)
    half = whole.result.run_dir / "checkpoint-2"
    (at,) = (name for name in whole.weights if name.startswith("teacher"))
    assert hashlib.sha256((half / at).read_bytes()).hexdigest() != whole.weights[at], "it moved"
    assert all(abs(line[told]) > 1e-4 for line in steps(whole.result).values())
    resumed = run(tiny, tmp_path, **own, resume_from_checkpoint=str(half))
    assert resumed.result.run_dir == whole.result.run_dir
    assert list(whole.result.run_dir.glob("superseded-checkpoint-4-*")), "steps 3 and 4 were done again"
    assert_same(resumed, whole)


def test_of_two_served_teachers_each_has_its_rows_and_one_is_lost(
    cluster: None, tiny: Tiny, tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", hidden=128, layers=2, seed=3)
    rows = [json.loads(line) for line in tiny.data.train.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({**row, "whose": number % 2}) + "\n" for number, row in enumerate(rows)),
        encoding="utf-8",
    )
    own = {
        "dataset": str(tmp_path / "rows.jsonl"),
        "advantage_estimator": "distill",
        "teacher_model": [str(tiny.tied), str(other)],
        "teacher_column": "whose",
    }
    plain = run(tiny, tmp_path / "plain", **own)
    strike = Strike("teacher_1", 0, "advise", version=1)
    with struck(strike):
        served = run(tiny, tmp_path / "served", **own, teacher_backend="vllm")
    assert strike.struck
    assert_complete(served)
    assert any("teacher_1[0]" in str(fault) for fault in served.faults), served.faults
    for one, other_one in zip(plain.log, served.log, strict=True):
        if "teacher_kl" in one:
            assert other_one["teacher_kl"] == pytest.approx(one["teacher_kl"], abs=1e-5)
            assert abs(one["teacher_kl"]) > 0.01
