"""Which files of a folder are read: the subsets and splits that are asked for, else what is for training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from raytune_rl.data.compression import bare_name
from raytune_rl.data.files import known
from raytune_rl.data.layout import Layout, Part, is_held_out, is_train, unread_notice
from raytune_rl.data.picks import Pick
from raytune_rl.errors import DataError


def data_files(folder: Path, layout: Layout, pick: Pick) -> tuple[list[Path], list[str]]:
    """The data files of a folder, in order, and sentences for the user on what was left out or put together.

    Where no split is named and files are named after splits, only those for training are taken: training on
    the test set must not happen by accident.

    Args:
        folder: The folder.
        layout: What it holds.
        pick: What to take. Its subset is one of the folder's card, a sub-folder, a file's name without its
            suffixes, or a split; "all": all of it, unless something has that name. None: the default subset,
            else all.

    Raises:
        DataError: There is nothing to read, or a subset or split is not there.
    """
    subset, splits = pick.subset, pick.splits
    unread = unread_notice(folder, layout.unread)
    if not layout.parts:
        beside = f". {unread}" if unread else ""
        raise DataError(f"{folder}: no data file in this folder; known are {known()}{beside}")
    notices = [unread] if unread else []
    parts, is_split = _named(folder, layout, subset, notices)
    if splits and not is_split:
        found = [part for part in parts if part.split in splits or bare_name(part.path) in splits]
        there = {name for part in parts for name in (part.split, bare_name(part.path))}
        missing = [split for split in splits if split not in there]
        if missing and not pick.if_there:
            names = _words(part.split or bare_name(part.path) for part in parts)
            raise DataError(f"{folder}: there is no split {missing[0]!r}; there are {names}")
        if found:
            return [part.path for part in found], notices
    if not is_split:
        parts = _for_training(folder, subset, parts, notices)
    return [part.path for part in parts], notices


def _named(folder: Path, layout: Layout, name: str | None, notices: list[str]) -> tuple[list[Part], bool]:
    """The files of a subset, and whether its name was that of a split or file."""
    parts = list(layout.parts)
    if name is not None:
        inside = folder / name
        if found := [part for part in parts if part.subset == name]:
            return found, False
        if found := [part for part in parts if inside in part.path.parents]:
            return found, False
        if found := [part for part in parts if bare_name(part.path) == name or part.split == name]:
            return found, True
        if name != "all":
            stems = (part.split or bare_name(part.path) for part in parts)
            there = _words(sorted({*layout.subsets, *stems}))
            raise DataError(f"{folder}: there is no subset {name!r}; the folder holds {there}")
    elif layout.default is not None and len(layout.subsets) > 1:
        others = [other for other in layout.subsets if other != layout.default]
        notices.append(
            f"{folder}: its default subset {layout.default!r} is read; there are also {_words(others)} "
            f"(`{folder}:{others[0]}`)"
        )
        return [part for part in parts if part.subset == layout.default], False
    if name is None and len(layout.subsets) > 1:
        one = layout.subsets[0]
        notices.append(
            f"{folder}: the subsets {_words(layout.subsets)} are read together; for one of them write "
            f"`{folder}:{one}`"
        )
    return parts, False


def _for_training(folder: Path, subset: str | None, parts: list[Part], notices: list[str]) -> list[Part]:
    named = f"{folder}:{subset}" if subset not in (None, "all") else str(folder)
    held_out = [part for part in parts if is_held_out(part.split)]
    if held_out and any(is_train(part.split) for part in parts):
        names = _words(str(part.path.relative_to(folder)) for part in held_out)
        notices.append(
            f"{folder}: {names} left out as held-out splits; to use one write `{named}[{held_out[0].split}]`"
        )
        parts = [part for part in parts if part not in held_out]
    splits = list(dict.fromkeys(part.split for part in parts if part.split is not None))
    if len(splits) > 1:
        notices.append(
            f"{folder}: the splits {_words(splits)} are read together; for one of them write "
            f"`{named}[{splits[0]}]`"
        )
    return parts


def twins(folder: Path, files: Sequence[Path]) -> list[str]:
    """Sentences on files that differ in their suffixes alone: they may hold the same rows."""
    by_name: dict[Path, list[str]] = {}
    for path in files:
        by_name.setdefault(path.with_name(bare_name(path)), []).append(path.name)
    return [
        f"{folder}: {' and '.join(names)} are all read; if they hold the same rows, keep one"
        for names in by_name.values()
        if len(set(names)) > 1
    ]


def _words(names: Iterable[str]) -> str:
    listed = list(dict.fromkeys(names))
    more = f" and {len(listed) - 20} others" if len(listed) > 20 else ""
    return ", ".join(listed[:20]) + more
