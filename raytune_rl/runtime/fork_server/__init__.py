"""Workers of Ray whose imports are made already, on a machine without GPUs.

A worker spends most of its start on importing torch, Transformers, DeepSpeed or vLLM, each for itself. Here
Ray's command for a worker (`py_executable` of a runtime environment) is a client (`client.py`) of a process
that has imported them once (`server.py`) and is forked for each worker; the child then runs Ray's own worker
program. Where the server is gone or late, the client becomes that program itself.

A process that has asked for CUDA must not be forked, and there a start is the loading of a model: where a
machine has a GPU none of this is done.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from raytune_rl.runtime.machine import short_folder
from raytune_rl.tracking.processes import ProcessId

_HERE = Path(__file__).parent
_ENDS_WITHIN_S = 20.0
"""The server ends what is left of its children first (`server.GRACE_S`)."""


@dataclass(frozen=True)
class Stage:
    """Imports that some workers need.

    Attributes:
        name: Of the stage, for those workers.
        modules: To import. None may import ray, which reads its worker's environment as it is imported.
        env: What is read as they are imported.
    """

    name: str
    modules: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


_folder: Path | None = None
"""Of the present servers' sockets."""


@contextmanager
def serving(stages: Sequence[Stage]) -> Iterator[str]:
    """Has processes import what workers need, for the time of the block; each stage's imports come on top of
    the last one's.

    Gives Ray's `py_executable` for a worker of the first stage.
    """
    global _folder
    before = _folder
    longest = max(len(stage.name) for stage in stages)
    prefix = f"{ProcessId.own().name}-fork-"
    where = short_folder(len(f"/{prefix}12345678/") + longest)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=where, ignore_cleanup_errors=True) as name:
        server = _started(Path(name), stages)
        _folder = Path(name)
        try:
            yield _executable(stages[0].name)
        finally:
            _folder = before
            assert server.stdin is not None
            server.stdin.close()
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)  # those that import still, for nobody
            with suppress(subprocess.TimeoutExpired):
                server.wait(_ENDS_WITHIN_S)


def _started(folder: Path, stages: Sequence[Stage]) -> subprocess.Popen[bytes]:
    """The server, which listens from the beginning: a client waits until it has made its imports."""
    with ExitStack() as stack:
        told = []
        for stage in stages:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(folder / stage.name))
            listener.listen(64)
            told.append({**asdict(stage), "listener": listener.fileno()})
        return subprocess.Popen(
            [sys.executable, str(_HERE / "server.py"), json.dumps(told)],
            stdin=subprocess.PIPE,  # as it is closed, so by the driver's death, the server ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[one["listener"] for one in told],
            start_new_session=True,  # a terminal's Ctrl-C is the driver's
        )


def executable(stage: str | None) -> dict[str, str]:
    """The part of a runtime environment by which a worker begins at a stage; nothing for None, so that it
    begins as any other, and where nobody serves the stage."""
    if stage is None or _folder is None or not (_folder / stage).exists():
        return {}
    return {"py_executable": _executable(stage)}


def _executable(stage: str) -> str:
    assert _folder is not None
    return shlex.join([sys.executable, "-S", "-E", "-I", str(_HERE / "client.py"), str(_folder / stage)])


def possible() -> bool:
    """Whether this machine has no GPU (no device of a driver of NVIDIA, Windows or AMD), and its kernel tells
    of ended processes (Linux 5.3)."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")))
