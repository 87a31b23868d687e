"""The model to be tried, found from what training leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_rl.config import InferConfig
from raytune_rl.errors import ModelError
from raytune_rl.export.errors import ExportError
from raytune_rl.infer.source import find_source
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import save_model
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.tiny.model import make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "model", hidden=64, layers=1)


def adapter(base: Path, run: Path, system: str | None = None, **settings: Any) -> Path:
    """A checkpoint of a LoRA run, as the run leaves it."""
    path = run / "checkpoint-2"
    tuned = apply_tuner(load_model(str(base)).model, TunerSettings(lora_rank=4, **settings))
    save_model(tuned.model, path, load_tokenizer(str(base)))
    args = {"model": str(base), "system": system, "adapters": [], "package_versions": {}}
    (run / "args.json").write_text(json.dumps(args))
    return path


def find(tmp_path: Path, **settings: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return find_source(InferConfig(**settings), scratch, said.append), said


def test_a_plain_adapter_is_served_beside_its_base(base: Path, tmp_path: Path) -> None:
    checkpoint = adapter(base, tmp_path / "run", system="Be brief.")
    source, said = find(tmp_path, adapters=str(checkpoint))
    assert (source.model, source.adapter, source.lora_rank) == (str(base), str(checkpoint), 4)
    assert source.system == "Be brief."
    assert any("as in training" in notice for notice in source.notices)
    assert said == []
    assert find(tmp_path, adapters=str(checkpoint), system="Other.")[0].system == "Other."


def test_a_system_prompt_that_is_gone_is_told(base: Path, tmp_path: Path) -> None:
    checkpoint = adapter(base, tmp_path / "run", system="gone.txt")
    source, _ = find(tmp_path, adapters=str(checkpoint))
    assert source.system is None
    assert any("no longer there: none is used" in notice for notice in source.notices)


def test_an_adapter_of_another_base_is_named(base: Path, tmp_path: Path) -> None:
    checkpoint = adapter(base, tmp_path / "run")
    wide = make_tiny_model(tmp_path / "wide", hidden=128, layers=1)
    with pytest.raises(ModelError, match=r"another shape .*q_proj.* is \[4, 64\], the model's \[4, 128\]"):
        find(tmp_path, adapters=str(checkpoint), model=str(wide))


def test_a_pickled_adapter_is_served_as_any_other(base: Path, tmp_path: Path) -> None:
    checkpoint = adapter(base, tmp_path / "run")
    weights = checkpoint / "adapter_model.safetensors"
    torch.save(load_file(weights), checkpoint / "adapter_model.bin")
    weights.unlink()
    assert find(tmp_path, adapters=str(checkpoint))[0].adapter == str(checkpoint)


def test_the_adapters_own_tokenizer_writes_the_conversation(base: Path, tmp_path: Path) -> None:
    """It may have a chat template, or tokens, that its base lacks."""
    checkpoint = adapter(base, tmp_path / "run")
    assert find(tmp_path, adapters=str(checkpoint))[0].tokenizer == str(checkpoint)
    (checkpoint / "tokenizer_config.json").unlink()
    assert find(tmp_path, adapters=str(checkpoint))[0].tokenizer == str(base)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ("norm",)}, "modules trained whole"),
        ({"target_modules": ("q_proj", "embed_tokens")}, "embed_tokens"),
    ],
)
def test_what_vllm_cannot_serve_is_merged(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    untied = make_tiny_model(tmp_path / "untied", tied=False, hidden=64, layers=1)
    checkpoint = adapter(untied, tmp_path / "run", **settings)
    source, said = find(tmp_path, adapters=str(checkpoint))
    assert source.adapter is None
    assert Path(source.model) == tmp_path / "scratch" / "model"
    assert source.folder == checkpoint
    assert reason in said[0]
    AutoModelForCausalLM.from_pretrained(source.model)


def test_a_whole_model_is_served_as_it_is(base: Path, tmp_path: Path) -> None:
    source, _ = find(tmp_path, model=str(base))
    assert (source.model, source.adapter, source.system) == (str(base), None, None)


def test_what_is_mistaken_for_a_model_is_told_apart(base: Path, tmp_path: Path) -> None:
    checkpoint = adapter(base, tmp_path / "run")
    with pytest.raises(ModelError, match="is an adapter: give it as --adapters"):
        find(tmp_path, model=str(checkpoint))
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no config.json. Did you mean --adapters .*checkpoint-2"):
        find(tmp_path, model=str(tmp_path / "run"))
    with pytest.raises(ExportError, match="is a whole model"):
        find(tmp_path, adapters=str(base))
    with pytest.raises(ModelError, match="no/such"):
        find(tmp_path, model="no/such/folder")
