"""Adapters that other programs made with PEFT, merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from raytune_rl.errors import ModelError
from tests.export.test_merge import merge

Bases = Callable[..., Path]
WITHOUT = {"save_embedding_layers": False}


def peft_adapter(
    path: Path, base: Path, *, added: int = 0, save: dict[str, Any] | None = None, **lora: Any
) -> Path:
    """An adapter as PEFT saves it, every trainable number moved; with `added` tokens more than its base."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if added:
        model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + added)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([f"<x{i}>" for i in range(added)])
        tokenizer.save_pretrained(path)
    peft = get_peft_model(
        model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **lora})
    )
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    peft.save_pretrained(path, **(save or {}))
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def peft_answers(base: Path, adapter: Path, added: int = 0) -> torch.Tensor:
    """Logits of base and adapter by PEFT itself."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if added:
        model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + added)
    return logits_of(PeftModel.from_pretrained(model, adapter).eval())


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 60)[None]).logits


def merged_answers(path: Path) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())


@pytest.mark.parametrize(
    ("lora", "tied"),
    [
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"trainable_token_indices": [3, 50]}, True),
        ({"trainable_token_indices": {"embed_tokens": [3, 50]}}, True),
    ],
)
def test_what_is_done_to_tied_embeddings_is_in_the_merged_model(
    tmp_path: Path, bases: Bases, lora: dict[str, Any], tied: bool
) -> None:
    adapter = peft_adapter(tmp_path / "a", bases(), **lora)
    path = merge(adapter).path
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(path / "model.safetensors")) is not tied
    torch.testing.assert_close(merged_answers(path), peft_answers(bases(), adapter), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("tied", "lora"),
    [
        (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (True, {}),  # PEFT saves embeddings that were resized
        (False, {}),
        (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (True, {"trainable_token_indices": [3, 50]}),
    ],
)
def test_added_tokens_resize_the_base(tmp_path: Path, bases: Bases, tied: bool, lora: dict[str, Any]) -> None:
    adapter = peft_adapter(
        tmp_path / "a", bases(tied=tied), added=8, save={"save_embedding_layers": True}, **lora
    )
    path = merge(adapter).path
    rows = AutoModelForCausalLM.from_pretrained(bases(tied=tied)).get_input_embeddings().num_embeddings
    assert json.loads((path / "config.json").read_text())["vocab_size"] == rows + 8
    torch.testing.assert_close(
        merged_answers(path), peft_answers(bases(tied=tied), adapter, 8), atol=2e-4, rtol=1e-4
    )
    assert "<x7>" in AutoTokenizer.from_pretrained(path).get_vocab()


def test_a_base_whose_files_have_both_matrices_is_written_as_it_is(tmp_path: Path, bases: Bases) -> None:
    """Merged by a program that left its config tied; Transformers and vLLM compare what is in the files."""
    base = tmp_path / "base"
    shutil.copytree(bases(), base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 0.1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    path = merge(peft_adapter(tmp_path / "a", base)).path
    assert not json.loads((path / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(load_file(path / "model.safetensors")["lm_head.weight"], weights["lm_head.weight"])


def test_added_tokens_without_their_embeddings_are_refused(tmp_path: Path, bases: Bases) -> None:
    adapter = peft_adapter(
        tmp_path / "a", bases(tied=False), added=8, save=WITHOUT, modules_to_save=["lm_head"]
    )
    with pytest.raises(ModelError, match=r"trained with \d+ tokens in its head.*save_embedding_layers=True"):
        merge(adapter)


def test_pickled_tensors_are_merged_and_pickled_code_is_not_run(tmp_path: Path, bases: Bases) -> None:
    adapter = peft_adapter(tmp_path / "a", bases(), save={"safe_serialization": False})
    assert (adapter / "adapter_model.bin").is_file()
    torch.testing.assert_close(
        merged_answers(merge(adapter).path), peft_answers(bases(), adapter), atol=2e-4, rtol=1e-4
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    with pytest.raises(ModelError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        merge(tmp_path / "b")
    torch.save({"w": Path("x")}, tmp_path / "b" / "adapter_model.bin")
    with pytest.raises(ModelError, match="holds more than tensors"):
        merge(tmp_path / "b")


def test_an_adapter_of_another_base_names_what_does_not_fit(tmp_path: Path, bases: Bases) -> None:
    adapter = peft_adapter(tmp_path / "a", bases())
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert weights[name].shape == (4, 64)
    save_file({**weights, name: torch.zeros(4, 32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(
        ModelError,
        match=r"1 of its weights.*q_proj.lora_A.weight is \[4, 32\], the model's \[4, 64\].*--model",
    ):
        merge(adapter)
    deeper = {**weights, name.replace(".0.", ".9."): weights[name].clone()}
    save_file(deeper, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"has 1 weights that the base model has no place for"):
        merge(adapter)


def test_another_kind_of_adapter_is_named(tmp_path: Path, bases: Bases) -> None:
    adapter = peft_adapter(tmp_path / "a", bases())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ModelError, match="peft_type is IA3"):
        merge(adapter)


def test_a_merged_model_stops_where_its_adapter_was_taught_to(tmp_path: Path, bases: Bases) -> None:
    adapter = peft_adapter(tmp_path / "a", bases())
    GenerationConfig(eos_token_id=[7]).save_pretrained(adapter)
    found = GenerationConfig.from_pretrained(merge(adapter).path).eos_token_id
    end = AutoTokenizer.from_pretrained(bases()).convert_tokens_to_ids("<|im_end|>")
    assert {7, end} <= set(found)
