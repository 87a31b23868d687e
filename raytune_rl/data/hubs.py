"""Data sets from the Hugging Face hub and from ModelScope. Nothing here is imported for a local path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from raytune_rl.data.example import Row
from raytune_rl.data.specs import DatasetSpec, Hub
from raytune_rl.data.tables import TableRows
from raytune_rl.errors import DataError

T = TypeVar("T")

_ATTEMPTS = 3
_BATCH_ROWS = 256
_NAMES: dict[Hub, str] = {"hf": "Hugging Face", "ms": "ModelScope"}


def read_hub(spec: DatasetSpec) -> Iterator[Row]:
    """The training split of a hub's data set, subset after subset. `line` is the row's number in it, from 1.

    `datasets` reads both hubs: what ModelScope keeps is downloaded by ModelScope's own client first. Images
    and other media stay encoded, because rows are taken from the Arrow tables (see `data.tables`), past the
    decoding of `datasets`.

    Raises:
        DataError: The hub cannot be reached, or the data set, the subset or its training split is not there.
    """
    for source, table in _tables(spec):
        rows = TableRows(table.features.arrow_schema, source)
        for batch in table.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            yield from rows.of(batch)


def hub_files(spec: DatasetSpec) -> list[Path]:
    """The files on this machine that hold the rows of a hub's data set, downloaded if they were not there;
    empty if there are none.

    Raises:
        DataError: As `read_hub`.
    """
    return [Path(file["filename"]) for _, table in _tables(spec) for file in table.cache_files]


def _tables(spec: DatasetSpec) -> Iterator[tuple[str, Any]]:
    """What to call a subset, and its training split."""
    import datasets

    location = _located(spec)
    for subset in _subsets(spec, location):

        def load(name: str | None = subset) -> Any:
            return datasets.load_dataset(location, name, split="train")

        table = _asked(spec, subset, load)
        yield f"{spec.hub}::{spec.hub_id}" + (f":{subset}" if subset else "") + "[train]", table


def _located(spec: DatasetSpec) -> str:
    """What `datasets` is to load: the id on Hugging Face, or the folder of a ModelScope data set."""
    if spec.hub == "hf":
        return spec.hub_id

    def download() -> str:
        from modelscope.hub.snapshot_download import dataset_snapshot_download

        return str(dataset_snapshot_download(spec.hub_id))

    return _asked(spec, None, download)


def _subsets(spec: DatasetSpec, location: str) -> list[str | None]:
    if spec.subsets and spec.subsets != ("all",):
        return list(spec.subsets)
    import datasets

    names: list[str] = _asked(spec, None, lambda: list(datasets.get_dataset_config_names(location)))
    if spec.subsets or len(names) <= 1:
        return list(names) or [None]
    if "default" in names:
        return ["default"]
    raise DataError(
        f"data set {spec.text!r} has several subsets and none is the default: {', '.join(names)}. "
        f"Name one (`{spec.hub_id}:{names[0]}`), several with a slash between, or `:all`"
    )


def _asked(spec: DatasetSpec, subset: str | None, ask: Callable[[], T]) -> T:
    """Asks a hub, again where the failure may pass by itself; whatever it ends in becomes a `DataError`."""
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    attempts = Retrying(
        # ModelScope's client repeats by itself.
        stop=stop_after_attempt(1 if spec.hub == "ms" or _offline() else _ATTEMPTS),
        wait=wait_exponential(multiplier=1, max=8),
        retry=retry_if_exception(_may_pass),
        reraise=True,
    )
    try:
        return attempts(ask)
    except Exception as error:  # the hubs' clients raise many kinds; the user's remedy is the same
        raise _cannot_load(spec, subset, error) from error


def _may_pass(error: BaseException) -> bool:
    """Connection trouble, but not "there is no such data set", which is a `FileNotFoundError`."""
    import httpx

    return isinstance(error, OSError | httpx.TransportError) and not isinstance(error, FileNotFoundError)


def _offline() -> bool:
    import huggingface_hub.constants

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def _cannot_load(spec: DatasetSpec, subset: str | None, error: Exception) -> DataError:
    assert spec.hub is not None
    what = f"{spec.hub_id!r}" + (f", subset {subset!r}," if subset else "")
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    offline = "HF_HUB_OFFLINE is set, so the hub was not asked. " if spec.hub == "hf" and _offline() else ""
    other = "hf" if spec.hub == "ms" else "ms"
    return DataError(
        f"data set {spec.text!r}: {what} could not be loaded from {_NAMES[spec.hub]} ({reason}). {offline}"
        "There is no such local path either. Check the name and the network, download the data and give its "
        f"path, or try the other hub with `{other}::{spec.hub_id}`"
    )
