"""Where workers go: the arithmetic, without Ray."""

from __future__ import annotations

import pytest

from raytune_rl.errors import PlacementError
from raytune_rl.runtime.placement import (
    GroupSpec,
    Node,
    check_fits,
    find_homeless,
    make_layout,
    neighbours_first,
)

NODES = {"10.0.0.1": {"CPU": 8.0, "GPU": 4.0}, "10.0.0.2": {"CPU": 8.0}}


def test_each_worker_has_a_bundle_of_its_own() -> None:
    layout = make_layout([GroupSpec("policy", 2, cpus=1, gpus=1), GroupSpec("reward", 3, cpus=0.5)])
    assert layout.bundles == ({"CPU": 1, "GPU": 1},) * 2 + ({"CPU": 0.5},) * 3
    assert layout.bundle_of == {"policy": (0, 1), "reward": (2, 3, 4)}


def test_colocated_workers_add_to_their_hosts_bundle() -> None:
    groups = [
        GroupSpec("policy", 2, cpus=1, gpus=0.4),
        GroupSpec("rollout", 3, cpus=0.1, gpus=0.3, colocate_with="policy"),
        GroupSpec("reward", 1),
    ]
    layout = make_layout(groups)
    assert layout.bundle_of == {"policy": (0, 1), "rollout": (0, 1, 0), "reward": (2,)}
    cpus = [b["CPU"] for b in layout.bundles]
    assert cpus == pytest.approx([1.2, 1.1, 1.0])
    assert [b.get("GPU") for b in layout.bundles] == [1.0, 1.0, None], "0.7 of a GPU is a GPU nobody else has"


def test_bundles_of_one_group_may_share_a_gpu() -> None:
    """Only what shares a bundle gets a whole GPU; two reference models on one GPU are the user's wish."""
    layout = make_layout([GroupSpec("reference", 2, gpus=0.5)])
    assert [b["GPU"] for b in layout.bundles] == [0.5, 0.5]


def test_the_host_comes_first() -> None:
    with pytest.raises(PlacementError, match=r"'rollout' is colocated with 'policy', which is not placed"):
        make_layout([GroupSpec("rollout", 1, colocate_with="policy"), GroupSpec("policy", 1)])


def test_a_worker_may_need_what_only_some_nodes_declare() -> None:
    spec = GroupSpec("policy", 1, cpus=0, resources={"policy": 1})
    assert spec.demand() == {"policy": 1}, "what is not needed is not asked for"


# -- what fits ---------------------------------------------------------------------------------------------


def test_what_fits_exactly_fits() -> None:
    groups = [GroupSpec("policy", 4, cpus=1, gpus=1), GroupSpec("reward", 48, cpus=0.25)]
    check_fits(make_layout(groups), groups, NODES)


def test_large_bundles_are_placed_before_small_ones_take_their_room() -> None:
    groups = [GroupSpec("reward", 8, cpus=1), GroupSpec("policy", 1, cpus=8)]
    check_fits(make_layout(groups), groups, NODES)


def test_the_undemanding_do_not_take_the_place_of_those_with_few_nodes_to_go_to() -> None:
    nodes = {"a": {"CPU": 2.0, "policy": 1.0}, "b": {"CPU": 2.0}}
    groups = [GroupSpec("reward", 1, cpus=2), GroupSpec("policy", 1, cpus=1, resources={"policy": 1})]
    assert find_homeless(make_layout(groups), nodes) is None


def test_so_many_on_each_node_need_as_many_nodes() -> None:
    three = {name: {"CPU": 4.0, "GPU": 2.0} for name in "abc"}
    groups = [GroupSpec("rollout", 2, gpus=1), GroupSpec("policy", 3, gpus=1, per_node=1)]
    placed = check_fits(make_layout(groups), groups, three)
    assert placed == {2: "a", 3: "b", 4: "c"}, "Ray chooses for the rest"
    groups = [GroupSpec("policy", 4, cpus=1, per_node=1)]
    with pytest.raises(PlacementError, match=r"no node has 1 CPU left(.|\n)*, 1 on each of 4 node"):
        check_fits(make_layout(groups), groups, three)


def test_a_bundle_is_never_split_over_nodes() -> None:
    groups = [GroupSpec("policy", 1, cpus=9)]
    assert find_homeless(make_layout(groups), NODES) == {"CPU": 9}


def test_what_does_not_fit_shows_asked_and_available() -> None:
    groups = [
        GroupSpec("policy", 4, cpus=1, gpus=0.7),
        GroupSpec("rollout", 4, cpus=0.5, gpus=0.3, colocate_with="policy"),
        GroupSpec("reference", 1, cpus=0.25, gpus=1),
    ]
    with pytest.raises(PlacementError) as caught:
        check_fits(make_layout(groups), groups, NODES)
    said = str(caught.value).splitlines()
    assert "no node has" in said[0]
    assert said[1:] == [
        "asked:",
        "  policy: 4 worker(s), each 1 CPU, 0.7 GPU",
        "  rollout: 4 worker(s), each 0.5 CPU, 0.3 GPU, sharing with policy",
        "  reference: 1 worker(s), each 0.25 CPU, 1 GPU",
        "available:",
        "  node 10.0.0.1: 8 CPU, 4 GPU",
        "  node 10.0.0.2: 8 CPU",
        said[-1],
    ]
    assert "--reference_workers" in said[-1]
    assert "--colocate true" in said[-1]


def test_no_node_at_all() -> None:
    groups = [GroupSpec("policy", 1)]
    with pytest.raises(PlacementError, match="no node is alive"):
        check_fits(make_layout(groups), groups, {})


# -- the order of ranks ------------------------------------------------------------------------------------


def test_ranks_of_a_node_are_neighbours() -> None:
    nodes = [Node("10.0.0.10", "x"), Node("10.0.0.9", "y"), Node("10.0.0.10", "x"), Node("10.0.0.9", "y")]
    found = neighbours_first(dict(enumerate(nodes)), [0, 1, 2, 3])
    assert found == [1, 3, 0, 2], (
        "10.0.0.9 is before 10.0.0.10, and within a node the bundles keep their order"
    )
    assert neighbours_first(dict(enumerate(nodes)), [3, 2]) == [3, 2]


def test_nodes_without_a_number_come_last_and_nodes_of_one_address_stay_apart() -> None:
    nodes = [Node("fd00::2", "a"), Node("10.0.0.1", "b"), Node("10.0.0.1", "a"), Node("10.0.0.1", "b")]
    assert neighbours_first(dict(enumerate(nodes)), range(4)) == [2, 1, 3, 0]
