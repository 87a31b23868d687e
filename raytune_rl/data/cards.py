"""The card of a data set (`README.md`, as the hubs have it) says about the files beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from raytune_rl.data.files import is_data

Splits = dict[str, list[Path]]
"""Name of a split to its files."""


def read_card(folder: Path) -> tuple[dict[str, Splits], str | None]:
    """Name of each subset to its splits, as far as the files are there (empty without such a card); and the
    subset that is the default, if one is.

    Source: the `configs` of a data set card, https://huggingface.co/docs/hub/datasets-manual-configuration.
    """
    configs = _header(folder / "README.md").get("configs")
    found: dict[str, Splits] = {}
    default = None
    for config in configs if isinstance(configs, list) else []:
        if not isinstance(config, dict):
            continue
        name = str(config.get("config_name", "default"))
        inside = str(config.get("data_dir", ""))
        splits: Splits = {}
        for split, pattern in _patterns(config.get("data_files")):
            files = _matching(folder, str(PurePosixPath(inside, pattern)))
            splits[split] = sorted({*splits.get(split, ()), *files})
        splits = {split: files for split, files in splits.items() if files}
        if splits:
            found[name] = splits
            if name == "default" or config.get("default") is True:
                default = name
    return found, default


def _header(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        parts = text.split("---\n", 2) if text.startswith("---\n") else []
        header = yaml.safe_load(parts[1]) if len(parts) == 3 else None
    except (OSError, ValueError, yaml.YAMLError):  # a text for people, too: it need not be one
        return {}
    return header if isinstance(header, dict) else {}


def _patterns(value: Any) -> Iterator[tuple[str, str]]:
    """(split, pattern) of `data_files`: a pattern, a list of them, or for each split one of these."""
    if isinstance(value, str):
        yield "train", value
    elif isinstance(value, dict):
        for split, patterns in value.items():
            yield from ((str(split), pattern) for _, pattern in _patterns(patterns))
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, dict) and "split" in one:
                yield from ((str(one["split"]), pattern) for _, pattern in _patterns(one.get("path")))
            elif isinstance(one, str):
                yield "train", one


def _matching(folder: Path, pattern: str) -> list[Path]:
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts or "://" in pattern:
        return []  # another place than this folder
    try:
        found = list(folder.glob(pattern))
    except (ValueError, NotImplementedError, IndexError):  # no pattern
        return []
    inside = [path for one in found if one.is_dir() for path in one.rglob("*")]
    return [path for path in (*found, *inside) if path.is_file() and is_data(path)]
