"""Mixtures of experts: what an adapter leaves out is said, and what it does not leave out is published."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from raytune_rl.errors import ModelError
from raytune_rl.models.experts import fused_experts
from raytune_rl.models.load import load_config, load_model
from raytune_rl.models.traits import traits_of
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import WeightExporter, save_model
from raytune_rl.protocol.model import Traits, TunerSettings
from tests.families.recipes import make_family

MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "qwen3_next")


def lora(**settings: Any) -> TunerSettings:
    return TunerSettings(lora_dropout=0.0, init_weights="false", **settings)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_experts_left_out_are_said_and_can_be_included(family: str, tmp_path: Path) -> None:
    path = str(make_family(family, tmp_path / family, tied=False))
    model = load_model(path).model
    share = sum(p.numel() for p in fused_experts(model).values()) / model.num_parameters()
    assert 0.05 < share < 0.95

    (sentence,) = apply_tuner(model, lora()).notices
    assert f"leaves out the experts, {share:.0%} of the model's weights" in sentence
    found = re.search(r"--target_parameters (.+)$", sentence)
    assert found is not None

    names = tuple(found[1].split())
    tuned = apply_tuner(load_model(path).model, lora(target_parameters=names))
    assert tuned.notices == ()
    trained = [n for n, p in tuned.model.named_parameters() if p.requires_grad and "experts" in n]
    assert trained, "the experts have an adapter"
    published = dict(WeightExporter(tuned.model, "merged").tensors())
    merged = copy.deepcopy(tuned.model).merge_and_unload()
    expected = dict(WeightExporter(merged, "full").tensors())
    assert published.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(published[name], tensor, atol=1e-6, rtol=1e-5)
    before = dict(WeightExporter(load_model(path).model, "full").tensors())
    changed = [name for name, tensor in published.items() if not torch.equal(tensor, before[name])]
    assert any("expert" in name or "input_linear" in name for name in changed)


def test_an_adapter_on_experts_is_saved_and_opened_again(tmp_path: Path) -> None:
    path = str(make_family("qwen3_moe", tmp_path / "m", tied=False))
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    tuned = apply_tuner(load_model(path).model, lora(target_parameters=names)).model.eval()
    save_model(tuned, tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(path).model, str(tmp_path / "adapter")).eval()
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, tuned(ids).logits)


def test_parameters_that_are_not_there(tmp_path: Path) -> None:
    path = str(make_family("qwen3_moe", tmp_path / "m", tied=False))
    with pytest.raises(
        ModelError, match=r"'experts.w1' matches no .*mlp.experts.down_proj, mlp.experts.gate_up"
    ):
        apply_tuner(load_model(path).model, lora(target_parameters=("experts.w1",)))
    with pytest.raises(ModelError, match="has 1 dimensions"):
        apply_tuner(load_model(path).model, lora(target_parameters=("input_layernorm.weight",)))


def test_all_linear_finds_the_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    path = str(make_family("gpt2", tmp_path / "m", tied=True))
    tuned = apply_tuner(load_model(path).model, lora())
    assert set(tuned.model.peft_config["default"].target_modules) == {"c_attn", "c_proj", "c_fc"}
    published = dict(WeightExporter(tuned.model, "merged").tensors())
    expected = dict(WeightExporter(copy.deepcopy(tuned.model).merge_and_unload(), "full").tensors())
    assert published.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(published[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "traits"),
    [
        ("qwen2", Traits()),
        ("gemma3", Traits()),
        ("gpt2", Traits(serves_adapters=False)),
        ("mixtral", Traits(experts=True)),
        ("gpt_oss", Traits(experts=True)),
        ("lfm2", Traits(recurrent=True)),
        ("qwen3_5_text", Traits(recurrent=True, bfloat16=True, delta_head=64)),
        ("qwen3_next", Traits(experts=True, recurrent=True, bfloat16=True, delta_head=64)),
    ],
)
def test_traits(family: str, traits: Traits, tmp_path: Path) -> None:
    path = str(make_family(family, tmp_path / "m", tied=True))
    assert traits_of(load_config(path)) == traits


def test_a_family_that_vllm_has_no_kernel_for_on_a_cpu(tmp_path: Path) -> None:
    traits = traits_of(load_config(str(make_family("minimax_m2", tmp_path / "m", tied=True))))
    assert "router" in traits.not_on_cpu
