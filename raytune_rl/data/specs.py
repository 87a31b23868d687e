"""The `--dataset` syntax: ms-swift's `[hf::|ms::]<path or id>[:<subset>[/<subset>...]|:all][#N]`, and before
the `#` the splits to read, `[<split>[/<split>...]]` in brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raytune_rl.data.files import is_data
from raytune_rl.errors import DataError

Hub = Literal["hf", "ms"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class DatasetSpec:
    """One data set as the user named it.

    Attributes:
        text: The user's own words, for messages.
        path: The local file or folder, or None for a hub's data set.
        hub: Where `hub_id` lies: Hugging Face or ModelScope; None for a local path.
        hub_id: `owner/name` on the hub, else an empty string.
        subsets: Names after the colon; `("all",)` for every subset.
        splits: Names in brackets; empty: what is for training.
        sample: N of `#N`, or None for the whole set.
    """

    text: str
    path: Path | None
    hub: Hub | None = None
    hub_id: str = ""
    subsets: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    sample: int | None = None


def parse_spec(text: str, *, use_hf: bool = False) -> DatasetSpec:
    """Reads one `--dataset` value. A path that exists is local, whatever it looks like; nothing touches the
    network.

    Args:
        text: The value.
        use_hf: Where an id without `hf::` or `ms::` lies; ModelScope unless true, as in ms-swift.

    Raises:
        DataError: The path does not exist and cannot be a hub id, `#N` is not a positive number, or the
            brackets do not name splits.
    """
    if not text.strip():
        raise DataError("an empty data set name was given; name a file, a folder or a hub id")
    if _exists(text):
        return DatasetSpec(text, Path(text).expanduser())
    rest, hub = _strip_hub(text)
    rest, sample = _strip_sample(rest, text)
    if hub is None and _exists(rest):
        return DatasetSpec(text, Path(rest).expanduser(), sample=sample)
    rest, splits = _strip_splits(rest, text)
    location, _, subset_text = rest.partition(":")
    subsets = tuple(name for name in subset_text.split("/") if name)
    if hub is None and _exists(location):
        path = Path(location).expanduser()
        return DatasetSpec(text, path, subsets=subsets, splits=splits, sample=sample)
    if hub is None and not _can_be_hub_id(location):
        raise DataError(
            f"data set {text!r}: there is no file or folder {location!r}, nor is it a hub id (`owner/name`). "
            "Check the path; for a hub's data set without an owner write `hf::name` or `ms::name`"
        )
    return DatasetSpec(text, None, hub or ("hf" if use_hf else "ms"), location, subsets, splits, sample)


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, an unknown ~user: not a path
        return False


def _strip_hub(text: str) -> tuple[str, Hub | None]:
    prefix, separator, rest = text.partition("::")
    if separator and prefix.lower() in ("hf", "ms"):
        return rest, "hf" if prefix.lower() == "hf" else "ms"
    return text, None


def _strip_sample(rest: str, text: str) -> tuple[str, int | None]:
    head, separator, tail = rest.rpartition("#")
    if not separator:
        return rest, None
    if not tail.isdecimal() or int(tail) == 0:
        raise DataError(f"data set {text!r}: after # comes how many rows to take, not {tail!r}")
    return head, int(tail)


def _strip_splits(rest: str, text: str) -> tuple[str, tuple[str, ...]]:
    found = re.fullmatch(r"(.*)\[([^\[\]]*)\]", rest)
    if found is None:
        return rest, ()
    splits = tuple(name.strip() for name in re.split(r"[/+,]", found[2]))
    if not all(splits):
        raise DataError(
            f"data set {text!r}: in the brackets go names of splits, as in [train_sft] or [train/test]"
        )
    if any(":" in name for name in splits):
        raise DataError(f"data set {text!r}: a part of a split cannot be named; write #N for N of its rows")
    return found[1], splits


def _can_be_hub_id(location: str) -> bool:
    return _HUB_ID.fullmatch(location) is not None and not is_data(Path(location))
