"""A child of a sandbox: a keeper, with the process that runs the reward functions below it.

    reward worker --- fork server --- keeper --- functions --- whatever they start

The keeper never runs a line of the user's, so it always answers: it keeps the functions to their limits,
says how they ended, and starts them anew. The kernel gives it every orphan among their descendants (it is a
child subreaper), so that it can end them all: forks, subprocesses, daemons in sessions of their own. It does
so when a limit is passed, when the functions' process dies, and when its own parent is gone, however that
ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import signal
import struct
import sys
import time
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Literal

from raytune_rl.protocol.rewards import Unscored
from raytune_rl.rewards import child
from raytune_rl.rewards.child import Built, ChildSpec, Reply
from raytune_rl.rewards.lean_process import signal_when_parent_dies

# Time for a fresh process to import plugins and build its functions; their own time starts afterwards.
START_LIMIT_S = 120.0
# Time for killed processes to be gone; only one that hangs in the kernel needs more.
_END_LIMIT_S = 10.0
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Limits:
    """How long a call may take.

    Attributes:
        whole_s: Seconds for the call.
        stuck_s: Seconds without progress, where progress can be seen (see `child.Watched`).
    """

    whole_s: float
    stuck_s: float


@dataclass
class _Functions:
    pid: int
    pipe: Connection
    progress: mmap.mmap
    built: Built


# One keeper serves one sandbox for its whole life, so what it keeps is the process's own state.
_spec: ChildSpec | None = None
_functions: _Functions | None = None
_exit_codes: dict[int, int] = {}


def prepare(spec: ChildSpec) -> None:
    """Runs once when the keeper starts."""
    global _spec
    _spec = spec
    os.setsid()  # what is sent to the parent's process group, Ctrl+C too, does not reach those who clean up
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, _end)
    util.Finalize(
        None, _end_all, exitpriority=100
    )  # where it ends by itself, as its pool has closed its pipe
    signal_when_parent_dies(signal.SIGTERM)


def describe() -> Built:
    """The reward functions that their process has built."""
    functions = _ready()
    return functions.built if isinstance(functions, _Functions) else Built(error=functions.message)


def call(method: Literal["score", "score_each"], arguments: bytes, limits: Limits) -> Reply | Unscored:
    """Calls a function of `child` with pickled arguments.

    Returns:
        Its reply; or why there is none: the functions took too long or their process died. Everything that
        they had started is gone then.
    """
    while True:
        functions = _ready()
        if isinstance(functions, Unscored):
            return functions
        answer = _ask(functions, pickle.dumps((method, arguments)), limits)
        if answer is not None:
            return answer


def _ask(functions: _Functions, request: bytes, limits: Limits) -> Reply | Unscored | None:
    """None if the process had died before it took the request: that is nobody's fault."""
    functions.progress.seek(0)
    functions.progress.write(child.NOT_BEGUN)
    begin = time.monotonic()
    with contextlib.suppress(OSError):  # it has died: seen below
        functions.pipe.send_bytes(request)
    while True:
        try:
            if functions.pipe.poll(_POLL_S):
                reply: Reply = functions.pipe.recv()
                return reply
        except (EOFError, OSError):
            time.sleep(0.01)
        begun, seen = struct.unpack(child.PROGRESS, functions.progress[: len(child.NOT_BEGUN)])
        if (died := _exit_code(functions.pid)) is not None:
            _end_functions()
            return Unscored(how_it_died(died), "crash") if begun else None
        now = time.monotonic()
        for since, limit_s in ((begin, limits.whole_s), (seen or now, limits.stuck_s)):
            if now - since > limit_s:
                _end_functions()
                return Unscored(f"no answer within {limit_s:.3g} s", "timeout")


def how_it_died(exit_code: int) -> str:
    """The end of a process in words; a negative code is a signal."""
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = " (out of memory?)" if -exit_code == signal.SIGKILL else ""
        return f"the reward process was ended by {name}{hint}"
    return f"the reward process ended with exit code {exit_code}"


def _ready() -> _Functions | Unscored:
    """The process of the functions; a new one if there is none or it died while nobody asked it anything."""
    global _functions
    if _functions is not None and _exit_code(_functions.pid) is None:
        return _functions
    _end_functions()
    assert _spec is not None
    _exit_codes.clear()
    ours, theirs = Pipe()
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    keeper = os.getpid()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _serve(theirs, progress, _spec, keeper)
    theirs.close()
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        try:
            if ours.poll(_POLL_S):
                _functions = _Functions(pid, ours, progress, ours.recv())
                return _functions
        except (EOFError, OSError):
            time.sleep(0.01)
        if (died := _exit_code(pid)) is not None:
            _end_all()
            return Unscored(f"while it starts, {how_it_died(died)}", "crash")
    _end_all()
    return Unscored(f"the reward process did not start within {START_LIMIT_S:g} s", "crash")


def _serve(pipe: Connection, progress: mmap.mmap, spec: ChildSpec, keeper: int) -> None:
    """The life of the functions' process; does not return."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == keeper:
            child.serve(pipe, progress, spec)
    finally:
        os._exit(1)


def _end(signum: int, frame: object) -> None:
    _end_all()
    os._exit(0)


def _end_functions() -> None:
    global _functions
    _end_all()
    if _functions is not None:
        _functions.pipe.close()
        _functions.progress.close()
        _functions = None


def _end_all() -> None:
    """Ends every descendant. Those whose parent dies come to the keeper, so none gets away by forking."""
    end = time.monotonic() + _END_LIMIT_S
    while _reap() and time.monotonic() < end:
        for pid in _descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _exit_code(pid: int) -> int | None:
    """How a child ended; None while it lives."""
    _reap()
    return _exit_codes.get(pid)


def _reap() -> bool:
    """Takes note of children that ended, orphans included. Returns whether there are any left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        _exit_codes[pid] = os.waitstatus_to_exitcode(status)


def _descendants() -> list[int]:
    """All processes below this one. Where there is no /proc: the functions' own alone."""
    children: dict[int, list[int]] = {}
    if not Path("/proc/self/stat").exists():
        return [_functions.pid] if _functions is not None else []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended since
            parent = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(process.name))
    found = list(children.get(os.getpid(), ()))
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, ()))
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
