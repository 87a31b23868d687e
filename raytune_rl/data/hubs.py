"""Data sets from the Hugging Face hub and from ModelScope. Nothing here is imported for a local path."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from raytune_rl.data.example import Row
from raytune_rl.data.specs import DatasetSpec, Hub
from raytune_rl.errors import DataError

_ATTEMPTS = 3
_BATCH_ROWS = 256
_NAMES: dict[Hub, str] = {"hf": "Hugging Face", "ms": "ModelScope"}


def read_hub(spec: DatasetSpec) -> Iterator[Row]:
    """The rows of the training split of a hub's data set, subset after subset. `line` is the row's number,
    from 1.

    Images and other media stay encoded: rows are taken from the Arrow tables, past the decoding of
        `datasets`.

    Raises:
        DataError: The hub cannot be reached, or the data set, the subset or its training split is not there.
    """
    assert spec.hub is not None
    load = _load_hf if spec.hub == "hf" else _load_ms
    for subset in _subsets(spec):
        try:
            table = _retrying(lambda subset=subset: load(spec.hub_id, subset))
        except Exception as error:
            raise _cannot_load(spec, subset, error) from error
        source = f"{spec.hub}::{spec.hub_id}" + (f":{subset}" if subset else "") + "[train]"
        number = 0
        for batch in table.with_format("arrow").iter(batch_size=_BATCH_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, source, number)


def _subsets(spec: DatasetSpec) -> list[str | None]:
    if spec.hub == "ms" and not spec.subsets:
        return [None]
    if spec.subsets and spec.subsets != ("all",):
        return list(spec.subsets)
    names = _config_names(spec)
    if spec.subsets or len(names) <= 1:
        return list(names) or [None]
    if "default" in names:
        return ["default"]
    raise DataError(
        f"data set {spec.text!r} has several subsets and none is the default: {', '.join(names)}. "
        f"Name one (`{spec.hub_id}:{names[0]}`), several with a slash between, or `:all`"
    )


def _config_names(spec: DatasetSpec) -> list[str]:
    try:
        if spec.hub == "hf":
            from datasets import get_dataset_config_names

            return list(_retrying(lambda: get_dataset_config_names(spec.hub_id)))
        hub_dataset = importlib.import_module("modelscope.msdatasets").MsDataset
        return list(_retrying(lambda: hub_dataset.get_dataset_config_names(spec.hub_id)))
    except Exception as error:
        raise _cannot_load(spec, None, error) from error


def _load_hf(name: str, subset: str | None) -> Any:
    from datasets import load_dataset

    return load_dataset(name, subset, split="train")


def _load_ms(name: str, subset: str | None) -> Any:
    hub_dataset = importlib.import_module("modelscope.msdatasets").MsDataset
    loaded = hub_dataset.load(name, subset_name=subset or "default", split="train")
    return loaded.to_hf_dataset() if hasattr(loaded, "to_hf_dataset") else loaded


def _retrying(load: Any) -> Any:
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    # Only what may pass by itself: a name that is not there will not appear by asking again.
    transient = (ConnectionError, TimeoutError)
    retrying = Retrying(
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_exponential(multiplier=1, max=8),
        retry=retry_if_exception_type(transient) if not _offline() else retry_if_exception_type(()),
        reraise=True,
    )
    return retrying(load)


def _offline() -> bool:
    import huggingface_hub.constants

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def _cannot_load(spec: DatasetSpec, subset: str | None, error: Exception) -> DataError:
    assert spec.hub is not None
    what = f"{spec.hub_id!r}" + (f", subset {subset!r}," if subset else "")
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    offline = " HF_HUB_OFFLINE is set, so the hub was not asked." if spec.hub == "hf" and _offline() else ""
    other = "hf" if spec.hub == "ms" else "ms"
    return DataError(
        f"data set {spec.text!r}: {what} could not be loaded from {_NAMES[spec.hub]} ({first_line})."
        f"{offline} "
        "There is no such local path either. Check the name and the network, download the data and give its "
        f"path, or try the other hub with `{other}::{spec.hub_id}`"
    )
