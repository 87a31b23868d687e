"""The view of a checkpoint before it is loaded in shards; loading it takes two ranks (tests/cluster)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raytune_rl.models.load import load_config
from raytune_rl.models.sharding import Examined, examine
from raytune_rl.tiny.model import make_tiny_model

SMALL = {"hidden": 32, "layers": 2, "heads": 2}


def seen(directory: Path, zero: dict[str, Any] | None = None, **options: Any) -> Examined:
    config = load_config(str(directory))
    options = {"config": config, "dtype": torch.float32, **options}
    return examine(AutoModelForCausalLM, config, str(directory), zero or {"stage": 3}, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_checkpoint_lacks_nothing(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    state = torch.random.get_rng_state()
    found = seen(make_tiny_model(tmp_path, tied=tied, **SMALL), dtype=dtype)
    info = found.info
    assert not found.why_whole
    assert found.buffers["model.rotary_emb.inv_freq"] == torch.float32
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(state, torch.random.get_rng_state()), "adapters start as without it"


def test_what_a_checkpoint_lacks_and_has_too_many(tmp_path: Path) -> None:
    file = make_tiny_model(tmp_path, tied=False, **SMALL) / "model.safetensors"
    weights = load_file(file)
    weights["extra"] = weights.pop("lm_head.weight")
    save_file(weights, file, metadata={"format": "pt"})
    found = seen(tmp_path)
    info = found.info
    assert not found.why_whole
    assert info["missing_keys"] == {"lm_head.weight"}
    assert info["unexpected_keys"] == {"extra"}


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    file = make_tiny_model(tmp_path, **SMALL) / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        seen(tmp_path)


def test_tied_weights_that_differ_are_not_loaded_cut(tmp_path: Path) -> None:
    """Transformers compares them, and cut ones are empty: it would tie what the checkpoint keeps apart."""
    file = make_tiny_model(tmp_path, **SMALL) / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, file, metadata={"format": "pt"})
    assert "lm_head.weight twice" in seen(tmp_path).why_whole


def test_what_cannot_be_loaded_cut(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, **SMALL)
    assert "mics" in seen(directory, {"stage": 3, "mics_shard_size": 2}).why_whole
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "not safetensors" in seen(directory).why_whole
