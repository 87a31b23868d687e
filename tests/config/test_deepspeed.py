"""DeepSpeed configurations by name, by file, as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import SFTConfig, deepspeed
from raytune_rl.config.notices import notices_for
from raytune_rl.errors import ConfigError


@pytest.mark.parametrize(("name", "stage"), [("zero0", 0), ("zero1", 1), ("zero2", 2), ("zero3", 3)])
def test_presets_have_their_stage(name: str, stage: int) -> None:
    assert deepspeed.load(name)["zero_optimization"]["stage"] == stage


def test_zero2_is_the_default_and_has_the_values_of_ms_swift() -> None:
    zero = deepspeed.load(None)["zero_optimization"]
    assert zero == {
        "stage": 2,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": "auto",  # 2e8, or the model where it is smaller
        "contiguous_gradients": True,
    }


def test_offload_differs_in_nothing_but_the_device() -> None:
    plain = deepspeed.load("zero2")
    plain["zero_optimization"]["offload_optimizer"]["device"] = "cpu"
    assert deepspeed.load("zero2_offload") == plain
    zero3 = deepspeed.load("zero3_offload")["zero_optimization"]
    assert zero3["offload_param"]["device"] == zero3["offload_optimizer"]["device"] == "cpu"


def test_a_loaded_preset_is_the_callers_own() -> None:
    deepspeed.load("zero2")["zero_optimization"]["stage"] = 3
    assert deepspeed.load("zero2")["zero_optimization"]["stage"] == 2


def test_file_and_literal(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 1}}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(config))
    assert deepspeed.load(str(file)) == deepspeed.load(json.dumps(config)) == deepspeed.load(config) == config


@pytest.mark.parametrize("value", ["zero9", "missing.json", "{", "[1]"])
def test_what_is_no_configuration(value: str) -> None:
    with pytest.raises(ConfigError, match="--deepspeed"):
        deepspeed.load(value)


def test_a_file_that_is_no_object(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text("[1]")
    with pytest.raises(ConfigError, match=r"list\.json: expected a JSON object"):
        deepspeed.load(str(file))


def test_auto_is_filled_and_what_stays_auto_is_left_out() -> None:
    filled = deepspeed.fill_auto(
        deepspeed.load("zero3"),
        {
            "gradient_clipping": 1.0,
            "bf16.enabled": True,
            "fp16.enabled": False,
            "train_micro_batch_size_per_gpu": 2,
        },
    )
    assert filled["gradient_clipping"] == 1.0
    assert filled["bf16"] == {"enabled": True}
    assert filled["fp16"]["enabled"] is False
    assert filled["train_micro_batch_size_per_gpu"] == 2
    assert "train_batch_size" not in filled
    assert "auto" not in json.dumps(filled)


def test_a_configuration_that_contradicts_the_flags_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gradient_clipping to 0.5.*needs 1.0"):
        deepspeed.fill_auto({"gradient_clipping": 0.5}, {"gradient_clipping": 1.0})


def test_a_value_that_is_only_preferred_gives_way() -> None:
    name = "zero_optimization.reduce_bucket_size"
    for given, filled in (("auto", 10), (5, 5)):
        config = {"zero_optimization": {"reduce_bucket_size": given}}
        assert deepspeed.fill_auto(config, {}, {name: 10}) == {
            "zero_optimization": {"reduce_bucket_size": filled}
        }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"gradient_accumulation_steps": 8}, "--gradient_accumulation_steps is not given"),
        ({"train_micro_batch_size_per_gpu": 4}, "--per_device_train_batch_size is 1: give"),
        ({"gradient_clipping": 0.5}, "--max_grad_norm is 1.0: give --max_grad_norm 0.5 too"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "norm is told on every step"),
        ({"train_batch_size": 16}, "train_batch_size to 16, which follows from"),
    ],
)
def test_a_file_that_contradicts_a_flag_names_the_flag(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        SFTConfig(model="m", dataset="d", deepspeed=config)
    assert said in str(refused.value)


def test_a_file_written_for_the_trainer_is_read() -> None:
    """Numbers that agree with the flags, and sections that the flags decide here."""
    config = SFTConfig(
        model="m",
        dataset="d",
        gradient_accumulation_steps=8,
        deepspeed={
            "bf16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
            "gradient_accumulation_steps": 8,
            "gradient_clipping": 1.0,
            "train_batch_size": "auto",
            "zero_optimization": {"stage": 3, "reduce_bucket_size": 500000},
        },
    )
    assert deepspeed.for_engine(config.deepspeed).keys() == {"bf16", "gradient_clipping", "zero_optimization"}
    (notice,) = notices_for(config)
    assert notice.startswith("--deepspeed: optimizer and scheduler of the configuration do nothing")


def test_a_quantised_base_and_zero3_are_refused_together() -> None:
    quantised = {"model": "m", "dataset": "d", "quant_method": "bnb", "quant_bits": 4}
    with pytest.raises(ConfigError, match=r"--deepspeed with ZeRO stage 3 .* use zero2"):
        SFTConfig(**quantised, deepspeed="zero3_offload")
    assert deepspeed.stage(SFTConfig(**quantised, deepspeed="zero2").deepspeed) == 2
    assert deepspeed.stage(None) == 2
    assert deepspeed.stage({}) == 0
