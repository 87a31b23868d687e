"""An adapter's files are there while they are read, and not after."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raytune_rl.workers.adapter_files import adapter_files


def test_files_go_with_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    weight = torch.arange(6.0).reshape(2, 3)
    with adapter_files({"w": weight}, '{"r": 8}') as folder:
        assert torch.equal(load_file(folder / "adapter_model.safetensors")["w"], weight)
        assert (folder / "adapter_config.json").read_text() == '{"r": 8}'
        assert folder.parent == tmp_path
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), adapter_files({"w": weight}, None):
        raise RuntimeError("the engine did not take it")
    assert not list(tmp_path.iterdir())
