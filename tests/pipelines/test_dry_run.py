"""`--dry_run true` tells who runs where, and on which memory, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from raytune_rl import cli
from raytune_rl.config import RLHFConfig, SFTConfig
from raytune_rl.errors import ConfigError, PlacementError
from raytune_rl.pipelines import dry_run, sft
from raytune_rl.runtime.gpu_memory import parse
from raytune_rl.tiny.model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model")))


def config(model: str, **more: Any) -> RLHFConfig:
    return RLHFConfig(model=model, dataset="none", reward_funcs="accuracy", dry_run=True, **more)


def test_a_cluster_that_is_not_there(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    connected = ray.is_initialized()  # by tests before this one
    plan = dry_run.run(config(model, cluster="8x80GiB,8x80GiB"))
    assert ray.is_initialized() == connected
    assert {group.role: group.actors for group in plan.groups} == {"policy": 16, "rollout": 16, "reward": 16}
    memory = dict(plan.sections[-1].rows)
    assert "of 80 GiB: rollout 40." in memory["sampling"]
    assert "rollout waiting 1.6; policy" in memory["training the policy"]
    assert memory["engines asleep"] == "level 1 (--sleep_level, the default here)"
    assert "GPU memory, estimated" in capsys.readouterr().out


def test_engines_that_come_and_go_are_planned_for(model: str) -> None:
    grown = config(model, cluster="8x80GiB", policy_workers=4, rollout_workers="1:16", num_generations=4)
    plan = dry_run.run(grown)
    (rollout,) = [group for group in plan.groups if group.role == "rollout"]
    assert (rollout.actors, rollout.placement) == (1, "up to 16, each on its own")
    assert any("1:16: the cluster has room for 4 engine(s) now" in notice for notice in plan.notices)


def test_the_smallest_gpu_counts(model: str) -> None:
    plan = dry_run.run(config(model, cluster="1x80GiB,1x24GB"))
    assert "of 22 GiB" in dict(plan.sections[-1].rows)["sampling"]


def test_what_does_not_fit_is_shown_and_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PlacementError, match="--policy_workers"):
        dry_run.run(config(model, cluster="2x80GiB", policy_workers=3, per_device_train_batch_size=8))
    assert cli.main(
        ["rlhf", "--rlhf_type", "grpo", "--model", model, "--dataset", "none", "--reward_funcs", "accuracy",
         "--dry_run", "true", "--cluster", "1x1GiB", "--vllm_gpu_memory_utilization", "0.000001"]
    ) == 1  # fmt: skip
    told = capsys.readouterr()
    assert "GPU memory, estimated" in told.out
    assert "an engine gets 0 GiB" in told.err
    assert "--vllm_gpu_memory_utilization" in told.err


@pytest.mark.parametrize("text", ["8", "8x", "0x80GiB", "8x80TB", "80GiBx8", "8x80GiB;8x80GiB"])
def test_a_cluster_that_cannot_be_read(model: str, text: str) -> None:
    with pytest.raises(ConfigError, match=r"--cluster: .* 8x80GiB,8x80GiB"):
        config(model, cluster=text)


def test_a_cluster_is_only_described_for_a_dry_run(model: str) -> None:
    with pytest.raises(ConfigError, match="add --dry_run true"):
        SFTConfig(model=model, dataset="none", cluster="8x80GiB")
    with pytest.raises(ConfigError, match="run_plan"):
        sft.run(SFTConfig(model=model, dataset="none", dry_run=True))


def test_without_a_gpu_there_is_no_memory_to_plan(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan = dry_run.run(SFTConfig(model=model, dataset="none", dry_run=True))
    assert [section.title for section in plan.sections] == ["Cluster: this machine"]


def test_what_nvidia_smi_says() -> None:
    assert parse("81559\n81559\n") == [81559 * 2**20] * 2
    assert parse("[N/A]\n") == []


def test_plan_stands_before_a_command(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rlhf", "--rlhf_type", "grpo", "--model", model, "--reward_funcs", "accuracy"]
    assert cli.main(["plan", *words, "--cluster", "8x80GiB"]) == 0  # no data set is needed
    planned = capsys.readouterr().out
    assert "GPU memory, estimated" in planned
    assert cli.main([*words, "--dataset", "d", "--dry_run", "true", "--cluster", "8x80GiB"]) == 0
    assert capsys.readouterr().out == planned


@pytest.mark.parametrize("words", [[], ["infer"], ["--cluster", "8x80GiB"]])
def test_plan_alone_says_what_it_wants(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *words]) == 2
    assert "raytune-rl plan sft ..., or raytune-rl plan rlhf ..." in capsys.readouterr().err
