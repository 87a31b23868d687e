"""Settings that vLLM cannot serve on a CPU are set otherwise, and said; what the user set stays or is
refused.
"""

from __future__ import annotations

from typing import Any

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError, ModelError
from raytune_rl.groups.engine_fit import fit
from raytune_rl.groups.lora_sync import publish_mode
from raytune_rl.protocol.model import Traits

GIVEN: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy"}
DELTA_NETS = Traits(recurrent=True, bfloat16=True, delta_head=128)


def config(**settings: Any) -> RLHFConfig:
    return RLHFConfig(**{**GIVEN, **settings})


def test_adapters_of_mixtures_arrive_merged_on_a_cpu() -> None:
    fitted, notices = fit(config(), Traits(experts=True), on_gpu=False)
    assert publish_mode(fitted) == "merged"
    (notice,) = notices
    assert "--vllm_enable_lora false is used" in notice
    assert publish_mode(fit(config(), Traits(experts=True), on_gpu=True)[0]) == "adapter"
    assert publish_mode(fit(config(), Traits(), on_gpu=False)[0]) == "adapter"
    assert fit(config(train_type="full"), Traits(experts=True), on_gpu=False)[1] == []


def test_delta_nets_are_computed_as_vllm_can() -> None:
    fitted, notices = fit(config(train_type="full"), DELTA_NETS, on_gpu=False)
    assert (fitted.vllm_enable_prefix_caching, fitted.torch_dtype) == (False, "bfloat16")
    assert len(notices) == 2
    given = config(train_type="full", vllm_enable_prefix_caching=False, torch_dtype="bfloat16")
    assert fit(given, DELTA_NETS, on_gpu=False) == (given, [])
    assert fit(config(train_type="full"), DELTA_NETS, on_gpu=True) == (config(train_type="full"), [])


@pytest.mark.parametrize(
    ("settings", "traits", "sentence"),
    [
        ({"vllm_enable_lora": True}, Traits(experts=True), "--vllm_enable_lora true: .*experts on a CPU"),
        ({"torch_dtype": "float32"}, DELTA_NETS, "--torch_dtype float32: .*Write --torch_dtype bfloat16"),
        (
            {"vllm_enable_prefix_caching": True},
            DELTA_NETS,
            "--vllm_enable_prefix_caching true: .*Write --vllm_enable_prefix_caching false",
        ),
    ],
)
def test_what_the_user_set_is_refused_and_not_changed(
    settings: dict[str, Any], traits: Traits, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        fit(config(**settings), traits, on_gpu=False)


def test_heads_that_the_cpu_kernel_does_not_have_are_refused() -> None:
    narrow = Traits(recurrent=True, bfloat16=True, delta_head=32)
    with pytest.raises(ModelError, match=r"linear attention has heads of 32 .* 64 and 128 only"):
        fit(config(), narrow, on_gpu=False)
    assert fit(config(), narrow, on_gpu=True) == (config(), [])


def test_what_vllm_computes_wrongly_on_a_cpu_is_refused_there() -> None:
    traits = Traits(not_on_cpu="its attention is another")
    with pytest.raises(ModelError, match=r"on a CPU: its attention is another\. Sample on a GPU"):
        fit(config(), traits, on_gpu=False)
    assert fit(config(), traits, on_gpu=True) == (config(), [])


@pytest.mark.parametrize("on_gpu", [False, True])
def test_adapters_that_vllm_does_not_serve_arrive_merged(on_gpu: bool) -> None:
    fitted, (notice,) = fit(config(), Traits(serves_adapters=False), on_gpu)
    assert publish_mode(fitted) == "merged"
    assert "vLLM serves no adapters of this model" in notice
    assert "--vllm_enable_lora false is used" in notice
    with pytest.raises(ConfigError, match=r"--vllm_enable_lora true: vLLM serves no adapters of this model"):
        fit(config(vllm_enable_lora=True), Traits(serves_adapters=False), on_gpu)


def test_half_written_answers_to_media_go_on_with_a_cache_of_the_new_weights() -> None:
    """The cache that the old weights made of a picture is no fit for the new ones."""
    ahead = config(train_type="full", async_generate=True)
    fitted, (notice,) = fit(ahead, Traits(), True, takes_media=True)
    assert fitted.rollout_in_flight == "recompute"
    assert notice.endswith("as the old weights saw them: --rollout_in_flight recompute is used")
    for kept in (
        config(train_type="full"),
        config(train_type="full", async_generate=True, max_staleness=0),
        config(train_type="full", async_generate=True, rollout_in_flight="drain"),
    ):
        assert fit(kept, Traits(), True, takes_media=True) == (kept, [])
    assert fit(ahead, Traits(), True) == (ahead, [])
    chosen = config(train_type="full", async_generate=True, rollout_in_flight="keep")
    sentence = "--rollout_in_flight keep: half-written .* Write --rollout_in_flight recompute"
    with pytest.raises(ConfigError, match=sentence):
        fit(chosen, Traits(), True, takes_media=True)
