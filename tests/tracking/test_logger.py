import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raytune_rl.errors import ConfigError
from raytune_rl.tracking.logger import RunLogger
from raytune_rl.tracking.run_dir import RunDir


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def scalars(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.runs))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_line_has_ms_swifts_keys(run: RunDir, clock: Any) -> None:
    with RunLogger(run, "none", 100, clock=clock) as log:
        clock.now += 10.0
        log.log(5, {"loss": 0.5, "memory(GiB)": np.float32(1.5), "reward": np.int64(1)})
        assert lines(run.logging_jsonl) == [  # already on disk, before any close
            {
                "loss": 0.5,
                "memory(GiB)": 1.5,
                "reward": 1,
                "global_step/max_steps": "5/100",
                "elapsed_time": "10s",
                "remaining_time": "3m 10s",
                "train_speed(s/it)": 2.0,
            }
        ]
        log.close({"global_step": 5, "last_model_checkpoint": run.checkpoint(5), "best_metric": None})
    last = lines(run.logging_jsonl)[-1]
    assert last == {"global_step": 5, "last_model_checkpoint": str(run.checkpoint(5)), "best_metric": None}
    assert len(lines(run.logging_jsonl)) == 2


def test_nan_is_null_named_and_counted(run: RunDir) -> None:
    log = RunLogger(run, ["none"], 10)
    log.log(1, {"loss": math.nan, "kl": np.float32("inf"), "reward": 1.0})
    log.log(2, {"loss": math.nan})
    log.close({"global_step": 2})
    first, _, last = lines(run.logging_jsonl)
    assert first["loss"] is None
    assert first["kl"] is None
    assert first["reward"] == 1.0
    assert first["non_finite"] == ["loss", "kl"]
    assert log.non_finite == {"loss": 2, "kl": 1}
    assert last["non_finite"] == {"loss": 2, "kl": 1}


def test_resume_drops_later_lines_the_final_line_and_a_torn_one(run: RunDir, clock: Any) -> None:
    with RunLogger(run, "none", 4) as log:
        for step in (1, 2, 3, 4):
            log.log(step, {"loss": float(step)})
        log.log(2, {"eval_reward": 0.5})
        log.close({"global_step": 4})
    kept = [line for line in run.logging_jsonl.read_text().splitlines() if '"1/4"' in line or '"2/4"' in line]
    with run.logging_jsonl.open("a") as file:
        file.write('{"loss": 9.0, "global_step/max_st')
    log = RunLogger(run, "none", 6, resume_step=2, clock=clock)
    assert run.logging_jsonl.read_text().splitlines() == kept
    assert (log.truncation.kept, log.truncation.dropped, log.truncation.torn) == (3, 3, 1)
    clock.now += 4.0
    line = log.log(3, {"loss": 30.0})
    assert line["train_speed(s/it)"] == 4.0, "the pace is of this process, not of steps done before it"
    assert line["remaining_time"] == "12s"
    assert [(r.get("loss"), r["global_step/max_steps"]) for r in lines(run.logging_jsonl)] == [
        (1.0, "1/4"),
        (2.0, "2/4"),
        (None, "2/4"),
        (30.0, "3/6"),
    ]


def test_a_new_run_keeps_an_existing_log(run: RunDir) -> None:
    RunLogger(run, "none", 4).log(1, {"loss": 1.0})
    RunLogger(run, "none", 4).log(2, {"loss": 2.0})
    assert [row["loss"] for row in lines(run.logging_jsonl)] == [1.0, 2.0]


def test_tensorboard_reads_back_what_was_logged(run: RunDir) -> None:
    with RunLogger(run, ["tensorboard"], 10) as log:
        log.log(1, {"loss": 2.0, "rewards/accuracy/mean": 0.25, "note": "text"})
        log.log(1, {"eval_reward": 0.5})
    read = scalars(run)
    assert read["train/loss"] == [(1, 2.0)]
    assert read["train/rewards/accuracy/mean"] == [(1, 0.25)]
    assert read["eval/reward"] == [(1, 0.5)]
    assert "train/note" not in read


def test_tensorboard_forgets_the_steps_after_a_resume(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLogger(run, ["tensorboard"], 10) as log:
        for step in (1, 2, 3, 4):
            log.log(step, {"loss": float(step)})
    # Event files are read in the order of their names, which hold the second they were made in.
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 5)
    with RunLogger(run, ["tensorboard"], 10, resume_step=2) as log:
        log.log(3, {"loss": 30.0})
    assert scalars(run)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_sink_that_is_not_installed_is_a_config_error(run: RunDir, name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        RunLogger(run, ["tensorboard", name], 10)
    assert list(run.runs.iterdir()) == [], "nothing is opened before all of it can be"


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_that_refuses_to_start_is_a_config_error(
    run: RunDir, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: Any) -> None:
        raise RuntimeError("No API key\nconfigured.")

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=refuse))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{name} cannot start: No API key configured. .*_MODE=offline"):
        RunLogger(run, [name], 10)


def test_an_unknown_sink_names_the_nearest(run: RunDir) -> None:
    with pytest.raises(ConfigError, match="Did you mean tensorboard"):
        RunLogger(run, ["tensorbord"], 10)


def test_tracking_imports_nothing_heavy() -> None:
    code = (
        "import sys, pkgutil, importlib, raytune_rl.tracking as t\n"
        "for m in pkgutil.iter_modules(t.__path__, t.__name__ + '.'): importlib.import_module(m.name)\n"
        "heavy = {'torch', 'ray', 'tensorboard', 'matplotlib', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
