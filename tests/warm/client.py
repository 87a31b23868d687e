"""What Ray starts as a worker: asks the server for a child that has this process's arguments, environment and
standard streams, and ends as it ends."""

import json
import os
import socket
import sys


def main() -> int:
    server = socket.socket(socket.AF_UNIX)
    server.connect(sys.argv[1])
    asked = {"argv": sys.argv[2:], "environ": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109, pathlib takes as long to import as Python to start
    socket.send_fds(server, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
    said = b""
    while not said.endswith(b"\n"):
        more = server.recv(64)
        if not more:
            return 1
        said += more
    return int(said)


os._exit(main())
