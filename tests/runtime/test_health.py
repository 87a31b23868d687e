"""When a node or the cluster's head is gone, it is said at once and by name."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_rl.errors import NodeLostError
from raytune_rl.runtime import health
from raytune_rl.runtime.health import Place

PROGRAM = Path(__file__).with_name("lost_daemon.py")


@pytest.fixture
def daemon() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def interrupted_by(daemon: socket.socket, lost: socket.socket) -> None:
    """Waits in vain while `lost` ends; `daemon` is the head."""
    with health.watched(f"127.0.0.1:{daemon.getsockname()[1]}", started_here=True) as watching:
        watching._places["n"] = Place("node n", "127.0.0.1", lost.getsockname()[1], "It held rollout[0].")
        lost.close()
        try:
            time.sleep(60)
        finally:
            watching.end()


def test_the_main_thread_is_interrupted_by_name(
    daemon: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "EVERY_S", 0.05)
    with (
        socket.create_server(("127.0.0.1", 0)) as node,
        pytest.raises(NodeLostError, match=r"^node n is lost: nothing listens .* It held rollout\[0\]\.$"),
    ):
        interrupted_by(daemon, node)
    with pytest.raises(NodeLostError, match=r"^the head of the Ray cluster is lost"):
        interrupted_by(daemon, daemon)
    assert health.health().lost is None


def test_ctrl_c_is_not_taken_for_a_loss(daemon: socket.socket) -> None:
    address = f"127.0.0.1:{daemon.getsockname()[1]}"
    # Whoever starts the tests in the background may have told them to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), health.watched(address, started_here=True):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("killed", "says"),
    [
        ("raylet", "is lost: nothing listens at .* any more. It held rollout.0., rollout.1."),
        ("gcs_server", "raytune-rl: the head of the Ray cluster is lost: nothing listens at"),
    ],
)
def test_a_lost_daemon_is_named(killed: str, says: str) -> None:
    """Ray itself would wait for ever, or end the process from C++ after a minute."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(PROGRAM), killed], env=environ, capture_output=True, text=True, timeout=120
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert re.search(says, last), done.stderr
    assert "started anew" not in done.stdout
