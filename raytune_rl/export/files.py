"""Which files of a folder are the model, and so go to a hub."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path

import yaml

from raytune_rl.export.errors import ExportError
from raytune_rl.export.guard import Guard
from raytune_rl.tracking.checkpoints import MANIFEST, verify

# The state of a training run, ours or ms-swift's: of no use without the run, and far larger than an adapter.
# training_args.bin of ms-swift holds the token that it was started with, export.json the folders of a merge.
_LOCAL = (
    "optimizer",
    "optimizer.*",
    "optimizer-*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "global_step*",
    "latest",
    "zero_to_fp32.py",
    "training_args.bin",
    "trainer_state.json",
    "runs",
    "images",
    "checkpoint-*",
    "export.json",
    MANIFEST,
)
_SEARCHED_BYTES = 32 * 2**20
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


def files_to_push(folder: Path, guard: Guard, say: Callable[[str], None]) -> list[str]:
    """Relative names of the model's or adapter's files, with forward slashes.

    Args:
        folder: a checkpoint or a model.
        guard: knows the token, which no file may hold.
        say: takes lines on what is left out.

    Raises:
        ExportError: there is no model in the folder, or a file holds the token.
        CheckpointError: it is a checkpoint of ours that is not whole.
    """
    if not folder.is_dir():
        raise ExportError(f"There is no folder {folder} to upload.")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ExportError(
            f"{folder} is no model and no adapter: it has no config.json and no adapter_config.json."
        )
    if (folder / MANIFEST).is_file():
        verify(folder)
    kept, left_out = [], set()
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if not file.is_file() or any(part.startswith(".") for part in parts):
            continue
        if any(fnmatch.fnmatch(parts[0], pattern) for pattern in _LOCAL):
            left_out.add(parts[0])
        elif parts == ("README.md",) and not _publishable(file):
            say("README.md is not uploaded: it names a folder of this machine as the base model")
        else:
            kept.append("/".join(parts))
    if left_out:
        say(f"of use only here, not uploaded: {', '.join(sorted(left_out))}")
    for name in kept:
        file = folder / name
        if file.stat().st_size <= _SEARCHED_BYTES and guard.found_in(file.read_bytes()):
            raise ExportError(f"{file} holds the hub token. Remove it from there; nothing was uploaded.")
    return kept


def _publishable(readme: Path) -> bool:
    """PEFT's model card names the base by its path, which hubs refuse as metadata and others cannot use."""
    match = _FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        return True
    try:
        metadata = yaml.safe_load(match.group(1))
    except yaml.YAMLError:
        return True  # the hub says what is wrong with it
    base = metadata.get("base_model") if isinstance(metadata, dict) else None
    named = base if isinstance(base, list) else [base]
    return all(name is None or _HUB_ID.fullmatch(str(name)) for name in named)
