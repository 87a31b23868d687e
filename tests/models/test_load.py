"""Loading: defaults, notices and the errors people will meet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig

from raytune_rl.errors import ModelError
from raytune_rl.models.hub import resolve_path
from raytune_rl.models.load import Quantization, load_model, load_processor, load_tokenizer
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import save_model
from raytune_rl.protocol.model import TunerSettings
from tests.families.recipes import make_family


@pytest.fixture
def saved(qwen2: Callable[..., Any], tmp_path: Path) -> Path:
    model = qwen2(tied=False).bfloat16()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_cpu_default_is_float32_and_says_so(saved: Path) -> None:
    loaded = load_model(str(saved))
    assert loaded.model.dtype == torch.float32
    assert len(loaded.notices) == 1
    assert "bfloat16" in loaded.notices[0]
    assert not loaded.model.training


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "bf16"])
def test_a_chosen_dtype_is_kept(saved: Path, dtype: Any) -> None:
    loaded = load_model(str(saved), dtype=dtype)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.notices == ()


def test_weights_go_to_a_device_tensor_by_tensor(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Straight from the file, as Transformers does with a device map; here to a device that holds none."""
    asked: list[Any] = []
    real = AutoModelForCausalLM.from_pretrained

    def from_pretrained(path: str, **options: Any) -> Any:
        asked.append(options.get("device_map"))
        return real(path, **{**options, "device_map": {"": "cpu"}})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    on_device = load_model(str(saved), device="meta", dtype="float32").model
    on_cpu = load_model(str(saved)).model  # here through a device map too
    assert asked == [{"": "meta"}, None]
    assert {p.device.type for p in on_device.parameters()} == {"meta"}
    monkeypatch.undo()
    plain = load_model(str(saved)).model
    assert all(torch.equal(p, q) for p, q in zip(on_cpu.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("asked", ["flash_attn", "flash_attention_2", "flash_attention_3"])
def test_flash_attention_falls_back_with_a_notice(saved: Path, asked: str) -> None:
    loaded = load_model(str(saved), dtype="float32", attn_impl=asked)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert len(loaded.notices) == 1
    assert asked in loaded.notices[0]
    assert "sdpa" in loaded.notices[0]
    assert (
        load_model(str(saved), dtype="float32", attn_impl="eager").model.config._attn_implementation
        == "eager"
    )


def test_vision_model_keeps_its_class(qwen2_vl: Callable[[], Any], tmp_path: Path) -> None:
    qwen2_vl().save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path)).model).__name__ == "Qwen2_5_VLForConditionalGeneration"


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_model(str(tmp_path / "nowhere"))


def test_a_file_is_not_a_model(saved: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        load_model(str(saved / "config.json"))


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_an_adapter_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="--adapters"):
        load_model(str(tmp_path))


def test_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match="cannot read"):
        load_model(str(tmp_path))


def test_not_a_language_model(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"model_type": "vit"}))
    with pytest.raises(ModelError, match="model type 'vit'"):
        load_model(str(tmp_path))


def test_missing_weights_are_never_random(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load_model(str(saved))


def test_no_weights_at_all(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(saved))


def test_unknown_dtype(saved: Path) -> None:
    with pytest.raises(ModelError, match="torch_dtype 'int3'"):
        load_model(str(saved), dtype="int3")


@pytest.mark.parametrize("use_hf", [True, False])
def test_hub_failure_names_the_hub_and_a_way_out(
    use_hf: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route to hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("modelscope.snapshot_download", fail)
    with pytest.raises(ModelError, match="no route to hub") as caught:
        resolve_path("some-owner/some-model", use_hf=use_hf)
    assert ("Hugging Face (" in str(caught.value)) is use_hf
    assert "pass the directory" in str(caught.value)


def test_local_directory_wins_over_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent.parent)
    assert resolve_path(f"{saved.parent.name}/model") == f"{saved.parent.name}/model"


def test_generation_config_that_transformers_would_not_save(saved: Path, tmp_path: Path) -> None:
    (saved / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    loaded = load_model(str(saved), dtype="float32")
    assert any("generation_config" in notice for notice in loaded.notices)
    loaded.model.save_pretrained(tmp_path / "again")


def test_four_bits_on_a_cpu_need_whole_blocks(qwen2: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    qwen2(intermediate=96).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="multiples of 64"):
        load_model(str(tmp_path), quantization=Quantization())


def test_tokenizer_and_processor_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match="processor"):
        load_processor(str(tmp_path))


def test_an_adapter_names_its_base_wherever_it_was_trained_from(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    model = load_model(saved.name).model
    save_model(apply_tuner(model, TunerSettings()).model, saved.parent / "adapter")
    written = json.loads((saved.parent / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(saved)


def test_attention_with_a_soft_cap_is_not_left_to_a_kernel_without_one(tmp_path: Path) -> None:
    """Transformers' sdpa leaves Gemma 2's cap out without a word: other logits than vLLM's."""
    path = str(make_family("gemma2", tmp_path / "m", tied=True))
    for asked in (None, "flash_attn"):
        loaded = load_model(path, dtype="float32", attn_impl=asked)
        assert loaded.model.config._attn_implementation == "eager"
        assert len(loaded.notices) == 1
    assert load_model(path, dtype="float32", attn_impl="eager").notices == ()
    with pytest.raises(ModelError, match="attn_impl sdpa: this model caps its attention's logits"):
        load_model(path, dtype="float32", attn_impl="sdpa")
