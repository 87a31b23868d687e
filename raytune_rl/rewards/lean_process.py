"""Child processes that start in milliseconds and never import the program that started them.

`multiprocessing` re-imports the main module in every spawned child. In a Ray actor that module is Ray's own
worker script, so that each child would import ray. Here children are forked from a small server process which
has imported what rewards need and nothing else; the main module is left out of what a child is told to
prepare.

The standard library has no public switch for this, so two of its internal classes are subclassed:
`ForkServer` (a server of our own; the shared one belongs to the user) and `Popen`.
"""

from __future__ import annotations

import fcntl
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
from multiprocessing import context, forkserver, popen_forkserver, reduction, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

# Imported once by the server; every child, replacements included, is forked with these in memory.
_PRELOAD = ["raytune_rl.rewards.keeper", "math_verify"]

_server = forkserver.ForkServer()
_server.set_forkserver_preload(_PRELOAD)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


_LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes, with what multiprocessing puts below it: a socket's path may have 107 (man 7 unix)."""


def keep_sockets_short() -> None:
    """Where TMPDIR is too long for the sockets of multiprocessing, as a cluster's job directories are: they
    lie below /tmp, in a folder that nobody else can open and that goes with the process."""
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if settings.get("tempdir") is not None or len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_TMPDIR:
        return
    folder = tempfile.mkdtemp(prefix="pymp-", dir="/tmp")
    util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-100)
    settings["tempdir"] = folder


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: Any) -> None:
        preparation = spawn.get_preparation_data(process_obj.name)
        for key in ("init_main_from_name", "init_main_from_path"):
            preparation.pop(key, None)
        message = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(preparation, message)
            reduction.dump(process_obj, message)
        finally:
            context.set_spawning_popen(None)
        keep_sockets_short()
        self.sentinel, writer = _server.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        # The child takes the closing of this pipe for the death of its parent, so one end stays open with us.
        self.finalizer = util.Finalize(self, _close, (os.dup(writer), self.sentinel))
        with os.fdopen(writer, "wb") as stream:
            stream.write(message.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


class LeanProcess(ForkServerProcess):
    """A process that is forked from the server of this module."""

    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:  # noqa: N802, the name multiprocessing calls
        return _Popen(process_obj)


class LeanContext(ForkServerContext):
    """A multiprocessing context whose processes are `LeanProcess`es."""

    Process = LeanProcess


def signal_when_parent_dies(number: int) -> None:
    """In a child: the kernel sends this process a signal as soon as its parent is gone.

    Linux only; elsewhere a child still ends at its next idle moment, when it finds its pipe closed.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, number)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if not parent.is_alive():  # it died before we asked to be told
        os.kill(os.getpid(), number)
