"""From what the user typed to a local directory: a path as it is, a hub id through a hub."""

from __future__ import annotations

import re
from pathlib import Path

from raytune_rl.errors import ModelError


def resolve_path(
    model: str,
    *,
    use_hf: bool = False,
    revision: str | None = None,
    token: str | None = None,
    what: str = "model",
    config_only: bool = False,
) -> str:
    """A local directory for a path or hub id; a local directory never touches the network.

    Args:
        model: directory, or `owner/name` on ModelScope (Hugging Face with `use_hf`).
        use_hf: download from Hugging Face instead of ModelScope.
        revision: branch, tag or commit on the hub.
        token: hub token.
        what: "model" or "adapter", for the message.
        config_only: fetch its small files only: what describes it, not its weights.

    Raises:
        ModelError: nothing is there; the message says what was tried.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ModelError(f"{what} '{model}' is a file; give the directory that holds its config")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise ModelError(
            f"{what} directory '{model}' does not exist (and it is not a hub id of the form owner/name)"
        )
    hub = "Hugging Face" if use_hf else "ModelScope"
    files = ["*.json", "*.py"] if config_only else None
    try:
        if use_hf:
            from huggingface_hub import snapshot_download

            return str(snapshot_download(model, revision=revision, token=token, allow_patterns=files))
        from modelscope import snapshot_download as modelscope_download

        return str(modelscope_download(model, revision=revision, token=token, allow_patterns=files))
    except Exception as error:  # the hubs raise dozens of unrelated types, all of which mean "not available"
        other = "" if use_hf else ", use --use_hf true for Hugging Face"
        raise ModelError(
            f"'{model}' is not a directory here and could not be fetched from {hub} ({first_line(error)}); "
            f"check the id and the network{other}, or download it and pass the directory"
        ) from error


def first_line(error: BaseException) -> str:
    """An error of a library in one line, for the message of our own."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
