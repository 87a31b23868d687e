"""A Ray cluster with a real autoscaler, whose nodes are processes of this machine.

As `ray.cluster_utils.AutoscalingCluster`, which cannot be used here: Ray's wheel lacks a file of it, and
it starts and ends with `ray stop --force`, which would end the clusters of others on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

STORE = 80 * 2**20
"""Object store of each node, bytes."""


UNUSED = (
    "setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
)  # fmt: skip
"""What a config must have for nodes that are set up by commands, as these are not."""


@contextmanager
def autoscaling_cluster(
    head: Mapping[str, float], worker: Mapping[str, float], most: int, idle_s: float = 2.0
) -> Iterator[str]:
    """A head, and up to `most` nodes that come when something has no place and go when idle for `idle_s`.

    Args:
        head: Its resources.
        worker: Those of every other node.
        most: Such nodes.
        idle_s: Seconds.

    Yields:
        The cluster's address. It asks for no token: whoever connects needs RAY_AUTH_MODE=disabled.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    address = f"{get_node_ip_address()}:{port}"
    node_types = {
        FAKE_HEAD_NODE_TYPE: {"resources": dict(head), "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {**worker, "object_store_memory": STORE},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        },
    }
    config: dict[str, Any] = {
        "cluster_name": "fake_multinode",
        "max_workers": most,
        "provider": {
            "type": "external",  # the same by its own name needs the file that is not there
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": node_types,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        "auth": {},
        "file_mounts": {},
        **{name: [] for name in UNUSED},
    }
    folder = Path(tempfile.mkdtemp(prefix="rf", dir="/tmp"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}",
        "--include-dashboard=false", f"--temp-dir={folder}",
        f"--object-store-memory={STORE}", f"--num-cpus={head['CPU']:g}",
        f"--autoscaling-config={folder / 'config.json'}",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        _await_port(address, process, folder / "log")
        yield address
    finally:
        if process.poll() is not None:  # by itself: one of its parts has failed
            print((folder / "log").read_text()[-5000:], file=sys.stderr)
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _await_port(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(600):
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
            assert process.poll() is None, log.read_text()
    raise AssertionError(log.read_text())


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the head and all that it started, the nodes among them."""
    if process.poll() is not None:
        return  # it ended all of them
    mine = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in mine:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(mine, timeout=10)
