"""Asynchronous GRPO on the real stack: vLLM goes on while DeepSpeed trains, and a resumed run with it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from raytune_rl.pipelines import online
from tests.cluster.conftest import Tiny
from tests.cluster.test_online import config, log_lines, steps

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def completions(run_dir: Path) -> list[tuple[int, str]]:
    """Step and prompt of each completion that was trained on, in order."""
    lines = map(json.loads, (run_dir / "completions.jsonl").read_text().splitlines())
    return [(line["step"], line["prompt"]) for line in lines]


def test_engines_sample_ahead_and_a_resumed_run_goes_on(tiny: Tiny, cluster: None, tmp_path: Path) -> None:
    """Half of the run, then the rest from its checkpoint: each prompt once, nothing older than the bound."""
    chosen = config(tiny, tmp_path, async_generate=True, max_steps=5, save_steps=2, learning_rate=1e-4)
    whole = online.run(chosen)
    lines = steps(whole)
    assert [line["staleness/max"] for line in lines.values()] == [0, 1, 1, 1, 1]
    assert all(line["staleness/mean"] <= 1 for line in lines.values())
    assert lines[1]["rollout_correction/logp_abs_diff_max"] < 5e-3, "the first is of the weights themselves"
    assert all(0.5 < line["rollout_correction/is_weight_mean"] < 2 for line in lines.values())
    prompts = log_lines(whole)[-1]["prompts"]
    assert (prompts["dispatched"], prompts["finished"], prompts["unaccounted"]) == (10, 10, 0)

    checkpoint = whole.run_dir / "checkpoint-2"
    saved = json.loads((checkpoint / "ahead" / "groups.json").read_text())
    assert len(saved["state"]["buffer"]["asked"]) == 4
    before = completions(whole.run_dir)
    assert Counter(step for step, _ in before) == dict.fromkeys(range(1, 6), 8)
    again = online.run(type(chosen)(**{**chosen.args(), "resume_from_checkpoint": str(checkpoint)}))
    assert again.status == "finished"
    assert completions(again.run_dir) == before, "the same prompts in the same steps, each once"
    prompts = log_lines(again)[-1]["prompts"]
    assert (prompts["dispatched"], prompts["finished"], prompts["unaccounted"]) == (10, 10, 0)
