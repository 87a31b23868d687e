"""How a run divides a cluster: what is chosen, what the user overrules, and that all of it can be placed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raytune_rl.config import PPOConfig, PreferenceConfig, RLHFConfig, SFTConfig
from raytune_rl.errors import ConfigError, PlacementError
from raytune_rl.groups import specs
from raytune_rl.groups.growth import check_growth
from raytune_rl.groups.scaling import Bounds
from raytune_rl.groups.sizes import Groups, offline_groups, online_groups
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.runtime.cluster import ClusterInfo
from raytune_rl.runtime.placement import check_fits, make_layout

TRAIN: dict[str, Any] = {"model": "m", "dataset": "d", "per_device_train_batch_size": 8}


def cluster(*nodes: dict[str, float]) -> ClusterInfo:
    named = {f"10.0.0.{n}": dict(have) for n, have in enumerate(nodes, start=1)}
    return ClusterInfo(False, "10.0.0.1:6379", named, 0, has_gpus=any("GPU" in have for have in nodes))


def online(where: ClusterInfo, **settings: Any) -> Groups:
    full = {"train_type": "full", "reward_funcs": "accuracy"}
    config = RLHFConfig(**{**TRAIN, **full, **settings})
    return online_groups(config, where, algorithm_of(config).needs)


def ppo(where: ClusterInfo, **settings: Any) -> Groups:
    full = {"train_type": "full", "reward_funcs": "accuracy"}
    config = PPOConfig(**{**TRAIN, **full, **settings})
    return online_groups(config, where, algorithm_of(config).needs)


def sft(where: ClusterInfo, **settings: Any) -> Groups:
    return offline_groups(SFTConfig(**TRAIN, **settings), where)


def counts(groups: Groups) -> dict[str, int]:
    return {spec.name: spec.workers for spec in groups.specs}


def gpus(groups: Groups) -> dict[str, float]:
    return {spec.name: spec.gpus for spec in groups.specs if spec.gpus}


def assert_fits(groups: Groups, where: ClusterInfo) -> None:
    check_fits(make_layout(groups.specs), groups.specs, where.nodes)


LAPTOP = cluster({"CPU": 2})
ONE_GPU = cluster({"CPU": 8, "GPU": 1})
EIGHT_GPUS = cluster({"CPU": 96, "GPU": 8})


# -- one machine -------------------------------------------------------------------------------------------


def test_without_a_gpu_one_worker_of_each_role_takes_its_turn_on_all_cores() -> None:
    groups = online(LAPTOP)
    assert counts(groups) == {"policy": 1, "rollout": 1, "reference": 1, "reward": 1}
    assert not groups.on_gpu
    assert gpus(groups) == {}
    assert [spec.cpus for spec in groups.specs] == [0.5] * 4, "a sliver each, so that all are let in"
    assert groups.threads == {"policy": 2, "rollout": 2, "reference": 2, "reward": 1}, "and all threads"
    assert_fits(groups, LAPTOP)


def test_without_a_kl_term_there_is_no_reference() -> None:
    for where in (LAPTOP, ONE_GPU, EIGHT_GPUS):
        assert "reference" not in online(where, beta=0.0)
    assert gpus(online(ONE_GPU, beta=0.0)) == {"policy": 0.7, "rollout": 0.3}


def test_an_adapter_needs_no_second_copy_unless_the_reference_is_another_model() -> None:
    for where in (LAPTOP, ONE_GPU, EIGHT_GPUS):
        assert "reference" not in online(where, train_type="lora")
        assert "reference" not in ppo(where, train_type="lora")
    for another in (
        {"adapters": ["a"]},
        {"ref_model": "r"},
        {"ref_adapters": ["a"]},
        {"reference_workers": 1},
    ):
        assert counts(online(ONE_GPU, train_type="lora", **another))["reference"] == 1
        assert "reference" not in online(ONE_GPU, train_type="lora", beta=0.0, **another)


@pytest.mark.parametrize(("where", "number"), [(ONE_GPU, 1), (EIGHT_GPUS, 8)])
def test_groups_share_every_gpu_and_leave_none_over(where: ClusterInfo, number: int) -> None:
    groups = online(where)
    assert groups.colocated
    assert {k: v for k, v in counts(groups).items() if k != "reward"} == {
        "policy": number,
        "rollout": number,
        "reference": number,
    }
    assert gpus(groups) == {"policy": 0.4, "rollout": 0.3, "reference": 0.3}
    layout = make_layout(groups.specs)
    assert [b["GPU"] for b in layout.bundles if "GPU" in b] == [1.0] * number
    assert_fits(groups, where)


def test_apart_half_of_the_gpus_sample() -> None:
    groups = online(EIGHT_GPUS, colocate=False)
    assert not groups.colocated
    assert counts(groups) == {"policy": 4, "rollout": 3, "reference": 1, "reward": 16}
    assert gpus(groups) == {"policy": 1.0, "rollout": 1.0, "reference": 1.0}
    assert counts(online(EIGHT_GPUS, colocate=False, beta=0.0))["rollout"] == 4
    assert_fits(groups, EIGHT_GPUS)


def test_an_engine_over_several_gpus() -> None:
    groups = online(EIGHT_GPUS, colocate=False, beta=0.0, vllm_tensor_parallel_size=2)
    assert counts(groups) == {"policy": 4, "rollout": 2, "reward": 16}
    assert gpus(groups) == {"policy": 1.0, "rollout": 2.0}
    with pytest.raises(ConfigError, match="--colocate false"):
        online(EIGHT_GPUS, vllm_tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="needs 2 GPUs for each engine, but --gpus_per_rollout_worker is 1"):
        online(EIGHT_GPUS, colocate=False, vllm_tensor_parallel_size=2, gpus_per_rollout_worker=1)


@pytest.mark.parametrize(("policy", "rollout"), [(2, 6), (6, 2)])
def test_a_number_that_is_given_decides_the_other(policy: int, rollout: int) -> None:
    for given in ({"policy_workers": policy}, {"rollout_workers": rollout}):
        groups = online(EIGHT_GPUS, colocate=False, beta=0.0, **given)
        assert (counts(groups)["policy"], counts(groups)["rollout"]) == (policy, rollout)
        assert_fits(groups, EIGHT_GPUS)


def test_several_engines_beside_one_policy_worker_share_the_engines_part() -> None:
    groups = online(EIGHT_GPUS, policy_workers=4, rollout_workers=8)
    assert gpus(groups) == {"policy": 0.4, "rollout": 0.15, "reference": 0.3}
    assert [b["GPU"] for b in make_layout(groups.specs).bundles if "GPU" in b] == [1.0] * 4


def test_what_an_engine_takes_of_a_gpus_memory() -> None:
    def share(**settings: Any) -> float:
        config = RLHFConfig(**TRAIN, reward_funcs="accuracy", **settings)
        return specs.gpu_share(config, online_groups(config, EIGHT_GPUS, algorithm_of(config).needs))

    assert share() == 0.5, "the policy is there too"
    assert share(policy_workers=4, rollout_workers=8) == 0.25, "and so is another engine"
    assert share(colocate=False) == 0.9
    assert share(vllm_gpu_memory_utilization=0.7) == 0.7


def test_shared_gpus_are_never_divided_beyond_one() -> None:
    assert gpus(online(ONE_GPU, gpus_per_rollout_worker=0.5))["policy"] == 0.2
    with pytest.raises(ConfigError, match=r"0\.5 for rollout and 1 x 0\.6 for reference leave 0 of it"):
        online(ONE_GPU, gpus_per_rollout_worker=0.5, gpus_per_reference_worker=0.6)
    with pytest.raises(
        ConfigError, match=r"leave 0\.4 of it for a policy worker, which asks for 1.*--colocate"
    ):
        online(EIGHT_GPUS, gpus_per_policy_worker=1)


def test_too_few_gpus_for_groups_of_their_own() -> None:
    with pytest.raises(PlacementError, match=r"1 GPU\(s\) cannot hold .*reference.*--colocate true"):
        online(ONE_GPU, colocate=False)


def test_busy_gpus_are_not_taken_for_no_gpus() -> None:
    busy = ClusterInfo(False, "", {"10.0.0.1": {"CPU": 96, "GPU": 0}}, 0, has_gpus=True)
    groups = online(busy)
    assert groups.on_gpu
    with pytest.raises(PlacementError, match=r"policy: 1 worker\(s\), each 0\.01 CPU, 0\.4 GPU"):
        assert_fits(groups, busy)


def test_everything_can_be_overruled() -> None:
    groups = online(
        EIGHT_GPUS,
        colocate=False,
        policy_workers=3,
        rollout_workers=2,
        reference_workers=2,
        reward_workers=5,
        gpus_per_rollout_worker=2,
        gpus_per_reference_worker=0.5,
        cpus_per_policy_worker=7,
        cpus_per_reward_worker=2,
    )
    assert counts(groups) == {"policy": 3, "rollout": 2, "reference": 2, "reward": 5}
    assert gpus(groups) == {"policy": 1.0, "rollout": 2.0, "reference": 0.5}
    assert {spec.name: spec.cpus for spec in groups.specs} == {
        "policy": 7.0,
        "rollout": 1.0,
        "reference": 1.0,
        "reward": 2.0,
    }
    assert_fits(groups, EIGHT_GPUS)


def test_a_cluster_with_gpus_may_be_told_to_use_its_cores() -> None:
    groups = online(EIGHT_GPUS, gpus_per_policy_worker=0)
    assert not groups.on_gpu
    assert gpus(groups) == {}


# -- cores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [2, 3, 4, 7, 16, 24, 30])
def test_eight_gpus_with_few_cores_still_fit(cores: int) -> None:
    where = cluster({"CPU": cores, "GPU": 8})
    assert_fits(online(where), where)
    assert_fits(online(where, colocate=False), where)
    assert_fits(sft(where), where)


@pytest.mark.parametrize("cores", [(1, 1), (2, 2), (1, 3), (1, 1, 1)])
def test_cores_are_shared_out_by_node(cores: tuple[int, ...]) -> None:
    """Five workers on two nodes of two cores: 4/5 of a core each would let in only four."""
    where = cluster(*({"CPU": n} for n in cores))
    groups = online(where, policy_workers=2)
    assert sum(counts(groups).values()) == 5
    assert_fits(groups, where)


# -- several nodes -----------------------------------------------------------------------------------------


def test_two_nodes_of_eight_gpus() -> None:
    where = cluster({"CPU": 96, "GPU": 8}, {"CPU": 96, "GPU": 8})
    assert counts(online(where)) == {"policy": 16, "rollout": 16, "reference": 16, "reward": 16}
    apart = online(where, colocate=False)
    assert counts(apart) == {"policy": 7, "rollout": 7, "reference": 2, "reward": 16}
    assert counts(sft(where)) == {"policy": 16}
    for groups in (online(where), apart, sft(where)):
        assert_fits(groups, where)


def test_nodes_reserved_for_a_role_decide_where_it_runs() -> None:
    where = cluster({"CPU": 48, "GPU": 8, "policy": 8}, {"CPU": 48, "GPU": 8, "rollout": 8})
    groups = online(where, vllm_tensor_parallel_size=2)
    assert not groups.colocated, "their GPUs cannot be shared"
    assert groups["policy"].resources == {"policy": 1.0}
    assert groups["rollout"].resources == {"rollout": 1.0}
    assert groups["reference"].resources == {}
    assert counts(groups) == {"policy": 8, "rollout": 3, "reference": 2, "reward": 16}
    assert_fits(groups, where)


def per_node(groups: Groups) -> dict[str, int]:
    return {spec.name: spec.per_node for spec in groups.specs if spec.per_node}


def test_so_many_on_each_node() -> None:
    where = cluster({"CPU": 96, "GPU": 8}, {"CPU": 96, "GPU": 8})
    each = {"policy_workers_per_node": 4, "rollout_workers_per_node": 4}
    groups = online(where, colocate=False, beta=0.0, **each)
    assert counts(groups) == {"policy": 8, "rollout": 8, "reward": 16}
    assert per_node(groups) == {"policy": 4, "rollout": 4}
    assert_fits(groups, where)
    placed = check_fits(make_layout(groups.specs), groups.specs, where.nodes)
    for bundles in ([0, 1, 2, 3], [8, 9, 10, 11]):
        assert {placed[bundle] for bundle in bundles} == {"10.0.0.1"}
    assert counts(online(where, colocate=False, beta=0.0, policy_workers=4, **each))["rollout"] == 8
    one = online(where, colocate=False, beta=0.0, policy_workers_per_node=2)
    assert counts(one) == {"policy": 4, "rollout": 12, "reward": 16}, "the others take what is left"
    assert_fits(one, where)
    assert counts(sft(where, policy_workers_per_node=3)) == {"policy": 6}
    assert per_node(sft(where, policy_workers_per_node=3)) == {"policy": 3}


def test_so_many_on_each_node_where_groups_share_gpus() -> None:
    where = cluster({"CPU": 96, "GPU": 8}, {"CPU": 96, "GPU": 8})
    groups = online(where, policy_workers_per_node=4)
    assert {k: v for k, v in counts(groups).items() if k != "reward"} == dict.fromkeys(
        ("policy", "rollout", "reference"), 8
    )
    assert per_node(groups) == {"policy": 4}, "the others sit beside it"
    groups = online(where, policy_workers_per_node=4, rollout_workers_per_node=8)
    assert (counts(groups)["rollout"], gpus(groups)["rollout"]) == (16, 0.15)
    assert_fits(groups, where)
    for wrong in (
        {"rollout_workers_per_node": 4},
        {"policy_workers_per_node": 4, "rollout_workers_per_node": 2},
        {"policy_workers_per_node": 4, "rollout_workers_per_node": 4, "rollout_workers": 4},
    ):
        with pytest.raises(ConfigError, match=r"--policy_workers_per_node.*--colocate false"):
            online(where, **wrong)


def test_so_many_on_each_node_without_gpus_or_on_nodes_of_a_role() -> None:
    where = cluster({"CPU": 0}, {"CPU": 8}, {"CPU": 8})
    groups = online(where, policy_workers_per_node=2, rollout_workers_per_node=1)
    assert counts(groups) == {"policy": 4, "rollout": 2, "reference": 1, "reward": 4}
    assert_fits(groups, where)
    policy = {"CPU": 48, "GPU": 8, "policy": 8}
    where = cluster(policy, policy, {"CPU": 48, "GPU": 8, "rollout": 8})
    groups = online(where, beta=0.0, policy_workers_per_node=4, rollout_workers_per_node=6)
    assert counts(groups) == {"policy": 8, "rollout": 6, "reward": 16}
    assert_fits(groups, where)


def test_numbers_that_follow_the_nodes_of_a_role() -> None:
    policy = {"CPU": 48, "GPU": 8, "policy": 8}
    rollout = {"CPU": 48, "GPU": 8, "rollout": 8}
    for nodes in (1, 2):
        where = cluster({"CPU": 0}, *([policy] * nodes), *([rollout] * nodes))
        groups = online(
            where,
            policy_workers_per_node=8,
            rollout_workers_per_node=7,
            reference_workers=nodes,
            colocate=False,
        )
        assert (counts(groups)["policy"], counts(groups)["rollout"]) == (8 * nodes, 7 * nodes)
        assert_fits(groups, where)


def test_more_on_each_node_than_it_has() -> None:
    where = cluster({"CPU": 96, "GPU": 8}, {"CPU": 96, "GPU": 4})
    with pytest.raises(
        PlacementError, match=r"policy: 16 worker\(s\), each 0\.01 CPU, 1 GPU, 8 on each of 2 node"
    ):
        assert_fits(sft(where, policy_workers=16, policy_workers_per_node=8), where)
    assert_fits(sft(where, policy_workers_per_node=8), where)
    with pytest.raises(
        ConfigError, match=r"--policy_workers 6 is not a multiple of --policy_workers_per_node 4"
    ):
        sft(where, policy_workers=6, policy_workers_per_node=4)


def test_a_role_that_no_node_declares_runs_anywhere() -> None:
    assert all(spec.resources == {} for spec in online(EIGHT_GPUS).specs)


# -- supervised --------------------------------------------------------------------------------------------


def test_supervised_training_takes_every_gpu() -> None:
    assert counts(sft(EIGHT_GPUS)) == {"policy": 8}
    assert gpus(sft(EIGHT_GPUS)) == {"policy": 1.0}
    assert counts(sft(LAPTOP)) == {"policy": 1}
    assert sft(LAPTOP).threads == {"policy": 2}
    assert sft(LAPTOP, policy_workers=2).threads == {"policy": 1}


def preference(where: ClusterInfo, **settings: Any) -> Groups:
    return offline_groups(PreferenceConfig(**TRAIN, **settings), where)


def test_a_reference_of_its_own_sits_beside_the_policy() -> None:
    where = cluster({"CPU": 32.0, "GPU": 4.0}, {"CPU": 32.0, "GPU": 4.0})
    assert counts(preference(where)) == {"policy": 8}
    assert gpus(preference(where)) == {"policy": 1.0}
    found = preference(where, ref_model="r")
    assert counts(found) == {"policy": 8, "reference": 8}
    assert gpus(found) == {"policy": 0.7, "reference": 0.3}
    assert found["reference"].colocate_with == "policy"
    assert_fits(found, where)
    few = preference(where, ref_model="r", policy_workers=4, reference_workers=2)
    assert counts(few) == {"policy": 4, "reference": 2}
    assert counts(preference(where, rlhf_type="orpo", ref_model="r")) == {"policy": 8}
    on_cpu = preference(cluster({"CPU": 2.0}), ref_adapters=["a"])
    assert counts(on_cpu) == {"policy": 1, "reference": 1}
    assert_fits(on_cpu, cluster({"CPU": 2.0}))


# -- critic and reward models ------------------------------------------------------------------------------


def test_ppo_has_a_critic_on_every_machine() -> None:
    groups = ppo(LAPTOP)
    assert counts(groups) == {"policy": 1, "rollout": 1, "reference": 1, "critic": 1, "reward": 1}
    assert_fits(groups, LAPTOP)
    for where, number in ((ONE_GPU, 1), (EIGHT_GPUS, 8)):
        groups = ppo(where)
        assert {k: v for k, v in counts(groups).items() if k != "reward"} == dict.fromkeys(
            ("policy", "rollout", "reference", "critic"), number
        )
        assert gpus(groups) == {"policy": 0.1, "rollout": 0.3, "reference": 0.3, "critic": 0.3}
        assert [b["GPU"] for b in make_layout(groups.specs).bundles if "GPU" in b] == [1.0] * number
        assert_fits(groups, where)
    assert "reference" not in ppo(LAPTOP, kl_coef=0.0)


def test_apart_the_critic_has_as_many_gpus_as_the_policy_unless_told() -> None:
    groups = ppo(EIGHT_GPUS, colocate=False)
    assert {k: v for k, v in counts(groups).items() if k != "reward"} == {
        "policy": 2,
        "rollout": 3,
        "critic": 2,
        "reference": 1,
    }
    assert_fits(groups, EIGHT_GPUS)
    groups = ppo(EIGHT_GPUS, colocate=False, critic_workers=1, policy_workers=3)
    assert {k: v for k, v in counts(groups).items() if k != "reward"} == {
        "policy": 3,
        "rollout": 3,
        "critic": 1,
        "reference": 1,
    }
    with pytest.raises(PlacementError, match=r"1 reference worker\(s\) of 1, a critic worker of 1 on GPUs"):
        ppo(cluster({"CPU": 8, "GPU": 3}), colocate=False)


def test_reward_models_have_a_group_and_may_stand_alone() -> None:
    groups = online(LAPTOP, reward_model="rm")
    assert counts(groups)["reward_model"] == 1
    config = RLHFConfig(**TRAIN, train_type="full", reward_model=("a", "b"))
    groups = online_groups(config, EIGHT_GPUS, algorithm_of(config).needs)
    assert counts(groups) == {"policy": 8, "rollout": 8, "reference": 8, "reward_model": 8}
    assert_fits(groups, EIGHT_GPUS)
    groups = ppo(ONE_GPU, reward_model="rm")
    assert gpus(groups)["critic"] == 0.22
    assert_fits(groups, ONE_GPU)
    groups = ppo(EIGHT_GPUS, colocate=False, reward_model="rm", reward_funcs=())
    assert_fits(groups, EIGHT_GPUS)
    assert sum(groups[name].gpus * groups[name].workers for name in counts(groups)) <= 8


# -- engines that come and go --------------------------------------------------------------------------------


def here(where: ClusterInfo) -> ClusterInfo:
    return replace(where, started_here=True)


def test_engines_that_come_and_go_start_with_the_least_and_are_placed_one_by_one() -> None:
    groups = online(EIGHT_GPUS, beta=0.0, rollout_workers="1:4", policy_workers=4)
    assert counts(groups) == {"policy": 4, "rollout": 1, "reward": 16}
    assert gpus(groups) == {"policy": 1.0, "rollout": 1.0}
    assert not groups.colocated, "they have GPUs of their own, unasked"
    assert [spec.name for spec in groups.fixed] == ["policy", "reward"]
    assert groups.elastic == Bounds(1, 4)
    assert check_growth(groups, here(EIGHT_GPUS)) == []
    fixed = online(EIGHT_GPUS, beta=0.0, rollout_workers=4, policy_workers=4, colocate=False)
    assert fixed.elastic is None
    assert fixed.fixed == fixed.grown() == fixed.specs
    assert [(s.workers, s.gpus, s.cpus, s.resources) for s in groups.grown()] == [
        (s.workers, s.gpus, s.cpus, s.resources) for s in fixed.specs
    ], "as many engines from the start need the same"


def test_cores_and_threads_are_shared_out_for_the_most_engines() -> None:
    groups = online(LAPTOP, beta=0.0, rollout_workers="1:3")
    assert [spec.cpus for spec in groups.specs] == [0.25] * 3, "five workers in the end"
    assert groups.threads["rollout"] == 1
    assert check_growth(groups, here(LAPTOP)) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [("1:8", "room for 4 engine(s) beside the other groups, and no autoscaler could add one: write 1:4"),
     ("5:8", "room for 4 engine(s) beside the other groups, and no autoscaler could add one: write 4,")],
)  # fmt: skip
def test_one_machine_cannot_grow(asked: str, said: str) -> None:
    groups = online(EIGHT_GPUS, beta=0.0, rollout_workers=asked, policy_workers=4)
    with pytest.raises(ConfigError) as error:
        check_growth(groups, here(EIGHT_GPUS))
    assert f"--rollout_workers {asked}: this machine has {said}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cluster_may_grow() -> None:
    """An autoscaler, or somebody who starts Ray on another machine."""
    groups = online(EIGHT_GPUS, beta=0.0, rollout_workers="1:8", policy_workers=4)
    (notice,) = check_growth(groups, EIGHT_GPUS)
    assert notice.startswith("--rollout_workers 1:8: the cluster has room for 4 engine(s) now; others start")
    full = online(EIGHT_GPUS, beta=0.0, rollout_workers="1:8", policy_workers=7)
    (notice,) = check_growth(full, cluster({"CPU": 96, "GPU": 7}))
    assert "has room for 0 engine(s) now, and the run starts with 1;" in notice


def test_who_trains_is_said_where_engines_grow_into_the_same_nodes() -> None:
    with pytest.raises(ConfigError, match=r"1:4: engines grow into the GPUs that nobody trains on: say with"):
        online(EIGHT_GPUS, rollout_workers="1:4")
    where = cluster({"CPU": 96, "GPU": 8, "policy": 8}, {"CPU": 96, "GPU": 8, "rollout": 8})
    groups = online(where, beta=0.0, rollout_workers="2:4")
    assert (counts(groups)["policy"], counts(groups)["rollout"]) == (8, 2), "nodes of a role say it"
    assert groups["rollout"].resources == {"rollout": 1.0}
