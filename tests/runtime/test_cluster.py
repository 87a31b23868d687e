"""Joining a cluster, and reserving places on one of several nodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.runtime.fork_server import possible

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Another Python, as no test may have two clusters in one process."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=bare | {"RAY_USAGE_STATS_ENABLED": "0", **environ},
    )


# -- several nodes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = run("-m", "tests.runtime.several_nodes")
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


def runs(places: list[Any]) -> list[int]:
    """Lengths of the stretches of ranks that lie on one node."""
    return [len(list(stretch)) for _, stretch in groupby(node for node, _ in places)]


def test_the_cluster_is_joined_and_seen_whole(found: dict[str, Any]) -> None:
    assert found["joined"]
    assert found["gpus"] == 16


def test_ranks_of_a_node_are_neighbours(found: dict[str, Any]) -> None:
    for how in ("shared", "apart"):
        for places in found[how].values():
            assert len(runs(places)) == len({node for node, _ in places}), (how, places)
    assert sorted(runs(found["shared"]["policy"])) == [3, 5, 8], "every GPU has its rank"


def test_so_many_of_a_role_on_each_node(found: dict[str, Any]) -> None:
    assert runs(found["per_node"]["policy"]) == [2, 2, 2]
    assert runs(found["per_node"]["rollout"]) == [1, 1, 1]


def test_colocated_workers_of_a_rank_share_its_bundle(found: dict[str, Any]) -> None:
    shared = found["shared"]
    assert shared["policy"] == shared["rollout"] == shared["reference"]
    reward = {bundle for _, bundle in shared["reward"]}
    assert not reward & {bundle for _, bundle in shared["policy"]}


def test_apart_no_two_workers_share_a_bundle(found: dict[str, Any]) -> None:
    bundles = [bundle for places in found["apart"].values() for _, bundle in places]
    assert len(bundles) == len(set(bundles))
    assert {name: len(places) for name, places in found["apart"].items()} == {
        "policy": 7,
        "rollout": 7,
        "reference": 2,
        "reward": 12,
    }


def test_workers_that_share_a_gpu_see_the_same_one(found: dict[str, Any]) -> None:
    policy, rollout = found["workers"]["policy"], found["workers"]["rollout"]
    assert policy == rollout
    assert all(gpus == [seen] for _, gpus, seen in policy)
    assert len({(node, seen) for node, _, seen in policy}) == 4, "and no other pair sees it"


def test_a_process_sees_the_gpus_that_are_its_own(found: dict[str, Any]) -> None:
    """Device 0 of every process is its own, so LOCAL_RANK is 0; an engine over two has both."""
    seen = found["apart_seen"]
    assert all(gpus == [own] for _, gpus, own in seen["policy"])
    assert all(len(gpus) == 2 and ",".join(gpus) == own for _, gpus, own in seen["rollout"])
    taken = [(node, gpu) for role in ("policy", "rollout") for node, gpus, _ in seen[role] for gpu in gpus]
    assert len(set(taken)) == 6
    assert seen["reward"][0][1:] == [[], ""]


def test_what_can_never_fit_is_refused(found: dict[str, Any]) -> None:
    assert "no node has 1 CPU, 9 GPU left" in found["refused"]
    assert found["refused"].count("  node ") == 3


def test_places_are_given_back(found: dict[str, Any]) -> None:
    assert found["given_back"]


# -- joining -----------------------------------------------------------------------------------------------

JOIN = """
import sys
from raytune_rl.errors import RaytuneError
from raytune_rl.runtime.cluster import session
try:
    with session(*sys.argv[1:]):
        print("joined")
except RaytuneError as error:
    print(type(error).__name__, error)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_where_nobody_listens() -> None:
    address = f"127.0.0.1:{free_port()}"
    said = run("-c", JOIN, RAY_ADDRESS=address).stdout
    assert said.startswith(f"PlacementError no Ray cluster answers at '{address}': ")
    assert "refused" in said
    assert "ray start --head" in said
    assert "token" not in said, "that is not the reason"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://127.0.0.1:10001", "ConfigError 'ray://127.0.0.1:10001' is not an address a run can join"),
        ("http://127.0.0.1:8265", "ray job submit"),
        ("nonsense", "PlacementError no Ray cluster answers at 'nonsense': Invalid address"),
    ],
)
def test_an_address_of_another_kind(address: str, message: str) -> None:
    assert message in run("-c", JOIN, address).stdout


def test_without_a_token_where_one_is_asked_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        said = run("-c", JOIN, address, RAY_AUTH_MODE="token", HOME=str(tmp_path)).stdout
    assert said.startswith("PlacementError")
    assert "token" in said


# -- starting one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, {"RAY_AUTH_MODE": "disabled"}])
def test_one_of_our_own_starts_under_odd_circumstances(tmp_path: Path, mode: dict[str, str]) -> None:
    """A TMPDIR too long for sockets, no home to keep a token in, and each way to ask for tokens."""
    long = tmp_path / ("long" * 30)
    long.mkdir()
    done = run("-c", JOIN, TMPDIR=str(long), HOME=str(tmp_path / "nowhere"), **mode)
    assert done.stdout == "joined\n", done.stderr[-3000:]
    assert not (tmp_path / "nowhere").exists()


FORKED = """
import os, signal, sys
import ray
from raytune_rl.runtime.cluster import session
from raytune_rl.runtime.fork_server import Stage, executable

@ray.remote(num_cpus=0)
class Worker:
    def tell(self):
        have = [name for name in ("mailbox", "wave") if name in sys.modules]
        return os.environ["MARK"], have, os.getppid()

def tell(stage):
    worker = Worker.options(runtime_env={"env_vars": {"MARK": "own"}, **executable(stage)}).remote()
    return ray.get(worker.tell.remote(), timeout=60)

with session(imports=[Stage("first", ["mailbox"]), Stage("second", ["wave"])]):
    print(*tell("first")[:2])
    mark, have, server = tell("second")
    print(mark, have)
    os.kill(server, signal.SIGKILL)
    print(*tell("second")[:2])
"""


@pytest.mark.skipif(not possible(), reason="a machine with a GPU, or an old kernel")
def test_its_workers_have_their_imports_and_start_without_them_too(tmp_path: Path) -> None:
    blank = tmp_path / "a folder"
    blank.mkdir()
    done = run("-c", FORKED, TMPDIR=str(blank))
    assert done.stdout.splitlines() == [
        "own ['mailbox']", "own ['mailbox', 'wave']", "own []"
    ], done.stderr[-3000:]  # fmt: skip
    assert not list(blank.glob("raytune_rl-*"))


def test_a_temporary_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    said = run("-c", JOIN, RAY_TMPDIR="/dev/null/x").stdout
    assert said.startswith("PlacementError Ray cannot start on this machine: "), said
    assert "/dev/null/x/ray (RAY_TMPDIR names another place)" in said
    assert "RAY_ADDRESS" not in said
