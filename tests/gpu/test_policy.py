"""A policy on one GPU, without engines: what it takes and gives back, and that shortcuts change nothing."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu import Found, Policy, Settings, held, measure, peak, reset_peak
from tests.gpu.conftest import ON_GPU, alone, only_gpu, settings


def test_adapters_in_bfloat16_learn_as_wide_ones_do_in_less_memory() -> None:
    narrow, wide = alone(measure, settings()), alone(measure, settings(narrow=False))
    assert narrow.losses == pytest.approx(wide.losses, rel=0.02)
    if ON_GPU:
        step = "forward and backward"
        assert narrow.memory[step] < wide.memory[step]


def _within(gigabytes: float, chosen: Settings) -> Found:
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    policy = Policy(chosen)
    policy.train()
    return policy.found


@only_gpu
def test_lora_of_a_7b_trains_within_a_card_of_24_gb() -> None:
    found = alone(_within, 24, Settings(shape="7b", tokens=2048, row=2048))
    assert len(found.losses) == 3


def _moved(chosen: Settings) -> tuple[list[float], list[float], float, float]:
    """Losses without and with moves between steps; what is held before, and when it is away."""
    stays = Policy(chosen)
    stays.train()
    moves = Policy(chosen)
    moves.found.losses.clear()
    before = held()
    left = before
    for _ in range(chosen.steps):
        left = moves.away_and_back()
        moves.engine.train()
        loss = -moves.engine(**moves.batch).logprobs.mean()
        moves.engine.backward(loss, scale_wrt_gas=False)
        moves.engine.step()
        moves.found.losses.append(loss.item())
    return stays.found.losses, moves.found.losses, before, left


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_what_is_moved_to_the_host_comes_back_as_it_was(train_type: str) -> None:
    chosen = settings(train_type=train_type, tokens=4096 if ON_GPU else 256)
    stayed, moved, before, left = alone(_moved, chosen)
    assert moved == pytest.approx(stayed, rel=1e-3)
    if ON_GPU:
        assert left < 0.6 * before, "of two policies one stays"


def _scores(chosen: Settings) -> list[float]:
    policy = Policy(chosen)
    policy.score()
    return policy.found.logprobs


@pytest.mark.parametrize("other", [{"mask": True}, {"chunk": 441}])
def test_neither_a_mask_nor_smaller_chunks_change_log_probs(other: dict[str, Any]) -> None:
    assert alone(_scores, settings(**other)) == pytest.approx(alone(_scores, settings()), abs=0.1)


def _published(chosen: Settings) -> bool:
    """Whether what arrives on the host is what the model has, also the second time."""
    import torch

    policy = Policy(chosen)
    policy.publish(1)
    policy.train()
    buckets = policy.publish(1)
    names = [entry.name for bucket in policy.publisher.index() for entry in bucket]
    tensors = dict(policy.publisher._exporter.tensors(set(names), policy.publisher._gather))
    expected = torch.cat([tensors[name].detach().reshape(-1).view(torch.uint8).cpu() for name in names])
    arrived = torch.cat([torch.from_numpy(array) for bucket in buckets for array in bucket])
    return torch.equal(arrived, expected)


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_what_is_published_is_what_the_model_has(train_type: str) -> None:
    assert alone(_published, settings(train_type=train_type, tokens=2048 if ON_GPU else 256))


def _told(chosen: Settings) -> tuple[float, float]:
    """The peak of a step, and what the plan says of it, GiB."""
    from transformers import Qwen2Config

    from benchmarks.gpu import SHAPES
    from raytune_rl.groups import memory_plan
    from raytune_rl.models.size import measure as sized
    from raytune_rl.protocol.model import TunerSettings

    policy = Policy(chosen)
    reset_peak()
    policy.train()
    size = sized(Qwen2Config(**SHAPES[chosen.shape]), TunerSettings(tuner_type=chosen.train_type))
    how = memory_plan.Training(1, 2, chosen.tokens, narrow_adapters=True)
    parts = dict(memory_plan.trainer("policy", "training", size, how).busy)
    parts.pop("CUDA context")
    return peak(), sum(parts.values()) / memory_plan.GIB


@only_gpu
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_the_plan_foresees_a_steps_memory(train_type: str) -> None:
    found, planned = alone(_told, Settings(train_type=train_type))
    assert planned == pytest.approx(found, rel=0.25)
