"""Imports what workers need, and is forked for each of them until its standard input ends.

    python server.py STAGES

STAGES is a JSON list of `fork_server.Stage`, each with the number of its listening socket. The process of a
stage imports, is forked for the next stage, and serves its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORD_S = 10.0
"""Seconds that a client has to say what it wants."""
GRACE_S = 5.0
"""Seconds that children have, once nobody wants them any more, to end by themselves."""


@dataclass
class Asked:
    """A client's wish.

    Attributes:
        argv: The program and its arguments.
        environ: Its environment.
        folder: Its working directory.
        pid: The client.
        streams: Standard input, output and error.
    """

    argv: list[str]
    environ: dict[str, str]
    folder: str
    pid: int
    streams: list[int]


@dataclass
class Child:
    """A forked worker.

    Attributes:
        pid: Its number.
        ended: A descriptor that is readable once it has ended.
        unwanted: Its client is gone, and it was killed.
    """

    pid: int
    ended: int
    unwanted: bool = False

    def kill(self) -> None:
        self.unwanted = True
        os.kill(self.pid, signal.SIGKILL)  # it may have ended, but is nobody else until it is waited for


class Server:
    """Forks itself for the clients of a listening socket."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._children: dict[socket.socket, Child] = {}

    def serve(self) -> Asked | None:
        """Serves until standard input ends: None then. In a child it is what that child is to become."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends a server that has no children yet
        while True:
            ended = self._ended()
            clients = [client for client, child in self._children.items() if not child.unwanted]
            for one in select.select([self._listener, sys.stdin, *ended, *clients], [], [])[0]:
                if one is sys.stdin:
                    self._end()
                    return None
                if one is self._listener:
                    if (asked := self._accept()) is not None:
                        return asked
                elif one in ended:
                    self._bury(ended[one])
                elif one in self._children:  # a client never says more: it is gone
                    self._children[one].kill()

    def _accept(self) -> Asked | None:
        client, _ = self._listener.accept()
        client.settimeout(WORD_S)
        try:
            asked = _read(client)
        except (OSError, ValueError):  # it has lost patience
            client.close()
            return None
        pid = os.fork()
        if pid == 0:
            for other in (self._listener, client, *self._children):
                other.close()
            for child in self._children.values():
                os.close(child.ended)
            return asked
        for stream in asked.streams:
            os.close(stream)
        self._children[client] = child = Child(pid, os.pidfd_open(pid))
        try:
            client.sendall(b"%d\n" % pid)
        except OSError:
            child.kill()
        return None

    def _ended(self) -> dict[int, socket.socket]:
        """Clients, by what is readable once their child has ended."""
        return {child.ended: client for client, child in self._children.items()}

    def _bury(self, client: socket.socket) -> None:
        """A child has ended: its client hears how."""
        child = self._children.pop(client)
        os.close(child.ended)
        _, status = os.waitpid(child.pid, 0)
        with contextlib.suppress(OSError):
            client.sendall(b"%d\n" % (os.waitstatus_to_exitcode(status) & 255))
        client.close()

    def _end(self) -> None:
        """The driver is done, or dead, and Ray with it."""
        deadline = time.monotonic() + GRACE_S
        while self._children:
            left = deadline - time.monotonic()
            if left <= 0:
                for child in self._children.values():
                    child.kill()
            ended = self._ended()
            for one in select.select([*ended], [], [], left if left > 0 else None)[0]:
                self._bury(ended[one])


def _read(client: socket.socket) -> Asked:
    text, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
    while not text.endswith(b"\n"):
        more = client.recv(1 << 16)
        if not more:
            raise OSError("the client is gone")
        text += more
    return Asked(**json.loads(text), streams=list(streams))


def _like(client: int) -> None:
    """What Ray has given the client's process, and a child does not inherit: how nice it is, and how readily
    the kernel ends it when memory runs out."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, client))
        score = Path(f"/proc/{client}/oom_score_adj").read_text(encoding="ascii")
        Path("/proc/self/oom_score_adj").write_text(score, encoding="ascii")


def become(asked: Asked, path: list[str]) -> None:
    """Runs the client's program in this process, which is a new child.

    Args:
        asked: By the client.
        path: Where a fresh Python looks for modules, after the program's own folder.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, stream in enumerate(asked.streams):
        os.dup2(stream, number)
        os.close(stream)
    _like(asked.pid)
    os.environ.clear()
    os.environ.update(asked.environ)
    if (threads := os.environ.get("OMP_NUM_THREADS")) and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))  # it read the variable when it was imported
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    os.chdir(asked.folder)
    program = asked.argv[0]
    sys.argv = asked.argv
    sys.path[:] = [str(Path(program).parent), *path]
    runpy.run_path(program, run_name="__main__")


def import_all(modules: list[str]) -> None:
    """Imports what all children share."""
    from raytune_rl.runtime.imports import import_once

    # Ray reads its worker's environment when it is imported, which a child has to do by itself. What asks
    # whether it is there does without.
    sys.modules["ray"] = None  # type: ignore[assignment]
    for module in modules:
        import_once(module)
        if select.select([sys.stdin], [], [], 0)[0]:
            raise SystemExit  # the driver is done, or dead, already
    del sys.modules["ray"]


def serve_all(stages: list[dict[str, Any]]) -> Asked | None:
    """Imports, forks the process of the next stage, and serves. In a child: what it is to become.

    Its address is removed at the end, and those of later stages; so is the folder once it is empty, unless
    the driver has done that.
    """
    listener = socket.socket(fileno=stages[0]["listener"])
    folder, next_stage, asked = Path(listener.getsockname()).parent, None, None
    try:
        os.environ.update(stages[0]["env"])
        import_all(stages[0]["modules"])
        if stages[1:]:
            next_stage = os.fork()
            if next_stage == 0:
                listener.close()
                return serve_all(stages[1:])
            for later in stages[1:]:
                os.close(later["listener"])
        asked = Server(listener).serve()
        return asked
    finally:
        if asked is None and next_stage != 0:
            if next_stage is not None:
                os.waitpid(next_stage, 0)
            with contextlib.suppress(OSError):
                for stage in stages:
                    (folder / stage["name"]).unlink(missing_ok=True)
                folder.rmdir()


def main() -> None:
    path = sys.path[1:]  # without this file's folder
    sys.path[0] = str(Path(__file__).parents[3])
    asked = serve_all(json.loads(sys.argv[1]))
    if asked is not None:
        become(asked, path)


if __name__ == "__main__":
    main()
