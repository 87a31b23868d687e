"""Ray's own job server runs the example, as a user submits it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Head:
    """A cluster that was started by `ray start --head`."""

    address: str
    environ: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` in a process group of its own, which is all that is ended afterwards."""
    gcs, dashboard, client, agent = free_ports(4)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }
    # Ray's sockets lie in the temporary directory, and their paths must be short.
    with TemporaryDirectory(prefix="ray", dir="/tmp") as temporary:
        words = [RAY, "start", "--head", "--block", "--num-cpus", "4", "--temp-dir", temporary]
        words += [
            "--port",
            str(gcs),
            "--dashboard-port",
            str(dashboard),
            "--ray-client-server-port",
            str(client),
            # It runs the jobs. Its usual port is one for the whole machine: another Ray here may have it.
            "--dashboard-agent-listen-port",
            str(agent),
        ]
        with (Path(temporary) / "head.log").open("w") as log:
            process = subprocess.Popen(words, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_for(address, 90)
            yield Head(address, environ)
        finally:
            end_group(process)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(address: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5)
        except urllib.error.HTTPError:
            return  # it answers: without a token it refuses
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no job server at {address} within {seconds} s")


def end_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def test_ray_job_submit_runs_the_example(head: Head, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "grpo.py")]
    flags = [
        "--max_steps",
        "1",
        "--num_generations",
        "4",
        "--per_device_train_batch_size",
        "8",
        "--beta",
        "0",
    ]
    submit = [
        RAY,
        "job",
        "submit",
        "--address",
        head.address,
        "--",
        *script,
        *flags,
        "--output_dir",
        str(tmp_path),
    ]
    done = subprocess.run(submit, env=head.environ, capture_output=True, text=True, timeout=360, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "succeeded" in said
    assert "joined at" in said, "the job joined the cluster instead of starting one"
    assert "finished after 1 steps" in said
    assert list(tmp_path.glob("v0-*/checkpoint-1/model.safetensors"))
