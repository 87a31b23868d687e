"""Adapters that were made elsewhere, on the way into training and beside an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ModelError
from raytune_rl.groups import lora_sync
from raytune_rl.models.adapters import open_adapter
from raytune_rl.models.load import load_model
from raytune_rl.models.served import adapter_tensors, held_back, read_adapter_config, unties_head
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import WeightExporter, save_model
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.tiny.model import make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tied", hidden=64, layers=1)


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Callable[..., str]:
    """An adapter as PEFT saves it, every trainable number moved."""

    def make(added: int = 0, pickled: bool = False, embeddings: bool = False, **lora: Any) -> str:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if added:
            model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + added)
        settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **lora}
        peft = get_peft_model(model, LoraConfig(**settings))
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.05
        options = {"safe_serialization": not pickled, "save_embedding_layers": embeddings or bool(added)}
        peft.save_pretrained(tmp_path / "adapter", **options)
        return str(tmp_path / "adapter")

    return make


UNTYING = [
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["lm_head"]},
]
TIED = [
    {},
    {"embeddings": True},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"trainable_token_indices": [3, 9]},
    {"modules_to_save": ["norm"]},
]


@pytest.mark.parametrize(("how", "unties"), [*((h, True) for h in UNTYING), *((h, False) for h in TIED)])
def test_driver_and_policy_agree_on_whether_an_adapter_unties_the_head(
    base: Path, made: Callable[..., str], how: dict[str, Any], unties: bool
) -> None:
    """The driver reads it from the files, before the engines are built; the policy sees it in its weights."""
    adapter = made(**how)
    config = RLHFConfig(model=str(base), dataset="d.jsonl", adapters=adapter, reward_funcs="format")
    assert lora_sync.unties(config) is unties
    exporter = WeightExporter(
        apply_tuner(load_model(str(base)).model, TunerSettings(), [adapter]).model, "merged"
    )
    assert exporter.unties is unties
    assert ("lm_head.weight" in {spec.name for spec in exporter.index}) is unties
    # What vLLM would not take beside its base travels merged.
    assert (lora_sync.publish_mode(config) == "merged") is (how != {})


def test_full_training_from_an_adapter_that_unties_is_saved_with_both_matrices(
    base: Path, made: Callable[..., str], tmp_path: Path
) -> None:
    adapter = made(modules_to_save=["lm_head"])
    full = apply_tuner(load_model(str(base)).model, TunerSettings(tuner_type="full"), [adapter]).model
    assert WeightExporter(full, "full").unties
    save_model(full, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, full.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


def test_training_does_not_go_on_from_added_tokens(base: Path, made: Callable[..., str]) -> None:
    adapter = made(added=8, modules_to_save=["embed_tokens", "lm_head"])
    model = load_model(str(base)).model
    rows = model.get_input_embeddings().num_embeddings
    with pytest.raises(
        ModelError, match=rf"trained with {rows + 8} tokens .* its base has {rows}.*merge it first"
    ):
        apply_tuner(model, TunerSettings(), [adapter])
    assert model.get_input_embeddings().num_embeddings == rows


def test_pickled_tensors_are_as_good_as_safetensors(base: Path, made: Callable[..., str]) -> None:
    plain = adapter_tensors(made())
    adapter = made(pickled=True)
    (Path(adapter) / "adapter_model.safetensors").unlink()
    assert adapter_tensors(adapter) == plain
    assert held_back(read_adapter_config(adapter), plain) == []
    assert open_adapter(load_model(str(base)).model, adapter).peft_config["default"].r == 4


def test_what_is_saved_whole_is_not_served(made: Callable[..., str]) -> None:
    adapter = made(embeddings=True)
    names = adapter_tensors(adapter)
    settings = read_adapter_config(adapter)
    assert "model.embed_tokens" in held_back(settings, names)[0]
    assert not unties_head(settings, names)
