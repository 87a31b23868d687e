"""Published weights: names, values, tying, and that the model stays untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from raytune_rl.errors import ModelError
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.models.weights import WeightExporter, export_tensors, save_model


def adapted(model: Any, **options: Any) -> PeftModel:
    """LoRA with random, non-zero A and B (and a DoRA magnitude that is off its initial value)."""
    torch.manual_seed(11)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj", "down_proj"]} | options
    )
    peft = get_peft_model(model, config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return peft.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_full_is_what_save_pretrained_writes(qwen2: Callable[..., Any], tied: bool, tmp_path: Path) -> None:
    model = qwen2(tied=tied)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    got = dict(export_tensors(nn.ModuleDict({"model": TokenScorer(model)})["model"], "full"))
    assert got.keys() == written.keys()
    assert ("lm_head.weight" in got) is (not tied)
    assert all(torch.equal(got[name], written[name]) for name in got)
    assert not any(t.requires_grad for t in got.values())


def test_persistent_buffers_are_weights_too(qwen2: Callable[..., Any], tmp_path: Path) -> None:
    """Routers of some models balance their experts by a buffer; rotary frequencies are not stored."""
    model = qwen2(tied=False)
    model.model.layers[0].mlp.gate_proj.register_buffer("balance", torch.tensor([1.0, 2.0]))
    model.model.layers[1].register_buffer("balance", torch.tensor([3.0]))
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert {name for name in written if "balance" in name} == {
        "model.layers.0.mlp.gate_proj.balance",
        "model.layers.1.balance",
    }
    assert dict(export_tensors(model, "full")).keys() == written.keys()
    merged = dict(export_tensors(adapted(model, target_modules=["gate_proj"]), "merged"))
    assert merged.keys() == written.keys()
    assert torch.equal(merged["model.layers.0.mlp.gate_proj.balance"], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["lora", "rslora", "dora", "lora_bias", "modules_to_save", "embedding", "lm_head"],
)
def test_merged_equals_peft_merge_and_leaves_the_model_alone(
    qwen2: Callable[..., Any], options: dict[str, Any]
) -> None:
    base = {n: p.clone() for n, p in qwen2(tied=False).named_parameters()}
    peft = adapted(qwen2(tied=False), **options)
    before = {n: p.clone() for n, p in peft.named_parameters()}
    exporter = WeightExporter(peft, "merged")
    got = dict(exporter.tensors())
    want = dict(copy.deepcopy(peft).merge_and_unload().named_parameters())

    assert got.keys() == want.keys() == base.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name].detach(), rtol=0, atol=1e-6, msg=name)
    assert any((got[n] - base[n]).abs().max() > 1e-2 for n in got)  # the adapter did change something
    assert all(torch.equal(p, before[n]) for n, p in peft.named_parameters())
    specs = {s.name: (s.shape, s.dtype, s.nbytes) for s in exporter.index}
    assert specs == {
        n: (tuple(t.shape), str(t.dtype).removeprefix("torch."), t.nbytes) for n, t in got.items()
    }


def test_merged_weights_reproduce_the_adapted_model(qwen2: Callable[..., Any]) -> None:
    peft = adapted(qwen2(), use_dora=True)
    plain = qwen2(seed=99)
    plain.load_state_dict(dict(export_tensors(peft, "merged")), strict=False)
    plain.tie_weights()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(plain(ids).logits, peft(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_merged_follows_training_without_a_new_plan(qwen2: Callable[..., Any]) -> None:
    peft = adapted(qwen2())
    exporter = WeightExporter(peft, "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    first = dict(exporter.tensors([name]))
    assert list(first) == [name]
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if "lora_B" in key:
                parameter.add_(1.0)
    second = dict(exporter.tensors([name]))
    assert (first[name] - second[name]).abs().max() > 1e-2


def test_merged_rounds_once_in_16_bits(qwen2: Callable[..., Any]) -> None:
    peft = adapted(qwen2().bfloat16())
    name = "model.layers.1.mlp.down_proj.weight"
    layer = peft.get_base_model().get_submodule(name.removesuffix(".weight"))
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    got = dict(WeightExporter(peft, "merged").tensors([name]))[name]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.bfloat16()) or (got.double() - exact).abs().max() <= (
        exact.abs().max() * 2**-8
    )


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_adapter_is_what_peft_writes(
    qwen2: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    peft = adapted(qwen2(), **options)
    save_model(peft, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    got = dict(export_tensors(peft, "adapter"))
    assert got.keys() == written.keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in got
    assert all(torch.equal(got[name], written[name]) for name in got)
    assert [s.name for s in WeightExporter(peft, "adapter").index] == list(got)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_with_transformers(qwen2: Callable[..., Any], tied: bool, tmp_path: Path) -> None:
    model = qwen2(tied=tied)
    save_model(TokenScorer(model), tmp_path / "new" / "dir")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "dir")
    ids = torch.arange(9)[None]
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_saved_adapter_loads_with_peft(qwen2: Callable[..., Any], tmp_path: Path) -> None:
    peft = adapted(qwen2())
    save_model(TokenScorer(peft), tmp_path)
    back = PeftModel.from_pretrained(qwen2(), str(tmp_path)).eval()
    ids = torch.arange(9)[None]
    assert torch.equal(back(input_ids=ids).logits, peft(input_ids=ids).logits)


def test_fused_experts_go_out_one_by_one(tmp_path: Path) -> None:
    """Transformers fuses experts in memory; checkpoints and engines have them apart."""
    config = Qwen3MoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    exporter = WeightExporter(model, "full")
    got = dict(exporter.tensors())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert name in written
    assert got.keys() == written.keys()
    assert all(torch.equal(got[n], written[n]) for n in got)
    only = dict(exporter.tensors([name]))
    assert list(only) == [name]
    assert torch.equal(only[name], written[name])


def test_vision_model_names_are_the_checkpoints(qwen2_vl: Callable[[], Any], tmp_path: Path) -> None:
    model = qwen2_vl()
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    got = dict(export_tensors(model, "full"))
    assert got.keys() == written.keys()
    assert all(torch.equal(got[n], written[n]) for n in got)


def test_quantised_base_is_published_dense(qwen2: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from raytune_rl.models.load import Quantization, load_model
    from raytune_rl.models.tuner import TunerSettings, apply_tuner

    qwen2().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), quantization=Quantization())
    tuned = apply_tuner(loaded.model, TunerSettings(lora_dropout=0.0, target_modules=("q_proj",)))
    exporter = WeightExporter(tuned.model, "merged")
    got = dict(exporter.tensors())
    original = load_file(tmp_path / "model.safetensors")
    assert {n: tuple(t.shape) for n, t in got.items()} == {n: tuple(t.shape) for n, t in original.items()}
    assert {s.name: s.shape for s in exporter.index} == {n: tuple(t.shape) for n, t in got.items()}
    for name, tensor in original.items():  # LoRA starts as a no-op, so only NF4's rounding is left
        assert (got[name] - tensor).abs().max() <= 0.15 * tensor.abs().max(), name
    # QLoRA trains: gradient reaches the adapter through the quantised layers.
    ids = torch.arange(6)[None]
    out = TokenScorer(tuned.model)(ids, ids, None, torch.arange(5), ids[0, 1:])
    out.logprobs.sum().backward()
    grads = [p.grad for n, p in tuned.model.named_parameters() if "lora_B" in n]
    assert grads
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_refusals(qwen2: Callable[..., Any]) -> None:
    peft = adapted(qwen2())
    with pytest.raises(ModelError, match="has no adapter"):
        WeightExporter(qwen2(), "merged")
    with pytest.raises(ModelError, match="has an adapter"):
        WeightExporter(peft, "full")
    with pytest.raises(ModelError, match=r"no\.such"):
        list(WeightExporter(peft, "merged").tensors(["no.such"]))
    with pytest.raises(ModelError, match="holds no"):
        WeightExporter(nn.Linear(2, 2), "full")
    peft.merge_adapter()
    with pytest.raises(ModelError, match="merged already"):
        WeightExporter(peft, "merged")
