"""The order of starts on shared GPUs, played on devices that only count memory and who is loading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from raytune_rl.config import PPOConfig, RLHFConfig
from raytune_rl.groups import specs
from raytune_rl.groups.sizes import Groups, online_groups
from raytune_rl.groups.start_order import Part, Turn, start_in_turn, turns_of
from raytune_rl.runtime.cluster import ClusterInfo
from raytune_rl.runtime.placement import make_layout

THERE = 80
LOADING = {"policy": 50, "critic": 30, "reference": 16, "reward_model": 16}
"""GiB at a load's peak; half of it stays."""


class Devices:
    """GPUs of 80 GiB. Who loads must be alone in that; an engine takes its share of what there is."""

    def __init__(self, sizes: Groups, share: float) -> None:
        self.gpu_of = make_layout(sizes.specs).bundle_of
        self.engine = round(share * THERE)
        self.held: dict[tuple[str, int], tuple[int, int]] = {}
        self.loading: dict[int, Part] = {}
        self.events: list[str] = []

    def begin(self, part: Part) -> None:
        for rank in part.ranks:
            gpu = self.gpu_of[part.group][rank]
            if part.group == "reward":
                continue
            assert gpu not in self.loading, f"{part} loads beside {self.loading[gpu]}: {self.events}"
            self.loading[gpu] = part
            asked = self.engine if part.group == "rollout" else LOADING[part.group]
            used = sum(size for at, size in self.held.values() if at == gpu)
            assert used + asked <= THERE, f"{part} asks for {asked} beside {used}: {self.events}"
            self.held[part.group, rank] = gpu, asked
        self.events.append(f"{part.group} {list(part.ranks)}")

    def wait(self, part: Part) -> None:
        for rank in part.ranks:
            gpu, size = self.held.get((part.group, rank), (-1, 0))
            self.loading.pop(gpu, None)
            if part.group in LOADING:
                self.held[part.group, rank] = gpu, size // 2

    def sleep(self, part: Part) -> None:
        for rank in part.ranks:
            self.held[part.group, rank] = self.held[part.group, rank][0], 1
        self.events.append(f"asleep {list(part.ranks)}")


def groups_of(gpus: int, config: RLHFConfig) -> Groups:
    cluster = ClusterInfo(True, "", {"a": {"GPU": float(gpus), "CPU": 8.0 * gpus}}, 0, has_gpus=True)
    needs = ("ref_logprobs", "values") if isinstance(config, PPOConfig) else ("ref_logprobs",)
    return online_groups(config, cluster, needs)


def played(gpus: int, config: RLHFConfig, turns: Sequence[Turn] | None = None) -> list[str]:
    sizes = groups_of(gpus, config)
    devices = Devices(sizes, specs.gpu_share(config, sizes))
    sleeps = specs.sleep_level(config, sizes) > 0
    start_in_turn(turns_of(sizes) if turns is None else turns, devices, sleeps)
    return devices.events


BASE: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy", "train_type": "full"}


def test_engines_first_one_a_gpu_at_a_time_then_the_models_in_turn() -> None:
    config = PPOConfig(**BASE, reward_model="j", policy_workers=2, rollout_workers=4, reward_workers=1)
    assert played(2, config) == [
        "reward [0]",
        "rollout [0, 1]", "asleep [0, 1]", "rollout [2, 3]", "asleep [2, 3]",
        "policy [0, 1]", "critic [0, 1]", "reference [0, 1]", "reward_model [0, 1]",
    ]  # fmt: skip


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("engines_each", [1, 2, 3])
@pytest.mark.parametrize("kind", [RLHFConfig, PPOConfig])
def test_no_two_load_on_one_gpu(gpus: int, engines_each: int, kind: type[RLHFConfig]) -> None:
    beta = {} if kind is PPOConfig else {"beta": 0.1}
    config = kind(**BASE, **beta, rollout_workers=engines_each * gpus, gpus_per_rollout_worker=0.1)
    events = played(gpus, config)
    assert sum(event.startswith("rollout") for event in events) == engines_each
    assert events.index(f"policy {list(range(gpus))}") > 2 * engines_each


def test_the_devices_notice_what_the_order_prevents() -> None:
    config = RLHFConfig(**BASE, beta=0.1, rollout_workers=2, gpus_per_rollout_worker=0.1)
    with pytest.raises(AssertionError, match="loads beside"):
        played(1, config, [(Part("rollout", (0, 1)),), (Part("policy", (0,)),)])
    with pytest.raises(AssertionError, match="loads beside"):
        played(1, config, [(Part("rollout", (0,)), Part("policy", (0,))), (Part("reference", (0,)),)])
    awake = RLHFConfig(**BASE, beta=0.1, sleep_level=0)
    with pytest.raises(AssertionError, match=r"policy.* asks for 50 beside 40"):
        played(1, awake)


def test_who_shares_nothing_starts_at_once() -> None:
    apart = groups_of(4, RLHFConfig(**BASE, beta=0.1, colocate=False))
    (turn,) = turns_of(apart)
    assert [part.group for part in turn] == ["rollout", "reference", "reward", "policy"]
