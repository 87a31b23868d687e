"""Who may write into a run directory: one process at a time, and never a dead one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.errors import RunInUseError
from raytune_rl.tracking.processes import ProcessId
from raytune_rl.tracking.run_lock import LOCK, RunLock, locked

HOLD = "import sys, time; from raytune_rl.tracking.run_lock import *; from pathlib import Path\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"


def holder(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def written(directory: Path, **values: Any) -> None:
    """A lock that a process of another machine left."""
    document = {
        "host": "node7",
        "pid": 4,
        "started": "5",
        "machine": "another",
        "token": "t",
        "since": "noon",
    }
    (directory / LOCK).write_text(json.dumps({**document, "command": "raytune-rl sft", **values}))


def aged(directory: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(directory / LOCK, (then, then))


def test_a_living_holder_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        before = (tmp_path / LOCK).read_text()
        with pytest.raises(RunInUseError) as error, locked(tmp_path):
            pass
        for part in (f"process {process.pid} on ", "since 20", "Wait until it has ended, or end it", "kill "):
            assert part in str(error.value)
        assert (tmp_path / LOCK).read_text() == before
    finally:
        process.kill()
        process.wait()
    with locked(tmp_path):  # it was killed, and keeps nobody out
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_number_that_another_process_has_by_now_is_no_holder(tmp_path: Path) -> None:
    own = ProcessId.own()
    written(tmp_path, pid=own.pid, machine=own.machine, started=str(int(own.started) - 1))
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_holder_elsewhere_that_gave_no_sign_for_long_is_gone(tmp_path: Path) -> None:
    written(tmp_path)
    aged(tmp_path, 100)
    with locked(tmp_path):
        pass


def test_a_holder_elsewhere_that_gives_signs_of_life_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    living = RunLock(tmp_path, renewed_every_s=0.2)
    living.acquire()
    document = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**document, "machine": "another", "host": "node7"}))
    with pytest.raises(RunInUseError, match="on node7"):
        RunLock(tmp_path).acquire()
    living.release()


def test_a_holder_elsewhere_that_falls_silent_is_waited_for_and_then_gone(tmp_path: Path) -> None:
    written(tmp_path)
    lock = RunLock(tmp_path, renewed_every_s=0.2, stale_after_s=1.0)
    lock.acquire()
    lock.release()


def test_a_lock_that_was_written_in_half_keeps_nobody_out_for_ever(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"host": "no')
    aged(tmp_path, 100)
    with locked(tmp_path):
        pass


def test_who_lost_the_lock_does_not_take_it_from_the_next(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    written(tmp_path)
    with pytest.raises(RunInUseError, match="process 4 on node7, since noon: raytune-rl sft"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK).exists()


def test_of_many_that_start_at_once_one_goes_on(tmp_path: Path) -> None:
    code = HOLD.replace("time.sleep(600)", "time.sleep(5)")
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
        for _ in range(4)
    ]
    assert sorted(process.wait(60) for process in started) == [0, 1, 1, 1]
