"""The program that Ray starts as a worker. Has the server make a child with this process's arguments,
environment and standard streams, and ends as it ends.

    python -S -E -I client.py SOCKET PROGRAM ARGUMENT ...

It imports next to nothing: a Python of its own is all that it costs.
"""

import json
import os
import select
import socket
import sys

PATIENCE_S = 30.0
"""Ray takes a worker for failed that does not register within 60 s."""


def main() -> int:
    _, address, *program = sys.argv
    server = socket.socket(socket.AF_UNIX)
    server.settimeout(PATIENCE_S)
    asked = {"argv": program, "environ": dict(os.environ), "folder": os.getcwd(), "pid": os.getpid()}  # noqa: PTH109, pathlib takes as long to import as Python to start
    try:
        server.connect(address)
        message = json.dumps(asked).encode() + b"\n"
        sent = socket.send_fds(server, [message], [0, 1, 2])
        server.sendall(message[sent:])
        said = server.recv(64)
    except OSError:
        said = b""
    if not said.endswith(b"\n"):  # a number comes in one piece, or not at all
        server.close()
        os.execv(sys.executable, [sys.executable, *program])
    number, _, status = said.partition(b"\n")
    try:
        child = os.pidfd_open(int(number))
    except ProcessLookupError:
        child = None
    server.settimeout(None)
    try:
        status = status or server.recv(64)
    except OSError:
        status = b""
    if status:
        return int(status)
    if child is not None:  # the server is gone, and the child lives on
        select.select([child], [], [])
    return 1


os._exit(main())
