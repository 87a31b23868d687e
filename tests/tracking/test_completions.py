import json
import math
from dataclasses import replace

import pytest

from raytune_rl.tracking.completions import CompletionLog, CompletionRow
from raytune_rl.tracking.run_dir import RunDir

ROW = CompletionRow(
    step=1,
    prompt="2+2?",
    completion="vier: \u2028 4\n",
    tokens=3,
    rewards={"accuracy": 1.0, "format": None},
    reward=1.0,
    advantage=-0.5,
    weight_version=7,
    finish_reason="stop",
    extra={"solution": "4"},
)


def test_one_line_a_completion(run: RunDir) -> None:
    with CompletionLog(run) as log:
        log.write([ROW, replace(ROW, reward=math.nan)])
        first, second = run.completions_jsonl.read_bytes().decode().split("\n")[:2]
    assert json.loads(first) == {
        "step": 1,
        "prompt": "2+2?",
        "completion": "vier: \u2028 4\n",
        "tokens": 3,
        "rewards": {"accuracy": 1.0, "format": None},
        "reward": 1.0,
        "advantage": -0.5,
        "weight_version": 7,
        "finish_reason": "stop",
        "solution": "4",
    }
    assert json.loads(second)["reward"] is None


def test_extra_columns_cannot_hide_own_ones() -> None:
    with pytest.raises(ValueError, match="reward"):
        replace(ROW, extra={"reward": 3}).as_dict()


def test_resume_drops_the_steps_after_it(run: RunDir) -> None:
    with CompletionLog(run) as log:
        log.write(replace(ROW, step=step) for step in (1, 2, 2, 3))
    with run.completions_jsonl.open("a") as file:
        file.write('{"step": 1, "prompt": "to')
    with CompletionLog(run, resume_step=2) as log:
        assert (log.truncation.kept, log.truncation.dropped, log.truncation.torn) == (3, 1, 1)
        log.write([replace(ROW, step=3, completion="again")])
    rows = [json.loads(line) for line in run.completions_jsonl.read_text().split("\n") if line]
    assert [row["step"] for row in rows] == [1, 2, 2, 3]
    assert rows[-1]["completion"] == "again"


def test_what_a_user_puts_into_a_row_never_stops_a_run(run: RunDir) -> None:
    odd = {"rollout_infos": {"picture": b"123", "when": complex(1, 2), "score": 0.5}}
    with CompletionLog(run) as log:
        log.write([replace(ROW, extra=odd)])
    written = json.loads(run.completions_jsonl.read_text())["rollout_infos"]
    assert written == {"picture": "<3 bytes>", "when": "(1+2j)", "score": 0.5}
