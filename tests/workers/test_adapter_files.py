"""An adapter's files are there while they are read, and not after."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raytune_rl.workers.adapter_files import LEFT_S, adapter_files


def test_files_go_with_the_block_and_left_ones_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    young, old, other = (tmp_path / n for n in ("raytune_rl_adapter_1", "raytune_rl_adapter_2", "other"))
    for left in (young, old, other):
        left.mkdir()
        (left / "adapter_model.safetensors").touch()
    for left in (old, other):
        long_ago = left.stat().st_mtime - LEFT_S - 60
        os.utime(left, (long_ago, long_ago))
    weight = torch.arange(6.0).reshape(2, 3)
    with adapter_files({"w": weight}, '{"r": 8}') as folder:
        assert torch.equal(load_file(folder / "adapter_model.safetensors")["w"], weight)
        assert (folder / "adapter_config.json").read_text() == '{"r": 8}'
        assert folder.parent == tmp_path
    assert sorted(tmp_path.iterdir()) == sorted([young, other])
    with pytest.raises(RuntimeError), adapter_files({"w": weight}, None):
        raise RuntimeError("the engine did not take it")
    assert sorted(tmp_path.iterdir()) == sorted([young, other])
