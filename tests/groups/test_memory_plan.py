"""The memory that a plan expects: beside what ms-swift's documentation measured, and beside the formulas of
DeepSpeed and vLLM."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, Qwen2Config

from raytune_rl.config import RLHFConfig, SFTConfig
from raytune_rl.errors import PlacementError
from raytune_rl.groups import memory_plan, specs
from raytune_rl.groups.memory_check import Sizes, check_memory, device_plans, remedies, store_doubts
from raytune_rl.groups.memory_plan import GIB, Training
from raytune_rl.groups.sizes import Groups, offline_groups, online_groups
from raytune_rl.models.size import measure
from raytune_rl.protocol.model import ModelSize, TowerSize, TunerSettings
from raytune_rl.runtime.cluster import ClusterInfo

QWEN: dict[str, Any] = {
    "hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
"""Qwen2.5-7B, whose card says 7.61 billion parameters, 6.53 without embeddings."""
TOWER = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
}  # fmt: skip
LORA, FULL = TunerSettings(), TunerSettings(tuner_type="full")


def llm(tuner: TunerSettings = LORA) -> ModelSize:
    return measure(Qwen2Config(**QWEN), tuner)


def mllm() -> ModelSize:
    config = AutoConfig.for_model(
        "qwen2_5_vl", text_config=QWEN, vision_config=TOWER, tie_word_embeddings=False
    )
    return measure(config, LORA)


def cluster(gpus: int) -> ClusterInfo:
    return ClusterInfo(True, "", {"a": {"GPU": float(gpus), "CPU": 8.0 * gpus}}, 0, has_gpus=True)


def sft(**more: Any) -> SFTConfig:
    return SFTConfig(
        model="m", dataset="d", torch_dtype="bfloat16", per_device_train_batch_size=1, max_length=2048, **more
    )


def grpo(**more: Any) -> RLHFConfig:
    return RLHFConfig(
        model="m", dataset="d", reward_funcs="accuracy", torch_dtype="bfloat16", sleep_level=1,
        offload_model=True, offload_optimizer=True, temperature=0.9, **more,
    )  # fmt: skip


def groups_of(config: Any, gpus: int) -> Groups:
    if isinstance(config, RLHFConfig):
        return online_groups(config, cluster(gpus), ())
    return offline_groups(config, cluster(gpus))


ONE = {"vllm_gpu_memory_utilization": 0.5, "max_completion_length": 1024, "per_device_train_batch_size": 4,
       "num_generations": 4, "max_length": 2048}  # fmt: skip
EIGHT = {"vllm_gpu_memory_utilization": 0.7, "max_completion_length": 2048, "deepspeed": "zero2",
         "num_generations": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
         "max_length": 4096}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "size", "gpus", "gigabytes"),
    [
        pytest.param(sft(), llm, 1, 19, id="7B"),
        pytest.param(sft(), mllm, 1, 18, id="VL-7B"),
        pytest.param(sft(deepspeed="zero2"), llm, 8, 18, id="7B on eight"),
        pytest.param(grpo(**ONE), llm, 1, 42, id="GRPO 7B"),
        pytest.param(grpo(**ONE), mllm, 1, 55, id="GRPO VL-7B"),
        pytest.param(grpo(**EIGHT), llm, 8, 60, id="GRPO 7B on eight"),
        pytest.param(grpo(**EIGHT), mllm, 8, 60, id="GRPO VL-7B on eight"),
    ],
)
def test_what_ms_swift_measured_on_80_gb(config: Any, size: Any, gpus: int, gigabytes: float) -> None:
    (plan,) = device_plans(config, groups_of(config, gpus), Sizes(size()), 80 * GIB)
    assert plan.total(plan.peak) / 1e9 == pytest.approx(gigabytes, rel=0.25)


def test_a_model_is_counted_without_its_weights() -> None:
    size = llm()
    assert size.parameters == 7_615_616_512
    assert size.parameters - 2 * size.vocabulary * size.hidden == 6_525_621_760  # "6.53B"
    assert (size.trained, size.trained_16_bit) == (20_185_088, 0)
    assert llm(FULL).trained == llm(FULL).trained_16_bit == size.parameters
    assert mllm().parameters == 8_292_166_656  # as its weights' index says, two bytes each


def test_images_pass_a_tower_that_keeps_what_it_trains() -> None:
    config = AutoConfig.for_model(
        "qwen2_5_vl", text_config=QWEN, vision_config=TOWER, tie_word_embeddings=False
    )
    frozen, trains = mllm(), measure(config, TunerSettings(freeze_vit=False))
    assert frozen.tower == TowerSize(layers=32, hidden=1280, intermediate=3420, patches=4.0)
    assert trains.tower == TowerSize(layers=32, hidden=1280, intermediate=3420, patches=4.0, trained=True)
    assert llm().tower is None

    def images(size: ModelSize, **more: Any) -> int:
        return memory_plan.tower_activations(size, Training(1, 2, 2048, **more))

    layer = 4 * 2048 * (12 * 1280 + 5 * 3420) * 2  # bytes: patches, numbers, two each
    assert images(frozen) == layer
    assert images(trains) == layer + 32 * 4 * 2048 * 1280 * 2
    assert images(trains, checkpointing=False) == 33 * layer
    assert "images" in memory_plan.trainer("policy", "train", frozen, Training(1, 2, 2048)).busy


def test_a_quantised_base_takes_a_third() -> None:
    whole, four_bits = (
        memory_plan.trainer("policy", "train", llm(), Training(1, 2, 2048, quant_bits=bits)).busy["weights"]
        for bits in (None, 4)
    )
    # Qwen2.5-7B-Instruct-bnb-4bit is 5.5 GB with 16-bit embeddings; here they are in 32 bits.
    assert four_bits / 1e9 == pytest.approx(5.5 + 2 * 2 * 152064 * 3584 / 1e9, rel=0.05)
    assert four_bits < 0.55 * whole


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_model_states_beside_deepspeeds_estimate(ranks: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    size = llm(FULL)

    def states(stage: int) -> int:
        busy = memory_plan.trainer("policy", "train", size, Training(ranks, stage, 1)).busy
        return busy["weights"] + busy["master weights"] + busy["optimizer"]

    _, theirs = estimate_zero2_model_states_mem_needs(size.parameters, ranks, 1, cpu_offload=False)
    gradients = (2 + 4) * size.parameters // ranks
    assert states(2) == pytest.approx(theirs - gradients, rel=1e-6)
    largest = size.vocabulary * size.hidden
    _, theirs, _ = estimate_zero3_model_states_mem_needs(
        size.parameters, largest, ranks, 1, cpu_offload=False, cpu_offload_params=False, zero_init=True
    )
    gradients = 4 * size.parameters // ranks
    layer = 4 * largest  # one that is whole, and its gradient; here it is what may be whole at a time
    assert states(3) - 2 * memory_plan.LIVE == pytest.approx(theirs - layer - gradients, rel=1e-6)


def test_an_engine_has_no_more_than_its_share() -> None:
    how = memory_plan.Engine(share=0.5, device_bytes=80 * GIB)
    parts = memory_plan.engine("rollout", "sampling", llm(), how).busy
    context = parts["CUDA context"]
    assert sum(parts.values()) - context == 40 * GIB


def test_the_cache_of_a_token_is_vllms() -> None:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    page = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=128, dtype=torch.bfloat16)
    assert memory_plan.cache_bytes(llm(), 16) == 28 * page.page_size_bytes


def test_what_cannot_fit_is_refused_with_the_flags_that_help() -> None:
    config = RLHFConfig(
        model="m", dataset="d", reward_funcs="accuracy", train_type="full", sleep_level=0, beta=0
    )
    groups = groups_of(config, 1)
    with pytest.raises(PlacementError) as refused:
        check_memory(config, groups, Sizes(llm(FULL)), 80 * GIB)
    message = str(refused.value)
    assert "sampling needs about 41 GiB of a GPU beside 100 GiB of policy" in message
    assert "80 are there. Set --offload_model true, or --offload_optimizer true" in message
    assert remedies(config, groups, "training the policy")[0] == "--sleep_level 2"


def test_what_may_not_fit_is_said() -> None:
    config = sft(max_tokens_per_micro_batch=24576)
    (doubt,) = check_memory(config, groups_of(config, 1), Sizes(llm()), 24 * GIB)
    assert "may run out of GPU memory: training the policy needs about" in doubt
    assert "Set --max_tokens_per_micro_batch 6144" in doubt
    assert check_memory(sft(), groups_of(sft(), 1), Sizes(llm()), 24 * GIB) == []


def test_weights_that_the_object_store_cannot_hold_twice_are_said() -> None:
    full, lora = grpo(train_type="full"), grpo(train_type="lora")
    sizes = Sizes(llm(FULL))
    (doubt,) = store_doubts(full, sizes, 20 * GIB)
    assert "take 28.4 GiB of Ray's object store and it has 20.0" in doubt
    assert store_doubts(full, sizes, 30 * GIB) == store_doubts(full, sizes, None) == []
    assert store_doubts(lora, sizes, GIB) == store_doubts(sft(), sizes, GIB) == []


def test_an_engine_without_room_for_its_weights_is_refused() -> None:
    config = grpo(vllm_gpu_memory_utilization=0.5)
    with pytest.raises(PlacementError, match=r"an engine gets 12 GiB .* --vllm_gpu_memory_utilization 0\.6"):
        check_memory(config, groups_of(config, 1), Sizes(llm()), 24 * GIB, 1024)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (sft(), 2048),
        (SFTConfig(model="m", dataset="d"), 16384),
        (SFTConfig(model="m", dataset="d", max_length=2048), 16384),
        (SFTConfig(model="m", dataset="d", max_length=2048, per_device_train_batch_size=64), 16384),
        (grpo(**ONE), 4 * 3072),
    ],
)
def test_the_token_budget_is_what_the_user_gave_rows_for(config: Any, tokens: int) -> None:
    assert specs.max_tokens(config, on_gpu=True) == tokens
    assert specs.max_tokens(config, on_gpu=False) == specs.TOKENS_CPU


def test_engines_on_shared_gpus_sleep_unless_they_are_told_not_to() -> None:
    def level(**more: Any) -> int:
        config = RLHFConfig(model="m", dataset="d", reward_funcs="accuracy", **more)
        return specs.sleep_level(config, online_groups(config, cluster(4), ()))

    assert (level(), level(train_type="full"), level(sleep_level=0)) == (1, 2, 0)
    assert level(colocate=False) == 0


def test_who_is_away_while_the_engines_are_awake_and_back_when_they_sleep() -> None:
    config = RLHFConfig(
        model="m", dataset="d", reward_funcs="accuracy", reward_model="j", train_type="full", beta=0.1,
        offload_model=True, offload_optimizer=True,
    )  # fmt: skip
    groups = online_groups(config, cluster(8), ("ref_logprobs",))
    size = llm(FULL)
    (plan,) = device_plans(config, groups, Sizes(size, size, None, (size,)), 80 * GIB)
    weights = 2 * size.parameters

    def of(group: str, phase: str) -> set[str]:
        return plan.held(phase)[group].keys() - memory_plan.ROUGH

    for awake in ("sampling", "reward models"):
        assert of("policy", awake) == of("reference", awake) == set()
        assert of("rollout", awake) == {"weights", "KV cache"}
        assert plan.held(awake)["reward_model"]["weights"] == weights
    for asleep in ("reference log-probs", "training the policy"):
        assert of("rollout", asleep) == set()
        assert of("policy", asleep) >= {"weights", "master weights", "optimizer"}
        assert plan.held(asleep)["reference"]["weights"] == weights
