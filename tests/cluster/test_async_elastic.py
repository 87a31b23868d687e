"""Real engines that come and go while a run goes on, and runs that sample ahead and are killed: part of
`make variants`, not of the test suite.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray

from raytune_rl.groups.members import RolloutMember
from raytune_rl.pipelines.lifecycle import RunResult
from tests.cluster.conftest import Tiny
from tests.cluster.test_async_variants import LONG, completions, prompt_of, run, settings_of
from tests.cluster.test_online import GAP, log_lines, steps

pytestmark = [pytest.mark.cluster, pytest.mark.variants, pytest.mark.timeout(550)]
STEPS = 12
ELASTIC = {
    **LONG,
    "max_completion_length": 160,
    "rollout_workers": "1:2",
    "rollout_grow_after": 1.0,
    "rollout_shrink_after": 4.0,
    "max_staleness": 3,
    "max_steps": STEPS,
    "save_steps": STEPS,
    "reward_funcs": ["digits", "slow"],
}
"""Four generations of eight completions are ahead, of which an engine takes twelve completions at a time.
From step 8 on the rewards take so long that the engines idle."""


def assert_each_prompt_once(run_dir: Path, last_line: dict[str, Any], all_steps: int, group: int) -> None:
    """Eight completions a step, no prompt twice, all accounted for."""
    rows = completions(run_dir)
    assert Counter(row["step"] for row in rows) == dict.fromkeys(range(1, all_steps + 1), 8)
    assert set(Counter(map(prompt_of, rows)).values()) == {group}
    prompts = last_line["prompts"]
    total = all_steps * 8 // group
    assert (prompts["dispatched"], prompts["finished"], prompts["unaccounted"]) == (total, total, 0)
    assert not prompts["failed"]


def assert_grew_and_shrank(result_dir: Path, lines: dict[int, dict[str, Any]]) -> None:
    shown = {
        step: {k: v for k, v in line.items() if k.startswith(("fleet/", "staleness/max"))}
        for step, line in lines.items()
    }
    print(*shown.items(), sep="\n")
    members = [line["fleet/members"] for line in lines.values()]
    assert (members[0], max(members)) == (1, 2)
    last = list(lines.values())[-1]
    assert last["fleet/joined"] >= 2
    assert last["fleet/lost"] == 0
    assert last["fleet/left"] >= 1, "one was given back"
    assert last["fleet/members"] == 1


def test_a_fleet_grows_while_prompts_wait_and_shrinks_when_they_do_not(
    cluster: None, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()
    pulled: Counter[str] = Counter()
    run_group, pull = RolloutMember.run_group, RolloutMember.pull

    def seen(member: RolloutMember, *args: Any) -> None:
        asked[member.name] += 1
        run_group(member, *args)

    def seen_pull(member: RolloutMember, *args: Any) -> None:
        pulled[member.name] += 1
        pull(member, *args)

    monkeypatch.setattr(RolloutMember, "run_group", seen)
    monkeypatch.setattr(RolloutMember, "pull", seen_pull)
    result = run(settings_of(tiny, tmp_path, ELASTIC))
    print("prompts by engine", dict(asked), "pulls", dict(pulled))
    lines = steps(result)
    assert_grew_and_shrank(result.run_dir, lines)
    assert_each_prompt_once(result.run_dir, log_lines(result)[-1], STEPS, 4)
    assert len(asked) >= 2, "the new one was asked, too"
    assert min(pulled.values()) >= 1
    assert all(line["staleness/max"] <= 3 for line in lines.values())


@pytest.mark.parametrize("deltas", [False, True])
def test_an_engine_comes_with_a_node_that_joins(
    cluster: None, tiny: Tiny, tmp_path: Path, deltas: bool
) -> None:
    """With differences of weights, it takes an older version and the difference to it from the other node."""
    settings = settings_of(tiny, tmp_path, ELASTIC)
    if deltas:
        settings |= {"weight_delta": True, "torch_dtype": "bfloat16", "learning_rate": 1e-6}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    program = [sys.executable, "-m", "tests.cluster.joining_node", json.dumps(settings)]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=500)
    print(ended.stdout[-6000:])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["status"] == "finished"
    run_dir = Path(told["run_dir"])
    result = RunResult(run_dir, "finished", STEPS, STEPS, None, None)
    assert_grew_and_shrank(run_dir, steps(result))
    assert_each_prompt_once(run_dir, log_lines(result)[-1], STEPS, 4)
    if deltas:
        lines = steps(result).values()
        print("published", [line["weight_delta/published_share"] for line in lines])
        assert min(line["weight_delta/published_share"] for line in lines) < 0.5
        assert max(line[GAP] for line in lines) < 0.2, "of bfloat16 in two programs"


PROGRAM = """
import json, sys
from tests.cluster.test_async_variants import run
print("RESULT", run(json.loads(sys.argv[1])).run_dir)
"""
KILLED = {
    "ppo": {"rlhf_type": "ppo", **LONG},
    "images": {"images": True, "freeze_vit": False, **LONG},
    "several_turns": {"multi_turn_scheduler": "echo", "max_turns": 3, **LONG},
}


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_goes_on_and_each_prompt_is_trained_on_once(
    name: str, cluster: None, tiny: Tiny, tmp_path: Path
) -> None:
    settings = {**settings_of(tiny, tmp_path, KILLED[name]), "resume_from_checkpoint": "auto"}
    settings["save_steps"] = 2
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    program = [sys.executable, "-c", PROGRAM, json.dumps(settings)]
    first = subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    out = tmp_path / "out"
    while not list(out.glob("*/checkpoint-2")):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    waited_s = random.uniform(0, 6)
    time.sleep(waited_s)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    (run_dir,) = out.iterdir()
    done = len((run_dir / "logging.jsonl").read_text().splitlines())
    there = sorted(path.name for path in run_dir.glob("checkpoint-*"))
    second = subprocess.run(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert second.returncode == 0, second.stdout
    assert f"RESULT {run_dir}" in second.stdout
    print(f"{name}: killed {waited_s:.1f} s after the checkpoint, {done} lines logged, {there}")
    result = RunResult(run_dir, "finished", 6, 6, None, None)
    print(log_lines(result)[-1]["prompts"])
    group = settings.get("num_generations", 1)
    if name == "several_turns":  # the scheduler's words are in no prompt, and prompts may be alike
        assert log_lines(result)[-1]["prompts"]["unaccounted"] == 0
        return
    assert_each_prompt_once(run_dir, log_lines(result)[-1], 6, group)
