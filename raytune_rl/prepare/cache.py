"""Encoded rows on disk, under the name of all that they depend on: encoded once, found again by later runs.

An entry is a folder that is whole or absent:

    train/, held_out/              the columns (see `data.mapped`)
    train.facts/, held_out.facts/  one number a row: trained tokens, and what the data say of the row
    entry.json                     the accounts, and the media files as they were
    quarantine.jsonl               what was wrong with the rows left out (and quarantine-val.jsonl)
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.mapped import open_columns
from raytune_rl.data.media_table import media_paths
from raytune_rl.errors import DataError
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.data import Account, MediaCounts, SourceCounts
from raytune_rl.protocol.model import Traits
from raytune_rl.tracking.files import plain


class RowFacts(NamedTuple):
    """The facts of a set of encoded rows, without their tokens.

    Attributes:
        lengths: Tokens of each row, int64 `[n]`.
        loss_lengths: Of those, the ones trained on, int64 `[n]`.
        account: What became of the rows.
        values: By name, one number of each row from the data, float64 `[n]`, such as "label".
    """

    lengths: NDArray[np.int64]
    loss_lengths: NDArray[np.int64]
    account: Account
    values: dict[str, NDArray[np.float64]]


SETS = ("train", "held_out")
_ENTRY, _TRAINED = "entry.json", "loss_lengths"
_NAME = re.compile(r"[0-9a-f]{32}")

UNUSED_DAYS = 30
"""Entries that no run has begun with for so long are removed by the next run that looks into the cache. A run
maps its rows from its entry while it trains, and marks it only as it starts: hence so many days."""


@dataclass(frozen=True)
class EncodedSet:
    """Rows to train on, or held out: their columns and facts."""

    columns: Columns
    facts: RowFacts


def write_facts(folder: Path, name: str, trained: NDArray[np.int64], values: dict[str, NDArray[Any]]) -> None:
    """Puts the numbers of a set into an entry that is being made."""
    place = folder / f"{name}.facts"
    place.mkdir()
    for column, numbers in {_TRAINED: trained, **values}.items():
        np.save(place / f"{quote(column, safe='')}.npy", numbers, allow_pickle=False)


def write_entry(folder: Path, accounts: dict[str, Account], quarantines: dict[str, Path]) -> None:
    """Completes an entry whose columns and facts are there; `quarantines` by the name of the set."""
    files = {path for name in accounts for path in media_paths(open_columns(str(folder / name)))}
    for path in quarantines.values():
        if path.exists():
            shutil.copyfile(path, folder / path.name)
    document = {
        "accounts": {name: asdict(account) for name, account in accounts.items()},
        "media": {path: _state(path) for path in sorted(files)},
    }
    (folder / _ENTRY).write_text(json.dumps(plain(document)), encoding="utf-8")


def read_entry(folder: Path, quarantines: dict[str, Path]) -> list[EncodedSet] | None:
    """The sets of an entry, with its bad rows written to `quarantines`; None if it is not there, is damaged,
    or shows media that have changed."""
    _mark(folder)  # first: no other run shall remove it from under this one
    try:
        document = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
        if any(_state(path) != state for path, state in document["media"].items()):
            return None
        sets = [
            _read_set(folder, name, document["accounts"][name])
            for name in SETS
            if name in document["accounts"]
        ]
    except (OSError, ValueError, KeyError, TypeError, EOFError, DataError):
        return None
    for place in quarantines.values():
        if (folder / place.name).exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / place.name, place)
    return [
        EncodedSet(s.columns, s.facts._replace(account=_here(s.facts.account, quarantines[name])))
        for name, s in zip(SETS, sets, strict=False)
    ]


def prune(cache: Path, keep: Path) -> str | None:
    """Marks an entry as used now, and removes those that have not been for `UNUSED_DAYS`.

    An entry is renamed before it is emptied, so that no other run finds a part of it; what a process that was
    killed leaves under that name is cleared by `data.mapped.written_whole`. What is no entry stays.

    Returns:
        A sentence for the user if some were removed.
    """
    _mark(keep)
    removed = 0
    for entry in [path for path in cache.glob("*") if _NAME.fullmatch(path.name) and path != keep]:
        with suppress(OSError):
            if time.time() - (entry / _ENTRY).stat().st_mtime < UNUSED_DAYS * 24 * 3600:
                continue
            aside = entry.with_name(f"{entry.name}.tmp-{secrets.token_hex(6)}")
            entry.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            removed += 1
    return (
        f"{removed} sets of encoded rows, unused for {UNUSED_DAYS} days, removed from {cache}"
        if removed
        else None
    )


def _mark(entry: Path) -> None:
    """Notes that an entry is used now."""
    with suppress(OSError):  # it is not there, or is somebody else's
        os.utime(entry / _ENTRY)


def _read_set(folder: Path, name: str, account: dict[str, Any]) -> EncodedSet:
    columns = open_columns(str(folder / name))
    tokens = columns["tokens"]
    assert isinstance(tokens, Ragged)
    facts = folder / f"{name}.facts"
    values = {unquote(path.stem): np.load(path, allow_pickle=False) for path in facts.glob("*.npy")}
    trained = values.pop(_TRAINED)
    return EncodedSet(columns, RowFacts(tokens.lengths, trained, _account(account), values))


def _account(document: dict[str, Any]) -> Account:
    tuples = ("notices", "stop_token_ids", "placeholder_ids", "columns")
    return Account(
        **{
            **document,
            **{name: tuple(document[name]) for name in tuples},
            "sources": tuple(SourceCounts(**source) for source in document["sources"]),
            "media": MediaCounts(**document["media"]),
            "traits": Traits(**document.get("traits", {})),
        }
    )


def _here(account: Account, quarantine: Path) -> Account:
    """The account with the bad rows where this run has them."""
    return account if account.quarantine is None else replace(account, quarantine=str(quarantine))


def _state(path: str) -> list[int] | None:
    """Size and time of a file, which change when it is written again; None if it is gone."""
    try:
        status = os.stat(path)  # noqa: PTH116 (thousands of them)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
