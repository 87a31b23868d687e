"""An adapter as files, for as long as an engine takes to read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from raytune_rl.workers.leftovers import own_folder


@contextmanager
def adapter_files(tensors: Mapping[str, torch.Tensor], config: str | None) -> Iterator[Path]:
    """A folder with an adapter as PEFT saves it, gone when the block ends, however it ends.

    A killed process leaves its folder behind, which others remove (`leftovers`).

    Args:
        tensors: The weights by name.
        config: Text of `adapter_config.json`.
    """
    with own_folder("adapter") as folder:
        save_file(dict(tensors), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(config or "{}")
        yield folder
