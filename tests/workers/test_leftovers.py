"""What a killed worker leaves on a machine is removed by the next one, and nobody else's is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raytune_rl.workers.leftovers import SEMAPHORES, clear, clear_new, file_store, named

KILLED = """
import multiprocessing, os, time
from multiprocessing.connection import Listener

from raytune_rl.workers.adapter_files import adapter_files
from raytune_rl.workers.leftovers import file_store, name_semaphores, name_sockets
name_semaphores()
name_sockets()
name_sockets()
listener = Listener(family="AF_UNIX")
files = adapter_files({}, None)
adapter = files.__enter__()
lock = multiprocessing.get_context("spawn").Lock()
print(lock._semlock.name, flush=True)
print(file_store(), flush=True)
print(listener.address, adapter, os.environ["VLLM_RPC_BASE_PATH"], flush=True)
time.sleep(600)
"""


def test_what_a_killed_worker_left_is_removed() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    left = SEMAPHORES / f"sem.{process.stdout.readline().strip().removeprefix('/')}"
    store = Path(process.stdout.readline().strip().removeprefix("file://"))
    store.touch()
    socket, adapter, engines = map(Path, process.stdout.readline().split())
    assert socket.is_socket()
    assert adapter.is_dir()
    assert engines == socket.parent
    assert left.exists()
    assert left not in clear(SEMAPHORES), "its process lives"
    os.killpg(process.pid, signal.SIGKILL)  # its tracker of resources too, as a lost container has it
    process.wait()
    assert left in clear(SEMAPHORES)
    assert {store, adapter, engines} <= set(clear(store.parent))
    assert not engines.exists()
    assert not left.exists()
    assert not store.exists()


def test_who_is_still_dying_is_waited_for() -> None:
    before = named(SEMAPHORES)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    left = f"sem.{process.stdout.readline().strip().removeprefix('/')}"
    assert left in named(SEMAPHORES) - before

    def end() -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    clear_new(SEMAPHORES, before, within_s=0.2)
    assert left in named(SEMAPHORES), "of a run beside this one"
    threading.Timer(0.3, end).start()
    clear_new(SEMAPHORES, before, within_s=60.0)
    assert left not in named(SEMAPHORES)


def test_what_is_not_known_to_be_of_the_dead_stays(tmp_path: Path) -> None:
    own = Path(file_store()).name
    for name in (
        own,
        "sem.mp-33dy7vhk",
        "vllm_dist_0",
        "raytune_rl-01234567-1-1-store-a",
        "raytune_rl-notes",
    ):
        (tmp_path / name).touch()
    assert clear(tmp_path) == []


@pytest.mark.parametrize("first", ["vllm.plugins", "vllm.v1.executor.uniproc_executor"])
def test_vllm_meets_by_files_that_bear_the_owners_name(first: str) -> None:
    """Whether its executor was imported before the plugin or after."""
    code = (
        f"import importlib; importlib.import_module({first!r})\n"
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.v1.executor import uniproc_executor\n"
        "print(uniproc_executor.get_file_store_init_method())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.split()[-1]).name.startswith("raytune_rl-"), done.stdout
