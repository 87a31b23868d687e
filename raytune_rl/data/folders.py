"""Which files of a folder are its data."""

from __future__ import annotations

import json
import re
from pathlib import Path

from raytune_rl.data.files import READERS
from raytune_rl.errors import DataError

# Written beside the data by `datasets`, `save_to_disk` and the hubs.
_METADATA = {
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "configuration.json",
}
_TRAIN = re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)")
_HELD_OUT = re.compile(r"(^|[^a-z])(test|testing|valid|validation|val|dev|eval)([^a-z]|$)")


def data_files(folder: Path, subsets: tuple[str, ...]) -> tuple[list[Path], str | None]:
    """The data files of a folder, sorted, and a sentence for the user when some were left out.

    A subset of a folder is a sub-folder or a file's name without its suffix. Where files (or sub-folders) are
    named after splits, only the training split is taken: training on the test set must not happen by
    accident.

    Raises:
        DataError: There is nothing to read, or a subset is not there.
    """
    if not subsets or subsets == ("all",):
        files = _files_under(folder)
        if not files:
            raise DataError(f"{folder}: no data file in this folder; known are {' '.join(READERS)}")
        return _training_split(folder, files)
    chosen: list[Path] = []
    for name in subsets:
        inside = folder / name
        named = sorted(
            path for path in folder.glob("*") if path.is_file() and path.stem == name and _is_data(path)
        )
        found = _files_under(inside) if inside.is_dir() else named
        if not found:
            there = sorted({path.stem if path.is_file() else path.name for path in folder.iterdir()})
            raise DataError(f"{folder}: there is no subset {name!r}; the folder holds {', '.join(there)}")
        chosen += found
    return chosen, None


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in READERS and path.name not in _METADATA and not path.name.startswith(".")


def _files_under(folder: Path) -> list[Path]:
    saved = folder / "state.json"
    if saved.is_file():
        # A data set saved by `save_to_disk` may have cache files beside its own: its state names the right
        # ones.
        listed = json.loads(saved.read_text(encoding="utf-8")).get("_data_files", [])
        return [folder / entry["filename"] for entry in listed]
    own = [path for path in folder.iterdir() if path.is_file() and _is_data(path)]
    below = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(own) + [path for inner in sorted(below) for path in _files_under(inner)]


def _training_split(folder: Path, files: list[Path]) -> tuple[list[Path], str | None]:
    def named(pattern: re.Pattern[str]) -> list[Path]:
        return [path for path in files if pattern.search(str(path.relative_to(folder)).lower())]

    train = named(_TRAIN)
    held_out = [path for path in named(_HELD_OUT) if path not in train]
    if not train or not held_out:
        return files, None
    names = ", ".join(str(path.relative_to(folder)) for path in held_out)
    kept = [path for path in files if path not in held_out]
    return kept, f"{folder}: {names} left out as held-out splits; name them as a subset to use them"
