"""GRPO over conversations of several turns on the real stack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines import online
from tests.cluster.conftest import Tiny
from tests.cluster.test_online import GAP, steps

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
# Stop words end the turns of a model that has not learnt to; one conversation in a while meets a broken tool.
PLUGIN = """
from swift.plugin import ORM, orms
from swift.plugin.multi_turn import MultiTurnScheduler, multi_turns

class Echo(MultiTurnScheduler):
    async def on_trajectory_start(self, requests):
        for request in requests:
            if request.uuid.endswith("-2"):
                request.messages[-1]["content"] = "please, " + request.messages[-1]["content"]

    def on_turn_end(self, infer_request, response_choice, current_turn):
        return {"rollout_infos": {"turns": current_turn}}

    def step(self, infer_request, response_choice, current_turn):
        if infer_request.uuid == "0-1":
            raise OSError("the tool is broken")
        said = infer_request.data_dict["solution"]
        infer_request.messages.append({"role": "tool", "content": f"it is {said}"})
        return {"infer_request": infer_request, "rollout_infos": {"calls": current_turn}}

multi_turns["echo"] = Echo

class Calls(ORM):
    def __call__(self, completions, messages, rollout_infos, num_turns, solution, **kwargs):
        for said, turns, tried, gold in zip(completions, messages, num_turns, solution, strict=True):
            assert turns[-1]["content"] == said
            assert sum(m["role"] == "assistant" for m in turns) == tried
            assert all(m["content"] == f"it is {gold}" for m in turns if m["role"] == "tool")
        assert [info["turns"] for info in rollout_infos] == num_turns
        return [info.get("calls", 0) + len(said) / 64 for info, said in zip(rollout_infos, completions)]

orms["calls"] = Calls
"""


def config(tiny: Tiny, output: Path, scheduler: str) -> RLHFConfig:
    (output / "plugin.py").write_text(PLUGIN)
    return RLHFConfig(
        model=str(tiny.tied),
        dataset=str(tiny.data.train),
        reward_funcs=("calls",),
        external_plugins=(str(output / "plugin.py"),),
        multi_turn_scheduler=scheduler,
        max_turns=3,
        train_type="full",
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=96,
        vllm_max_model_len=160,
        stop_words=tuple("aeiot"),
        learning_rate=3e-3,
        max_steps=2,
        logging_steps=1,
        output_dir=str(output / "out"),
        log_completions=True,
        report_to=("none",),
    )


def test_only_sampled_tokens_are_trained_on_and_both_sides_agree_on_them(
    cluster: None, tiny: Tiny, tmp_path: Path
) -> None:
    result = online.run(config(tiny, tmp_path, "echo"))
    lines = (result.run_dir / "completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for step, line in steps(result).items():
        mine = [row for row in rows if row["step"] == step]
        assert line[GAP] < 1e-4, "log-probs behind the tool's tokens, of vLLM and of the policy"
        assert line["num_turns"] == pytest.approx(sum(r["num_turns"] for r in mine) / len(mine))
        assert line["num_turns"] > 1.5
        assert line["scheduler_failures"] == 1
    assert {row["num_turns"] for row in rows} >= {1, 3}
    asked = [row["messages"][0]["content"] for row in rows]
    assert sum(text.startswith("please, ") for text in asked) == len(rows) / 4
    for row in rows:
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert row["completion"] == said[-1]
        assert len(said) == row["num_turns"]
        assert row["tokens"] <= 96
    summary = json.loads((result.run_dir / "checkpoint-2" / "trainer_state.json").read_text())
    assert summary["reward_failures"] == {"--multi_turn_scheduler: OSError": 2}


def test_a_wrong_name_ends_the_run_before_it_starts(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--multi_turn_scheduler eco is not registered. Did you mean echo"):
        online.run(config(tiny, tmp_path, "eco"))
    assert not (tmp_path / "out").exists()
