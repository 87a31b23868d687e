"""Joining a Ray cluster, or starting one here, and reserving places on it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray.exceptions import AuthenticationError, GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from raytune_rl.errors import ConfigError, PlacementError
from raytune_rl.runtime import fork_server
from raytune_rl.runtime.health import health, watched
from raytune_rl.runtime.machine import make_token, missing_identity, ray_folder
from raytune_rl.runtime.placement import (
    GroupSpec,
    Layout,
    Node,
    Slot,
    check_fits,
    make_layout,
    neighbours_first,
    placement_message,
)
from raytune_rl.runtime.signals import kept_handlers

NAMESPACE = "raytune_rl"
NODE_ID = "ray.io/node-id"
"""The label that Ray gives every node."""


@dataclass(frozen=True)
class ClusterInfo:
    """The resources of the cluster.

    Attributes:
        started_here: True when this process started the cluster and will stop it.
        address: The address Ray reports.
        nodes: Resources that are free now, by node address.
        object_store_bytes: Object store of all nodes together.
        has_gpus: Whether any node has a GPU, be it free or not.
        ids: Ray's ids of the nodes, by the same names.
    """

    started_here: bool
    address: str
    nodes: dict[str, dict[str, float]]
    object_store_bytes: int
    has_gpus: bool = False
    ids: dict[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(have.get("GPU", 0.0) for have in self.nodes.values())

    @property
    def cpus(self) -> float:
        """CPU cores of all nodes."""
        return sum(have.get("CPU", 0.0) for have in self.nodes.values())


@contextmanager
def session(
    address: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    imports: Sequence[fork_server.Stage] = (),
) -> Iterator[ClusterInfo]:
    """Connects to the cluster at `address` or `RAY_ADDRESS`, or starts one on this machine for the time of
    the block.

    An already connected process (a script that called `ray.init` itself) is used as it is and left connected.

    Args:
        address: Of the head.
        say: Takes sentences for the user.
        imports: Made once for all workers of a cluster that is started here, if it has no GPU.

    Raises:
        PlacementError: The cluster at the address does not answer, or asks for a token; or none can be
            started here.
        ConfigError: The address is of another kind, or RAY_TMPDIR is too long.
    """
    joined = ray.is_initialized()
    stack = ExitStack()
    address = address or os.environ.get("RAY_ADDRESS")
    if not joined:
        identity = missing_identity(os.environ)
        if "HOME" in identity:
            say(f"this user has no home that can be written to: caches go to {identity['HOME']}")
        os.environ.update(identity)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A call with several results fails in each of them; `wait.fetch` reads one, and Ray would print a
        # traceback for every other.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        # Ray warns on every start that its own cluster asks for a token, which it hands out by itself.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        try:
            with kept_handlers():
                if address:
                    _join(address, identity)
                    _settled(say)
                else:
                    forked = bool(imports) and fork_server.possible()
                    python = stack.enter_context(fork_server.serving(imports)) if forked else None
                    _start_here(say, python)
        except BaseException:
            ray.shutdown()  # of its processes some may have started
            stack.close()
            raise
    try:
        info = describe(started_here=not joined and not address)
        with watched(info.address, info.started_here) as looking:
            stack.callback(looking.end)
            yield info
    finally:
        if not joined:
            ray.shutdown()
        stack.close()


_QUIET: dict[str, Any] = {"configure_logging": True, "logging_level": "WARNING", "log_to_driver": False}


def _join(address: str, identity: Mapping[str, str]) -> None:
    more = {"runtime_env": {"env_vars": dict(identity)}} if identity else {}
    try:
        _knock(address)
        ray.init(address=address, namespace=NAMESPACE, **_QUIET, **more)
    except (OSError, AuthenticationError, ValueError) as error:
        raise PlacementError(_unreachable(address, error)) from error


def _start_here(say: Callable[[str], None], python: str | None) -> None:
    more: dict[str, Any] = {}
    folder = ray_folder(os.environ)
    if folder is not None:
        say(f"TMPDIR={os.environ['TMPDIR']} is too long for Ray's sockets: its session lies in {folder}")
        # What does not fit into memory still goes where the user has room.
        more = {"_temp_dir": str(folder), "object_spilling_directory": os.environ["TMPDIR"]}
    if python is not None:
        more["runtime_env"] = {"py_executable": python}
    os.environ.update(make_token(os.environ))
    # Ray starts a worker a core ahead, without the environment that ours need, so that nobody ever uses them.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    try:
        # "local", or Ray would join whatever cluster somebody else started on this machine.
        ray.init(address="local", namespace=NAMESPACE, include_dashboard=False, **_QUIET, **more)
    except (OSError, AuthenticationError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise PlacementError(
            f"Ray cannot start on this machine: {reason}. It keeps sockets and logs in "
            f"{folder or get_default_ray_temp_dir()} (RAY_TMPDIR names another place), which must be "
            "writable and have room."
        ) from error


SETTLED_WITHIN_S = 60.0
"""Seconds that what a dead run held may take to be free, and a dead node to be known as one."""


def _settled(say: Callable[[str], None]) -> None:
    """Waits for what is gone to be gone in Ray's books too: the actors of drivers that died, such as this
    very command as it ran before, and nodes whose daemon no longer listens. Their places are counted then.
    """
    deadline = time.monotonic() + SETTLED_WITHIN_S
    told = False
    while (rest := _unsettled()) and time.monotonic() < deadline:
        if not told:
            say(f"waiting for what is gone: {rest}")
            told = True
        time.sleep(0.5)


def _unsettled() -> str:
    """What Ray still counts although it is gone; empty for nothing."""
    state = ray._private.state
    over = {job["JobID"] for job in state.jobs() if job["IsDead"]}
    listed = [a for a in state.actors().values() if a["JobID"] in over and not a["IsDetached"]]
    actors = sum(actor["State"] != "DEAD" for actor in listed)
    if actors:
        return f"{actors} actor(s) of a run that has ended"
    for node in ray.nodes():
        if node["Alive"] and not _listens(node["NodeManagerAddress"], node["NodeManagerPort"]):
            return f"node {node['NodeManagerAddress']}"
    return ""


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True  # it may be slow, or not to be reached from here
    return True


def _knock(address: str) -> None:
    """Fails in seconds where nobody listens; Ray itself would go on trying for minutes.

    Raises:
        ConfigError: The address is of another kind than a driver connects to.
        OSError: Nobody listens there.
    """
    if "://" in address:
        raise ConfigError(
            f"{address!r} is not an address a run can join (RAY_ADDRESS or --ray_address): give the head's "
            "own address, such as 10.0.0.1:6379, or send the command to the cluster by `ray job submit`."
        )
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _unreachable(address: str, error: Exception) -> str:
    """Why no cluster could be joined, and what to try."""
    reason = str(error).partition("\n")[0].rstrip(".")
    lines = [f"no Ray cluster answers at {address!r}: {reason}."]
    somebody_listens = not isinstance(error, ValueError) and getattr(error, "errno", None) is None
    if somebody_listens and os.environ.get("RAY_AUTH_MODE") != "token":
        lines.append(
            "A cluster that was started where ~/.ray/auth_token exists asks for that token: set "
            "RAY_AUTH_MODE=token."
        )
    lines.append(
        "Start one with `ray start --head`, or unset RAY_ADDRESS and --ray_address to run on this machine "
        "alone."
    )
    return "\n".join(lines)


def describe(started_here: bool = False) -> ClusterInfo:
    """Reads the free resources of every living node."""
    nodes: dict[str, dict[str, float]] = {}
    ids: dict[str, str] = {}
    store = 0
    has_gpus = False
    free_by_id = ray._private.state.available_resources_per_node()
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        total = node["Resources"]
        has_gpus |= total.get("GPU", 0.0) > 0
        store += int(total.get("object_store_memory", 0))
        free = free_by_id.get(node["NodeID"], total)
        name = node["NodeManagerAddress"]
        if name in nodes:  # several logical nodes of one machine, as in tests
            name = f"{name} ({node['NodeID'][:6]})"
        nodes[name] = {k: float(v) for k, v in free.items() if _is_schedulable(k)}
        ids[name] = node["NodeID"]
    return ClusterInfo(started_here, ray.get_runtime_context().gcs_address, nodes, store, has_gpus, ids)


@contextmanager
def reserve(groups: Sequence[GroupSpec], timeout_s: float) -> Iterator[dict[str, list[Slot]]]:
    """Reserves a place for every worker of every group, and gives them back at the end.

    Slots of a group are in rank order: ranks of a node are neighbours.

    Raises:
        PlacementError: The cluster cannot hold the groups, or did not make room within `timeout_s` seconds.
    """
    layout = make_layout(groups)
    cluster = describe()
    pinned = check_fits(layout, groups, cluster.nodes)
    where = [{NODE_ID: cluster.ids[pinned[i]]} if i in pinned else {} for i in range(len(layout.bundles))]
    bundles = [dict(bundle) for bundle in layout.bundles]
    reserved = placement_group(bundles, strategy="PACK", bundle_label_selector=where if pinned else None)
    try:
        _await_reservation(reserved, groups, timeout_s)
        slots = slots_of(reserved, layout)
        health().watch(slots)
        yield slots
    finally:
        if health().lost is None:  # else the books may never be right again, or not answer
            _give_back(reserved, layout)


def _give_back(reserved: PlacementGroup, layout: Layout, timeout_s: float = 5.0) -> None:
    """Ends a reservation and waits until Ray's books show it: a second run that begins at once must not find
    the places taken. On a busy cluster somebody else may have them by then, so the wait is short.
    """
    names = {name for bundle in layout.bundles for name in bundle}
    due = {
        name: resources_of(describe().nodes, name) + sum(b.get(name, 0.0) for b in layout.bundles)
        for name in names
    }
    remove_placement_group(reserved)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        nodes = describe().nodes
        if all(resources_of(nodes, name) > amount - 1e-3 for name, amount in due.items()):
            return
        time.sleep(0.05)


def slots_of(reserved: PlacementGroup, layout: Layout) -> dict[str, list[Slot]]:
    """The slots of a ready placement group, by group, in rank order."""
    address_of = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes()}
    node_of_bundle = {
        int(index): Node(address_of[node], node)
        for index, node in placement_group_table(reserved)["bundles_to_node_id"].items()
    }
    return {
        name: [Slot(reserved, i, node_of_bundle[i]) for i in neighbours_first(node_of_bundle, bundles)]
        for name, bundles in layout.bundle_of.items()
    }


def _await_reservation(reserved: PlacementGroup, groups: Sequence[GroupSpec], timeout_s: float) -> None:
    try:
        ray.get(reserved.ready(), timeout=timeout_s)
    except GetTimeoutError as error:
        raise PlacementError(
            f"no room within {timeout_s:.0f} s (--start_timeout): "
            + placement_message(None, groups, describe().nodes)
        ) from error


def _is_schedulable(resource: str) -> bool:
    hidden = ("memory", "object_store_memory")
    return resource not in hidden and not resource.startswith(("node:", "bundle", "CPU_group", "GPU_group"))


def resources_of(nodes: Mapping[str, Mapping[str, float]], name: str) -> float:
    """Sum of one resource over nodes."""
    return sum(have.get(name, 0.0) for have in nodes.values())
