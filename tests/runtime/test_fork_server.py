"""Workers forked from a process that has made their imports: what they are, and who outlives whom."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytune_rl.runtime import fork_server
from raytune_rl.runtime.fork_server import Stage, executable, possible, serving

pytestmark = pytest.mark.skipif(not possible(), reason="a machine with a GPU, or an old kernel")

FIRST, SECOND = Stage("first", ["fractions"]), Stage("second", ["wave"], {"NEEDED_EARLY": "yes"})
TELLS = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv[1:], "folder": os.getcwd(), "mark": os.environ.get("MARK"), "path": sys.path[0],
    "early": os.environ.get("NEEDED_EARLY"), "pid": os.getpid(), "parent": os.getppid(),
    "group": os.getpgid(0),
    "modules": [name for name in ("fractions", "wave", "ray") if name in sys.modules],
    "nice": os.nice(0), "ends": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "score": int(open("/proc/self/oom_score_adj").read()), "main": __name__,
}), flush=True)
"""
DRIVER = """
import shlex, subprocess, sys
from raytune_rl.runtime.fork_server import Stage, serving
with serving([Stage("first", ["fractions"]), Stage("second", [sys.argv[1]])]) as python:
    print(python.split()[-1], flush=True)
    subprocess.run([*shlex.split(python), *sys.argv[2:]])
"""
STAYS = TELLS + "import time; time.sleep(100)\n"


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], list[str]]:
    """Writes a program; its words on a command line."""

    def written(text: str) -> list[str]:
        file = tmp_path / "program.py"
        file.write_text(text)
        return [str(file), "a word", "--flag"]

    return written


@contextmanager
def running(python: str, words: list[str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A client."""
    with subprocess.Popen([*shlex.split(python), *words], stdout=subprocess.PIPE, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pid: int, within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not lives(pid)


def test_a_child_is_what_the_client_would_have_been(
    program: Callable[[str], list[str]], tmp_path: Path
) -> None:
    words = program(TELLS + "sys.exit(7)")
    with serving([FIRST]) as python:
        environ = {**os.environ, "MARK": "of the client"}
        with running(python, words, env=environ, cwd=tmp_path) as client:
            child = told(client)
            assert client.wait(10) == 7
    assert child["argv"] == words[1:]
    assert child["folder"] == child["path"] == str(tmp_path)
    assert child["mark"] == "of the client"
    assert child["main"] == "__main__"
    assert child["modules"] == ["fractions"]
    assert child["pid"] not in (client.pid, child["parent"])
    assert child["group"] == child["pid"]
    assert child["ends"], "a signal that its server leaves alone"


def test_a_child_is_as_nice_and_as_readily_ended_as_its_client(program: Callable[[str], list[str]]) -> None:
    def as_ray_does() -> None:
        os.nice(6)
        Path("/proc/self/oom_score_adj").write_text("900")

    before = os.nice(0)
    with serving([FIRST]) as python, running(python, program(TELLS), preexec_fn=as_ray_does) as client:
        child = told(client)
    assert (child["nice"], child["score"]) == (before + 6, 900)


def test_a_later_stage_has_the_imports_of_all_before_it(program: Callable[[str], list[str]]) -> None:
    with serving([FIRST, SECOND]) as python:
        with running(python, program(TELLS)) as client:
            assert told(client)["modules"] == ["fractions"]
        second = executable("second")["py_executable"]
        with running(second, program(TELLS)) as client:
            child = told(client)
        assert child["modules"] == ["fractions", "wave"]
        assert child["early"] is None, "the environment is the client's"
        assert executable(None) == {}
    assert executable("second") == {}, "nobody serves any more"


def test_who_kills_one_of_the_two_ends_the_other(program: Callable[[str], list[str]]) -> None:
    words = program(STAYS)
    with serving([FIRST]) as python:
        with running(python, words) as client:
            os.kill(told(client)["pid"], signal.SIGKILL)
            assert client.wait(10) != 0
        with running(python, words) as client:
            child = told(client)["pid"]
            os.kill(child, signal.SIGSTOP)
            client.kill()
            assert gone(child)


def test_without_its_server_a_client_is_the_program_itself(program: Callable[[str], list[str]]) -> None:
    words = program(STAYS)
    with serving([FIRST]) as python, running(python, words) as before:
        child = told(before)
        assert child["parent"] != os.getpid()
        os.kill(child["parent"], signal.SIGKILL)
        assert gone(child["parent"])
        with running(python, words) as after:
            plain = told(after)
        assert plain["pid"] == after.pid
        assert plain["modules"] == []
        assert plain["path"] == child["path"]
        assert lives(child["pid"])
        assert before.poll() is None
        os.kill(child["pid"], signal.SIGKILL)
        assert before.wait(10) != 0


@pytest.mark.parametrize(
    "stages", [[Stage("broken", ["no_such_module"]), SECOND], [FIRST, Stage("broken", ["nothing"])]]
)
def test_what_cannot_be_imported_is_the_workers_to_say(
    program: Callable[[str], list[str]], stages: list[Stage]
) -> None:
    with serving(stages):
        python = executable("broken")["py_executable"]
        for _ in range(2):  # while it imports, and afterwards
            with running(python, program(TELLS)) as client:
                assert told(client)["pid"] == client.pid
            time.sleep(0.5)
        with running(python, program(TELLS)) as client:
            assert told(client)["pid"] == client.pid


def test_a_client_that_says_nothing_holds_nobody_up(program: Callable[[str], list[str]]) -> None:
    with serving([FIRST]) as python, socket.socket(socket.AF_UNIX) as silent:
        silent.connect(shlex.split(python)[-1])
        with running(python, program(TELLS)) as client:
            child = told(client)
    assert child["pid"] != client.pid, "within its patience"


def test_who_ends_at_once_is_heard_of(program: Callable[[str], list[str]]) -> None:
    words = program("import os; os._exit(5)")
    with serving([FIRST]) as python:
        ended = [subprocess.run([*shlex.split(python), *words], timeout=20).returncode for _ in range(20)]
    assert ended == [5] * 20


def test_a_client_does_not_wait_for_ever(
    program: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless.py").write_text("import time; time.sleep(100)")
    patient = Path(fork_server.__file__).with_name("client.py").read_text()
    (tmp_path / "client.py").write_text(patient.replace("PATIENCE_S = 30.0", "PATIENCE_S = 0.3"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with serving([Stage("late", ["endless"])]) as python:
        words = shlex.split(python)
        python = shlex.join([*words[:-2], str(tmp_path / "client.py"), words[-1]])
        with running(python, program(TELLS)) as client:
            assert told(client)["pid"] == client.pid
        (server,) = (one.pid for one in psutil.Process().children() if "endless" in " ".join(one.cmdline()))
    assert gone(server, 1.0), "what nobody needs any more is not imported to its end"


def test_nothing_outlives_the_driver(program: Callable[[str], list[str]], tmp_path: Path) -> None:
    """Neither its end, nor its death."""
    words = program(STAYS)
    with serving([FIRST]) as python, running(python, words) as client:
        child = told(client)
    assert gone(child["pid"])
    assert gone(child["parent"], 1.0)

    with subprocess.Popen([sys.executable, "-c", DRIVER, "wave", *words], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().decode().strip()).parent
        child = told(process)
        assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]
        process.kill()
        assert gone(child["pid"])
        assert gone(child["parent"])
    assert not folder.exists()


def test_a_server_whose_driver_dies_meanwhile_makes_no_further_imports(
    program: Callable[[str], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(1)")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", DRIVER, "slow", *program(STAYS)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}  # a client may outlive both
    with subprocess.Popen(command, **streams, env=environ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().decode().strip()).parent
        process.kill()
    deadline = time.monotonic() + 15
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not folder.exists()


def test_a_machine_with_a_gpu_forks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl")
    assert not possible()
