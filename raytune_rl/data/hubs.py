"""Data sets from the Hugging Face hub and from ModelScope. Nothing here is imported for a local path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from raytune_rl.data.example import Row
from raytune_rl.data.layout import is_train
from raytune_rl.data.picks import Announce, Pick
from raytune_rl.data.specs import DatasetSpec, Hub
from raytune_rl.data.tables import TableRows
from raytune_rl.errors import DataError

T = TypeVar("T")

_ATTEMPTS = 3
_BATCH_ROWS = 256
_NAMES: dict[Hub, str] = {"hf": "Hugging Face", "ms": "ModelScope"}


def read_hub(spec: DatasetSpec, pick: Pick, announce: Announce) -> Iterator[Row]:
    """The rows of a hub's data set, split after split. `line` is the row's number in its split, from 1.

    `datasets` reads both hubs: what ModelScope keeps is downloaded by ModelScope's own client first. Images
    and other media stay encoded, because rows are taken from the Arrow tables (see `data.tables`), past the
    decoding of `datasets`.

    Raises:
        DataError: The hub cannot be reached, or the data set, a subset or a split is not there, or which is
            meant is not clear.
    """
    for source, table in _tables(spec, pick, announce):
        rows = TableRows(table.features.arrow_schema, source)
        for batch in table.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            yield from rows.of(batch)


def hub_files(spec: DatasetSpec, pick: Pick) -> list[Path]:
    """The files on this machine that hold the rows of a hub's data set, downloaded if they were not there;
    empty if there are none.

    Raises:
        DataError: As `read_hub`.
    """
    tables = _tables(spec, pick, lambda _: None)
    return [Path(file["filename"]) for _, table in tables for file in table.cache_files]


def _tables(spec: DatasetSpec, pick: Pick, announce: Announce) -> Iterator[tuple[str, Any]]:
    """Each split with what to call it."""
    import datasets

    location = _located(spec)
    for subset in _subsets(spec, pick, location):
        if subset is not None and subset in _splits_of_the_only_subset(spec, location, subset):
            pick, subset = replace(pick, splits=(subset,), if_there=False), None
        for split in _splits(spec, pick, location, subset, announce):

            def load(name: str | None = subset, part: str = split) -> Any:
                return datasets.load_dataset(location, name, split=part)

            table = _asked(spec, subset, load)
            yield f"{spec.hub}::{spec.hub_id}" + (f":{subset}" if subset else "") + f"[{split}]", table


def _located(spec: DatasetSpec) -> str:
    """The name that `datasets` loads: the id on Hugging Face, or the folder of a ModelScope data set."""
    if spec.hub == "hf":
        return spec.hub_id

    def download() -> str:
        from modelscope.hub.snapshot_download import dataset_snapshot_download

        return str(dataset_snapshot_download(spec.hub_id))

    return _asked(spec, None, download)


def _subsets(spec: DatasetSpec, pick: Pick, location: str) -> list[str | None]:
    """The subsets by their names on the hub; None where there are none."""
    if pick.subset is not None and pick.subset not in ("all", "default"):
        return [pick.subset]
    import datasets

    names: list[str] = _asked(spec, None, lambda: list(datasets.get_dataset_config_names(location)))
    # A subset may really be called `all`.
    if pick.subset in names:
        return [pick.subset]
    if pick.subset == "all" or len(names) <= 1:
        return list(names) or [None]
    if "default" in names:
        return ["default"]
    raise DataError(
        f"data set {spec.text!r} has several subsets and none is the default: {', '.join(names)}. "
        f"Name one (`{spec.hub_id}:{names[0]}`), several with a slash between, or `:all`"
    )


def _splits_of_the_only_subset(spec: DatasetSpec, location: str, name: str) -> list[str]:
    """The splits, where a data set has no subset of this name, but one alone: then a split is meant."""
    import datasets

    names = _asked(spec, None, lambda: list(datasets.get_dataset_config_names(location)))
    if name in names or len(names) > 1:
        return []
    return _asked(spec, None, lambda: list(datasets.get_dataset_split_names(location)))


def _splits(
    spec: DatasetSpec, pick: Pick, location: str, subset: str | None, announce: Announce
) -> list[str]:
    """The splits to read: those that are named, else `train`, else the only one for training, else the only
    one."""
    if pick.splits == ("train",) and not pick.if_there:
        return ["train"]
    import datasets

    known = _asked(spec, subset, lambda: list(datasets.get_dataset_split_names(location, subset)))
    where = spec.hub_id + (f":{subset}" if subset else "")
    missing = [split for split in pick.splits if split not in known]
    if missing and not pick.if_there:
        raise DataError(
            f"data set {spec.text!r}: {where!r} has no split {missing[0]!r}; there are {', '.join(known)}"
        )
    if found := [split for split in pick.splits if split in known]:
        return found
    if "train" in known:
        return ["train"]
    training = [split for split in known if is_train(split)]
    one = training if training else known
    if len(one) == 1:
        announce(f"{spec.text}: it has no split `train`; {one[0]!r} is read")
        return one
    raise DataError(
        f"data set {spec.text!r} has no split 'train', but {', '.join(known)}. Say which: "
        f"`{where}[{one[0]}]`, or several with a slash between"
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
        with _its_own_infos_unread(spec):
            return attempts(ask)
    except Exception as error:  # the hubs' clients raise many kinds; the user's remedy is the same
        raise _cannot_load(spec, subset, error) from error


@contextmanager
def _its_own_infos_unread(spec: DatasetSpec) -> Iterator[None]:
    """ModelScope adds a `dataset_infos.json` to a data set whose features have no types: `datasets`, which
    still reads a file of that name that it wrote itself in earlier times, fails at it."""
    import datasets.config

    name = datasets.config.DATASETDICT_INFOS_FILENAME
    if spec.hub == "ms":
        datasets.config.DATASETDICT_INFOS_FILENAME = f"{name}.unread"
    try:
        yield
    finally:
        datasets.config.DATASETDICT_INFOS_FILENAME = name


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
