"""The parameters that become trainable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ModelError
from raytune_rl.groups import lora_sync
from raytune_rl.models.tuner import TunerSettings, apply_tuner
from raytune_rl.models.weights import WeightExporter, save_model

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted_modules(model: Any) -> set[str]:
    return {
        n.split(".lora_A")[0].removeprefix("base_model.model.")
        for n, _ in model.named_modules()
        if ".lora_A." in n
    }


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_is_every_linear_but_the_head(qwen2: Callable[..., Any], tied: bool) -> None:
    tuned = apply_tuner(qwen2(tied=tied), TunerSettings())
    names = adapted_modules(tuned.model)
    assert {name.rsplit(".", 1)[-1] for name in names} == LINEAR
    assert len(names) == 2 * len(LINEAR)
    trainable = {n for n, p in tuned.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert tuned.trainable == sum(p.numel() for n, p in tuned.model.named_parameters() if n in trainable)


def test_full_trains_everything(qwen2: Callable[..., Any]) -> None:
    model = qwen2().requires_grad_(False)
    tuned = apply_tuner(model, TunerSettings(tuner_type="full"))
    assert tuned.model is model
    assert tuned.trainable == tuned.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("flag", "scale"), [({}, 32 / 8), ({"use_rslora": True}, 32 / 8**0.5), ({"lora_rank": 16}, 2.0)]
)
def test_scaling(qwen2: Callable[..., Any], flag: dict[str, Any], scale: float) -> None:
    model = apply_tuner(qwen2(), TunerSettings(**flag)).model
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(scale)


def test_dora_has_magnitudes(qwen2: Callable[..., Any]) -> None:
    model = apply_tuner(qwen2(), TunerSettings(use_dora=True)).model
    assert any("lora_magnitude_vector" in n for n, p in model.named_parameters() if p.requires_grad)


def test_a_new_adapter_changes_nothing_yet(qwen2: Callable[..., Any]) -> None:
    ids = torch.arange(12)[None]
    want = qwen2()(ids).logits
    got = apply_tuner(qwen2(), TunerSettings(lora_dropout=0.0)).model(input_ids=ids).logits
    assert torch.equal(got, want)


def test_targets_by_suffix_name_and_regex(qwen2: Callable[..., Any]) -> None:
    by_suffix = apply_tuner(qwen2(), TunerSettings(target_modules=("q_proj", "mlp.up_proj"))).model
    assert {n.rsplit(".", 1)[-1] for n in adapted_modules(by_suffix)} == {"q_proj", "up_proj"}
    only = r"model\.layers\.1\..*\.v_proj"
    by_regex = apply_tuner(qwen2(), TunerSettings(target_regex=only)).model
    assert adapted_modules(by_regex) == {"model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize("bad", [{"target_modules": ("no_proj",)}, {"target_regex": "nothing"}])
def test_no_match_is_an_error(qwen2: Callable[..., Any], bad: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="matches no module"):
        apply_tuner(qwen2(), TunerSettings(**bad))


@pytest.mark.parametrize(
    "flags",
    [
        {"target_modules": ("lm_head",)},
        {"modules_to_save": ("embed_tokens",)},
        {"target_modules": ("all-embedding",)},
    ],
)
def test_an_adapter_on_a_tied_weight_makes_two_of_it(
    qwen2: Callable[..., Any], flags: dict[str, Any], tmp_path: Path
) -> None:
    """The driver, which builds the engines, sees it in the flags as the policy does in its weights."""
    for tied in (True, False):
        model = qwen2(tied=tied)
        model.save_pretrained(tmp_path / str(tied))
        exporter = WeightExporter(apply_tuner(model, TunerSettings(**flags)).model, "merged")
        assert exporter.unties is tied
        asked = RLHFConfig(model=str(tmp_path / str(tied)), dataset="d.jsonl", reward_funcs="format", **flags)
        assert lora_sync.unties(asked) is tied


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, {"llm"}),
        ({"freeze_vit": False}, {"llm", "vit"}),
        ({"freeze_aligner": False}, {"llm", "aligner"}),
        ({"freeze_llm": True, "freeze_aligner": False}, {"aligner"}),
        ({"freeze_vit": False, "freeze_aligner": False}, {"llm", "vit", "aligner"}),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_parts_of_a_vision_model(
    qwen2_vl: Callable[[], Any], flags: dict[str, Any], parts: set[str], kind: Any
) -> None:
    def part(name: str) -> str:
        if "language_model" in name or "lm_head" in name:
            return "llm"
        return "aligner" if "merger" in name else "vit"

    model = apply_tuner(qwen2_vl(), TunerSettings(tuner_type=kind, **flags)).model
    assert {part(n) for n, p in model.named_parameters() if p.requires_grad} == parts
    if kind == "lora":
        assert not any("lm_head" in name for name in adapted_modules(model))
        assert len(str(model.peft_config["default"].target_modules)) < 1500


def test_nothing_left_to_train(qwen2_vl: Callable[[], Any]) -> None:
    with pytest.raises(ModelError, match="nothing is left"):
        apply_tuner(qwen2_vl(), TunerSettings(tuner_type="full", freeze_llm=True))


def make_adapter(model: Any, where: Path) -> PeftModel:
    peft: PeftModel = apply_tuner(model, TunerSettings(lora_rank=4, lora_dropout=0.0)).model
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_model(peft, where)
    return peft.eval()


def test_lora_goes_on_from_an_adapter(qwen2: Callable[..., Any], tmp_path: Path) -> None:
    old = make_adapter(qwen2(), tmp_path)
    tuned = apply_tuner(qwen2(), TunerSettings(lora_rank=64, lora_dropout=0.0), [str(tmp_path)])
    ids = torch.arange(12)[None]
    assert torch.equal(tuned.model.eval()(input_ids=ids).logits, old(input_ids=ids).logits)
    assert tuned.model.peft_config["default"].r == 4
    assert torch.equal(tuned.model.train()(input_ids=ids).logits, old(input_ids=ids).logits), "no dropout"
    assert tuned.trainable > 0
    assert str(tmp_path) in tuned.notices[0]


def test_full_training_merges_adapters_first(qwen2: Callable[..., Any], tmp_path: Path) -> None:
    old = make_adapter(qwen2(), tmp_path)
    tuned = apply_tuner(qwen2(), TunerSettings(tuner_type="full"), [str(tmp_path)])
    ids = torch.arange(12)[None]
    torch.testing.assert_close(tuned.model(ids).logits, old(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert tuned.trainable == tuned.total
    assert "merged" in tuned.notices[0]


def test_missing_and_misfit_adapters(
    qwen2: Callable[..., Any], qwen2_vl: Callable[[], Any], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        apply_tuner(qwen2(), TunerSettings(), [str(tmp_path / "none")])
    make_adapter(qwen2(), tmp_path)
    config = qwen2().config
    config.hidden_size, config.num_attention_heads = 32, 2
    with pytest.raises(ModelError, match="does not fit"):
        apply_tuner(type(qwen2())(config), TunerSettings(), [str(tmp_path)])
