"""The data files of a folder, each with the subset and the split that it belongs to."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from raytune_rl.data.cards import read_card
from raytune_rl.data.compression import bare_name, suffixes
from raytune_rl.data.files import is_data

# Written beside the data by `datasets`, `save_to_disk` and the hubs.
_METADATA = {
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "configuration.json",
}
# What lies beside data without being rows: pictures and the like that rows name, and texts for people.
_BESIDE = frozenset({
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".mp4", ".avi", ".mov", ".mkv",
    ".webm", ".wav", ".mp3", ".flac", ".ogg", ".m4a", ".md", ".rst", ".pdf", ".html", ".py", ".ipynb", ".sh",
    ".yaml", ".yml", ".lock", ".crc",
})  # fmt: skip
_TEXTS = {"license", "licence", "readme", "notice", "citation", "changelog", "makefile"}
_TRAIN = re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)")
_HELD_OUT = re.compile(r"(^|[^a-z])(test|testing|valid|validation|val|dev|eval)([^a-z]|$)")
_SHARD = re.compile(r"(?P<split>.+?)[-_.]?\d+(?P<of>-of-\d+)?([-.][0-9a-zA-Z]+)*")


@dataclass(frozen=True)
class Part:
    """One data file.

    Attributes:
        path: The file.
        subset: The data set's part that it belongs to; None where the folder has no subsets.
        split: The name of its split; None where its name tells none.
    """

    path: Path
    subset: str | None
    split: str | None


@dataclass(frozen=True)
class Layout:
    """The content of a folder.

    Attributes:
        parts: Its data files, in the order in which they are read.
        default: The subset that is meant when none is named; None: all of them.
        unread: Files that are neither data that can be read nor known to be none.
    """

    parts: tuple[Part, ...]
    default: str | None
    unread: tuple[Path, ...]

    @property
    def subsets(self) -> list[str]:
        """Names of the subsets, each once."""
        return list(dict.fromkeys(part.subset for part in self.parts if part.subset is not None))


def layout_of(folder: Path) -> Layout:
    """The layout of a folder: by its card if it has one, else by the names of files and folders."""
    files, unread = _files_under(folder)
    parts: list[Part] = []
    card, default = read_card(folder)
    if card:
        for name, splits in card.items():
            parts += [Part(path, name, split) for split in splits for path in splits[split]]
        on_card = {part.path for part in parts}
        unread += [path for path in files if path not in on_card]
    else:
        # Beside rows, a text is a note; alone, texts are the data.
        rows = [path for path in files if suffixes(path)[0] != ".txt"]
        unread += [path for path in files if rows and path not in rows]
        parts = [_by_name(folder, path) for path in rows or files]
    return Layout(tuple(parts), default, tuple(unread))


def is_train(split: str | None) -> bool:
    return split is not None and _TRAIN.search(split.lower()) is not None


def is_held_out(split: str | None) -> bool:
    return split is not None and not is_train(split) and _HELD_OUT.search(split.lower()) is not None


def unread_notice(folder: Path, unread: Sequence[Path]) -> str | None:
    """One sentence on the files that were not read."""
    if not unread:
        return None
    suffix_counts = Counter("".join(suffixes(path)) or "without a suffix" for path in unread)
    counted = ", ".join(f"{count} {suffix}" for suffix, count in suffix_counts.most_common())
    names = ", ".join(str(path.relative_to(folder)) for path in unread[:5])
    more = f" and {len(unread) - 5} others" if len(unread) > 5 else ""
    return f"{folder}: {len(unread)} files are not read ({counted}): {names}{more}"


def _files_under(folder: Path) -> tuple[list[Path], list[Path]]:
    """Data files, and what else lies there and might have been meant as data."""
    saved = folder / "state.json"
    if saved.is_file():
        # A data set saved by `save_to_disk` may have cache files beside its own: its state names the right
        # ones.
        listed = json.loads(saved.read_text(encoding="utf-8")).get("_data_files", [])
        return [folder / entry["filename"] for entry in listed], []
    own: list[Path] = []
    other: list[Path] = []
    below: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "_")):  # hidden, or written by Spark beside its data
            continue
        if path.is_dir():
            below.append(path)
        elif path.name not in _METADATA:
            (own if is_data(path) and not _is_text(path) else other).append(path)
    other = [path for path in other if not _is_text(path) and path.suffix.lower() not in _BESIDE]
    for inner in below:
        data, rest = _files_under(inner)
        own += data
        other += rest
    return own, other


def _is_text(path: Path) -> bool:
    return bare_name(path).lower() in _TEXTS and path.suffix.lower() in ("", ".txt", ".md", ".rst")


def _by_name(folder: Path, path: Path) -> Part:
    inside = path.relative_to(folder).parts[:-1]
    plain = [bare_name(Path(name)) if is_data(Path(name)) else name for name in inside]
    first = next(iter(plain), "data")
    no_subset = first == "data" or is_train(first) or is_held_out(first)
    return Part(path, None if no_subset else first, _split_of(bare_name(path), plain))


def _split_of(name: str, folders: Iterable[str]) -> str | None:
    """`train_sft-00000-of-00003` is of the split train_sft; else a folder's name may tell."""
    shard = _SHARD.fullmatch(name)
    base = shard["split"] if shard else name
    if is_train(base) or is_held_out(base):
        return base
    by_folder = [one for one in folders if is_train(one) or is_held_out(one)]
    if by_folder:
        return by_folder[-1]
    return base if shard and shard["of"] else None
