"""An adapter as files, for as long as an engine takes to read them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

_PREFIX = "raytune_rl_adapter_"
LEFT_S = 86400.0
"""Age at which files are no longer read by anybody: their worker was killed while it loaded them."""


@contextmanager
def adapter_files(tensors: Mapping[str, torch.Tensor], config: str | None) -> Iterator[Path]:
    """A folder with an adapter as PEFT saves it, gone when the block ends, however it ends.

    Only a killed process leaves its folder behind; a later one on the machine removes it.

    Args:
        tensors: The weights by name.
        config: Text of `adapter_config.json`.
    """
    _remove_left_ones()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        save_file(dict(tensors), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(config or "{}")
        yield folder


def _remove_left_ones() -> None:
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another worker removes it too
            status = left.lstat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > LEFT_S:
                shutil.rmtree(left, ignore_errors=True)
