"""The groups of workers: how many, what each needs, and how long they are waited for."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Self

from pydantic import field_validator, model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_setting = partial(setting, "Cluster")


_NODE = re.compile(r"(\d+)x(\d+(?:\.\d+)?)(GiB|GB|G)?", re.IGNORECASE)


def described(text: str) -> tuple[tuple[int, int], ...]:
    """The cluster that `--cluster` describes: GPUs of each node, and bytes of each GPU.

    Raises:
        ConfigError: It is not written so.
    """
    nodes = []
    for part in text.split(","):
        node = _NODE.fullmatch(part.strip())
        if node is None or int(node[1]) < 1 or float(node[2]) <= 0:
            raise ConfigError(
                f"--cluster: {part.strip()!r} is no node: write GPUs x memory for each, such as "
                "8x80GiB,8x80GiB."
            )
        unit = 10**9 if (node[3] or "").upper() == "GB" else 2**30
        nodes.append((int(node[1]), int(float(node[2]) * unit)))
    return tuple(nodes)


_ENGINES = re.compile(r"(\d+)(?::(\d+))?")


def engines(text: str | int) -> tuple[int, int]:
    """The least and the most engines that `--rollout_workers` asks for; the same for one number.

    Raises:
        ConfigError: It is not written so, or asks for nothing.
    """
    found = _ENGINES.fullmatch(str(text).strip())
    if found is None:
        raise ConfigError(
            f"--rollout_workers: {text!r} is neither a number of engines, such as 4, nor the least and the "
            "most of them, such as 1:8."
        )
    least, most = int(found[1]), int(found[2] or found[1])
    if least < 1:
        raise ConfigError(f"--rollout_workers {text}: there must be one engine at least.")
    if least > most:
        raise ConfigError(
            f"--rollout_workers {text}: the least comes first, the most behind it: {most}:{least}."
        )
    return least, most


class ClusterOptions(Options):
    """Settings of all groups."""

    ray_address: str | None = _setting(
        None, "Ray cluster to connect to. Not set: RAY_ADDRESS, else a local one is started."
    )
    start_timeout: float = _setting(
        600.0, "Seconds that a worker may take to start and load its model.", gt=0
    )
    step_timeout: float = _setting(
        1800.0,
        "Seconds that one call to a worker may take while the run goes on: a generation, a training step, a "
        "weight "
        "update, a checkpoint.",
        gt=0,
    )

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
        for name in type(self).model_fields:
            gpus = getattr(self, name) if name.startswith("gpus_per_") else None
            if gpus is not None and gpus > 1 and not float(gpus).is_integer():
                raise ConfigError(
                    f"--{name} {gpus}: a worker takes a share of one GPU (up to 1) or whole GPUs."
                )
        return self

    @model_validator(mode="after")
    def _check_per_node(self) -> Self:
        for name in type(self).model_fields:
            if not name.endswith("_workers_per_node"):
                continue
            total = name.removesuffix("_per_node")
            each, workers = getattr(self, name), getattr(self, total)
            if each is not None and isinstance(workers, str):
                raise ConfigError(
                    f"--{name} {each}: how many engines a node gets cannot be said of --{total} {workers}, "
                    "which Ray places one by one: leave one of them out."
                )
            if each is not None and workers is not None and workers % each:
                raise ConfigError(f"--{total} {workers} is not a multiple of --{name} {each}.")
        return self


class PolicyGroupOptions(ClusterOptions):
    """The policy group, and what a run that has one can show beforehand."""

    dry_run: bool = _setting(
        False,
        "Show who would run where, and an estimate of GPU memory by phase, and end: no data is read, nothing "
        "is started. The same as raytune-rl plan before the command.",
    )
    cluster: str | None = _setting(
        None,
        "With --dry_run true: GPUs of a cluster that is not there, node by node: 8x80GiB,8x80GiB. Not set: "
        "this machine, or the cluster of --ray_address.",
    )
    snapshot_steps: int | None = _setting(
        None,
        "Optimizer steps from one snapshot of the policy (and of a critic) in the object store to the next: "
        "where a lost rank starts anew from, the steps since being done again. The driver's node gets a "
        "copy, for the loss of a node. Not set: each step, or as often as it costs under 5% of the time, "
        "where snapshots fill up to a third of the store. 0: none, and the loss of a rank begins the run "
        "again from its newest checkpoint.",
        ge=0,
    )
    max_restarts: int = _setting(
        10,
        "How often the ranks of policy or critic may be started anew in a run after one was lost or hung. "
        "Failures of data do not count. 0: the first loss ends the run.",
        ge=0,
    )
    hang_timeout: float = _setting(
        60.0,
        "Seconds without a sign of life after which a rank of policy or critic, a copy of the reference or "
        "of a teacher, a reward worker, or a rollout engine that has work, is taken for dead. One that works "
        "slowly gives signs. Of an engine on a CPU, where a long prompt is one step, 300 unless it is set. "
        "0: only --step_timeout counts.",
        ge=0,
    )
    policy_workers: int | None = _setting(
        None,
        "Ranks that train the policy. Not set: NPROC_PER_NODE, else chosen from what the cluster has.",
        ge=1,
    )
    policy_workers_per_node: int | None = _setting(
        None,
        "As many ranks on each node, and --policy_workers (if set) divided by this many nodes. Not set: one "
        "node is filled after the other.",
        ge=1,
    )
    gpus_per_policy_worker: float | None = _setting(
        None,
        "GPUs of one policy worker. Not set: 1 where there are GPUs, less where groups share them, else 0. "
        "0: train on CPUs although there are GPUs.",
        ge=0,
    )
    cpus_per_policy_worker: float | None = _setting(
        None, "CPU cores of one policy worker. Not set: chosen from what the cluster has.", gt=0
    )

    @model_validator(mode="after")
    def _check_dry_run(self) -> Self:
        if self.cluster is None:
            return self
        if not self.dry_run:
            raise ConfigError(
                "--cluster describes a cluster that is not there: add --dry_run true, or write raytune-rl "
                "plan before the command."
            )
        described(self.cluster)
        return self


class OnlineGroupsOptions(PolicyGroupOptions):
    """The groups that online RL adds."""

    rollout_workers: int | str | None = _setting(
        None,
        "vLLM engines. min:max, such as 1:8: from min at the start up to max where prompts wait, which Ray's "
        "autoscaler may bring nodes for, and back where engines idle. Not set: chosen from what the cluster "
        "has.",
        values="int|min:max",
    )
    rollout_grow_after: float | None = _setting(
        None,
        "With --rollout_workers min:max: seconds that prompts wait before the fleet asks for more engines. "
        "Not set: 30.",
        ge=0,
    )
    rollout_shrink_after: float | None = _setting(
        None,
        "With --rollout_workers min:max: seconds in which an engine is not needed once before its place is "
        "given back; longer than the policy trains between two generations. Not set: 300.",
        gt=0,
    )
    rollout_workers_per_node: int | None = _setting(
        None,
        "As many engines on each node, and --rollout_workers (if set) divided by this many nodes. Not set: "
        "one node is filled after the other, or each beside a policy rank.",
        ge=1,
    )
    reference_workers: int | None = _setting(
        None,
        "Copies of the reference model. Not set: as needed; none when --beta is 0, or when the reference is "
        "the policy with its LoRA adapter off.",
        ge=1,
    )
    reward_model_workers: int | None = _setting(
        None, "Processes that each hold the reward models. Not set: chosen from what the cluster has.", ge=1
    )
    reward_workers: int | None = _setting(None, "Processes that compute rewards. Not set: chosen.", ge=1)
    gpus_per_rollout_worker: float | None = _setting(
        None,
        "GPUs of one rollout worker. Not set: --vllm_tensor_parallel_size where it has GPUs of its own, a "
        "share of one where it sits beside the policy.",
        ge=0,
    )
    gpus_per_reference_worker: float | None = _setting(
        None, "GPUs of one reference worker. Not set: chosen from what the cluster has.", ge=0
    )
    gpus_per_reward_model_worker: float | None = _setting(
        None, "GPUs of one reward model worker. Not set: chosen from what the cluster has.", ge=0
    )
    cpus_per_rollout_worker: float | None = _setting(
        None, "CPU cores of one rollout worker. Not set: chosen from what the cluster has.", gt=0
    )
    cpus_per_reference_worker: float | None = _setting(
        None, "CPU cores of one reference worker. Not set: chosen from what the cluster has.", gt=0
    )
    cpus_per_reward_model_worker: float | None = _setting(
        None, "CPU cores of one reward model worker. Not set: chosen from what the cluster has.", gt=0
    )
    cpus_per_reward_worker: float | None = _setting(
        None, "CPU cores of one reward worker. Not set: chosen from what the cluster has.", gt=0
    )
    colocate: bool | None = _setting(
        None,
        "All groups that hold a model share the policy's GPUs (true) or have their own (false). Not set: "
        "--vllm_mode, else true, unless nodes are reserved for a role.",
    )

    @field_validator("rollout_workers", mode="before")
    @classmethod
    def _engines(cls, value: Any) -> Any:
        if value is None:
            return None
        least, most = engines(value)
        return least if least == most else f"{least}:{most}"

    @model_validator(mode="after")
    def _check_elastic(self) -> Self:
        elastic = isinstance(self.rollout_workers, str)
        for name in ("rollout_grow_after", "rollout_shrink_after"):
            if getattr(self, name) is not None and not elastic:
                raise ConfigError(
                    f"--{name} is about engines that come and go: add --rollout_workers min:max."
                )
        return self
