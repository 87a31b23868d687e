"""The order in which those that share a GPU take and give its memory, on a device that is only counted."""

from __future__ import annotations

from typing import Any, cast

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.groups.gpu_sharing import GPUSharing
from raytune_rl.groups.sizes import online_groups
from raytune_rl.runtime.cluster import ClusterInfo

GPU = ClusterInfo(True, "", {"a": {"GPU": 1.0, "CPU": 8.0}}, 0, has_gpus=True)


class Device:
    """A GPU of 80 GiB, of which the engine takes 40 and the policy 50, as they say when they move."""

    def __init__(self, asleep: bool) -> None:
        self.held = {"rollout": 0 if asleep else 40, "policy": 50 if asleep else 30}
        self.events: list[str] = []

    def take(self, who: str, size: int) -> None:
        self.held[who] = size
        self.events.append(f"{who} {size}")
        assert sum(self.held.values()) <= 80, f"{self.held} is more than there is, after {self.events}"

    def sleep(self) -> None:
        self.take("rollout", 0)

    def wake(self) -> None:
        self.take("rollout", 40)

    def offload(self, weights: bool, optimizer: bool) -> None:
        self.take("policy", 50 - 20 * weights - 30 * optimizer)

    def reload(self) -> None:
        self.take("policy", 50)


class Scorer:
    """A model beside them that is only asked: 16 GiB of weights, and a cache of 4 once it was."""

    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name
        device.held[name] = 16

    def ask(self) -> None:
        self.device.take(self.name, 20)

    def empty_cache(self) -> None:
        self.device.take(self.name, 16)

    def offload(self, weights: bool) -> None:
        self.device.take(self.name, 0 if weights else 16)

    def reload(self) -> None:
        self.device.take(self.name, 16)


def shared(
    device: Device, reference: Scorer | None = None, judge: Scorer | None = None, **settings: Any
) -> GPUSharing:
    config = RLHFConfig(model="m", dataset="d", reward_funcs="accuracy", **settings)
    groups = online_groups(config, GPU, ())
    held: Any = device
    return GPUSharing(
        config, groups, held, held, [] if reference is None else [cast(Any, reference)], cast(Any, judge)
    )


def test_nobody_takes_memory_before_it_was_given() -> None:
    device = Device(asleep=True)
    sharing = shared(device, offload_model=True, offload_optimizer=True)
    sharing.to_policy()
    assert device.events == [], "an engine sleeps from its start, and the policy is there"
    assert sharing.to_rollout(), "it woke up, and has no weights"
    sharing.to_policy()
    sharing.to_policy()
    sharing.to_rollout()
    assert device.events == [
        "policy 0", "rollout 40",
        "rollout 0", "policy 50",
        "policy 0", "rollout 40",
    ]  # fmt: skip


def test_the_device_notices_when_both_want_all() -> None:
    sharing = shared(Device(asleep=True))
    with pytest.raises(AssertionError, match="more than there is"):
        sharing.to_rollout()  # nothing was offloaded


def test_who_is_told_not_to_sleep_stays() -> None:
    device = Device(asleep=False)
    sharing = shared(device, sleep_level=0)
    sharing.to_policy()
    assert not sharing.to_rollout()
    assert device.events == []


def test_the_caches_of_all_are_empty_before_an_engine_wakes() -> None:
    device = Device(asleep=True)
    device.held["policy"] = 0
    reference, judge = Scorer(device, "reference"), Scorer(device, "judge")
    sharing = shared(device, reference, judge, offload_optimizer=True)
    device.held["policy"] = 30
    reference.ask()
    judge.ask()
    device.events.clear()
    device.offload = lambda weights, optimizer: device.take("policy", 8)  # type: ignore[method-assign]
    sharing.to_rollout()
    assert device.events == ["policy 8", "reference 16", "judge 16", "rollout 40"]


def test_a_reference_moves_with_the_policys_weights_and_reward_models_stay() -> None:
    device = Device(asleep=True)
    device.held["policy"] = 48
    sharing = shared(
        device,
        Scorer(device, "reference"),
        Scorer(device, "judge"),
        offload_model=True,
        offload_optimizer=True,
    )
    device.events.clear()
    sharing.to_rollout()
    assert device.events == ["policy 0", "reference 0", "judge 16", "rollout 40"]
    device.events.clear()
    device.reload = lambda: device.take("policy", 48)  # type: ignore[method-assign]
    sharing.to_policy()
    assert device.events == ["rollout 0", "policy 48", "reference 16"]
