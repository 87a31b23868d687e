from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from raytune_rl.export.write import copy_companions, write_configs, write_weights
from raytune_rl.models.weights import WeightExporter
from tests.export.test_merge import Bases


def test_shards_load_as_one_model(tmp_path: Path, bases: Bases) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases(tied=False))
    exporter = WeightExporter(model, "full")
    write_configs(model, tmp_path)
    limit = 100_000
    files = write_weights(exporter.index, exporter.tensors(), tmp_path, max_shard_bytes=limit)
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(spec.nbytes for spec in exporter.index)
    assert max((tmp_path / file).stat().st_size for file in files) < max(limit, largest) + 10_000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_views_and_transposed_tensors_are_written_as_they_look(tmp_path: Path, bases: Bases) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases())
    exporter = WeightExporter(model, "full")
    whole = {name: torch.cat([tensor, tensor]) for name, tensor in exporter.tensors()}
    views = ((name, tensor[: len(tensor) // 2]) for name, tensor in whole.items())
    write_configs(model, tmp_path)
    assert write_weights(exporter.index, views, tmp_path) == ["model.safetensors"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_companions(tmp_path: Path) -> None:
    """The adapter's tokenizer if it has one, whole; the base's processor, code and licence; no weights."""
    files = {
        "base/tokenizer_config.json": "base",
        "base/merges.txt": "base",
        "base/preprocessor_config.json": "base",
        "base/modeling_new.py": "base",
        "base/LICENSE": "base",
        "base/README.md": "base",
        "base/model.safetensors": "base",
        "base/config.json": "base",
        "adapter/tokenizer_config.json": "adapter",
        "adapter/tokenizer.json": "adapter",
        "adapter/chat_template.jinja": "adapter",
        "adapter/additional_chat_templates/rag.jinja": "adapter",
        "adapter/optimizer/tokenizer.json": "adapter",
        "adapter/evil.py": "adapter",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    out = tmp_path / "out"
    out.mkdir()
    written = copy_companions(tmp_path / "adapter", tmp_path / "base", out)
    found = {p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert sorted(written) == sorted(found)
    assert found == {
        "tokenizer_config.json": "adapter",
        "tokenizer.json": "adapter",
        "chat_template.jinja": "adapter",
        "additional_chat_templates/rag.jinja": "adapter",
        "preprocessor_config.json": "base",
        "modeling_new.py": "base",
        "LICENSE": "base",
    }
