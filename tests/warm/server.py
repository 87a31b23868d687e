"""Imports what workers need, and is forked for each of them until its standard input ends."""

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
from pathlib import Path
from typing import Any, NoReturn

from raytune_rl.runtime.imports import import_once

IMPORTS = (
    "torch", "transformers", "deepspeed", "peft", "math_verify", "datasets",
    "vllm.v1.engine.llm_engine", "vllm.engine.arg_utils", "vllm.v1.worker.cpu_worker",
)  # fmt: skip


def ask(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a client wants, and its standard streams."""
    text, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
    while not text.endswith(b"\n"):
        text += client.recv(1 << 16)
    return json.loads(text), streams


def become(asked: dict[str, Any], streams: list[int]) -> None:
    """Runs the client's program in this process, which is a new child."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(asked["environ"])
    if threads := os.environ.get("OMP_NUM_THREADS"):  # known too late: torch has been imported
        sys.modules["torch"].set_num_threads(int(threads))
    os.chdir(asked["folder"])
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.argv = asked["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def live(asked: dict[str, Any], streams: list[int]) -> NoReturn:
    """The whole life of a child."""
    status = 1
    try:
        become(asked, streams)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def serve(listener: socket.socket) -> None:
    """One child for each client, which is told its exit status; one whose client is gone is ended."""
    clients: dict[socket.socket, int] = {}
    while True:
        for found in select.select([listener, sys.stdin, *clients], [], [], 0.1)[0]:
            if found is sys.stdin:
                return
            if found is listener:
                client, _ = listener.accept()
                asked, streams = ask(client)
                child = os.fork()
                if child == 0:
                    for other in (listener, client, *clients):
                        other.close()
                    live(asked, streams)
                for stream in streams:
                    os.close(stream)
                clients[client] = child
            elif found in clients:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(clients[found], signal.SIGKILL)
        for client, child in list(clients.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    client.sendall(b"%d\n" % (os.waitstatus_to_exitcode(status) & 255))
                client.close()
                del clients[client]


def main() -> None:
    # Ray reads its worker's environment when it is imported, which a child has to do by itself. vLLM does
    # without where there is none.
    sys.modules["ray"] = None  # type: ignore[assignment]
    import_once(*IMPORTS)
    del sys.modules["ray"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen(64)
        print("ready", flush=True)
        serve(listener)


if __name__ == "__main__":
    main()
