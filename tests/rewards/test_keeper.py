"""Whatever a reward function started ends with it, however it was started and whoever died."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from raytune_rl.rewards.sandbox import Sandbox

# The first word says how a process is started; each marks what it starts by the number that it sleeps.
PLUGIN = """
import os, subprocess, sys, time
from swift.rewards import orms

def fork(seconds):
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", seconds])

def daemon(seconds):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", seconds])
        os._exit(0)

def start(how, seconds):
    if how == "popen":
        subprocess.Popen(["sleep", seconds])
    if how == "session":
        subprocess.Popen(["sleep", seconds], start_new_session=True)
    if how == "shell":
        subprocess.Popen(f"sleep {seconds} & sleep {seconds} & wait", shell=True)
    if how == "nohup":
        subprocess.run(f"nohup setsid sleep {seconds} >/dev/null 2>&1 &", shell=True)
    if how == "fork":
        fork(seconds)
    if how == "daemon":
        daemon(seconds)
    if how == "deaf":
        code = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep({seconds})"
        subprocess.Popen([sys.executable, "-c", code])
    if how == "forks":
        for _ in range(20):
            daemon(seconds)

def starts(completions, **kwargs):
    for text in completions:
        how, seconds, end = text.split()
        start(how, seconds)
        time.sleep(0.3)
        if end == "hang":
            time.sleep(3600)
        if end == "crash":
            os._exit(1)
    return [1.0] * len(completions)

orms["starts"] = starts
"""
WAYS = ["popen", "session", "shell", "nohup", "fork", "daemon", "deaf", "forks"]


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "starts.py"
    path.write_text(PLUGIN)
    return str(path)


def running(seconds: str) -> list[int]:
    """Processes of which an argument has this number."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        arguments = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(seconds in a for a in arguments[1:]):
            found.append(process.pid)
    return [pid for pid in found if pid != os.getpid()]


def gone(seconds: str) -> bool:
    for _ in range(100):
        if not running(seconds):
            return True
        time.sleep(0.05)
    for pid in running(seconds):
        os.kill(pid, signal.SIGKILL)
    return False


def number(line: int) -> str:
    """Seconds that no other process sleeps."""
    return f"98{os.getpid()}{line:03d}"


@pytest.mark.parametrize("end", ["hang", "crash"])
def test_all_that_a_function_started_ends_with_it(plugin, end):
    sandbox = Sandbox(["starts"], [plugin], {}, timeout_s=1.0)
    marks = [number(row) for row in range(len(WAYS))]
    for how, mark in zip(WAYS, marks, strict=True):
        (failure,) = sandbox.score([f"{how} {mark} {end}"], {}).failures
        assert failure.kind == {"hang": "timeout", "crash": "crash"}[end]
        assert gone(mark), how
    assert sandbox.score([f"none {number(99)} return"], {}).failures == ()
    sandbox.close()


def test_what_runs_on_after_an_answer_ends_with_the_sandbox(plugin):
    mark = number(200)
    sandbox = Sandbox(["starts"], [plugin], {}, timeout_s=10.0)
    assert sandbox.score([f"popen {mark} return", f"daemon {mark} return"], {}).failures == ()
    assert len(running(mark)) == 2, "a server of the function's own lives as long as the function"
    sandbox.close()
    assert gone(mark)


@pytest.mark.parametrize("number_of_signal", [signal.SIGKILL, signal.SIGTERM])
def test_all_ends_when_the_worker_dies(plugin, number_of_signal):
    mark = number(300 + number_of_signal)
    ways = [f"{how} {mark} return" for how in WAYS]
    script = f"""
from raytune_rl.rewards.sandbox import Sandbox
sandbox = Sandbox(["starts"], [{plugin!r}], {{}}, 3600.0)
assert sandbox.score({ways[:4]!r}, {{}}).failures == ()
print("started", flush=True)
sandbox.score({[*ways[4:], f"popen {mark} hang"]!r}, {{}})
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "started\n"
        while len(running(mark)) < 25:
            assert worker.poll() is None
            time.sleep(0.05)
        worker.send_signal(number_of_signal)
    assert gone(mark)
