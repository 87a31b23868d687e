"""Workers of Ray whose imports are made already, for tests that start hundreds of them.

A worker spends most of its start on importing torch, Transformers, DeepSpeed or vLLM. Here Ray's command for
a worker is a client (`client.py`) of one process that has imported all of them (`server.py`), which is forked
for each worker; the child then runs Ray's own worker program. All after the imports is as it is anywhere.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY = b"ready\n"
CLIENT = Path(__file__).with_name("client.py")


@contextmanager
def warm_workers() -> Iterator[str]:
    """Starts the server for the time of the block. Gives Ray's `py_executable` for it."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        socket = Path(folder) / "socket"
        command = [sys.executable, "-m", "tests.warm.server", str(socket)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            assert READY in server.stdout, "the server of warm workers did not start"  # others print, too
            try:
                yield f"{sys.executable} -S -E -I {CLIENT} {socket}"
            finally:
                server.stdin.close()
                server.wait(30)
