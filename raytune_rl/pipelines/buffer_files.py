"""Groups that were sampled ahead, as files of a checkpoint: one archive of arrays a group, and one JSON file.

Arrays are read without pickle. What a scheduler of several turns says of a conversation may not be JSON: such
a group is not saved, and is asked again when the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.experience import Experience
from raytune_rl.errors import CheckpointError
from raytune_rl.groups.trajectory_data import TrajectoryData, TrajectoryStore
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rewards import Failure, RewardTable
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.trajectory import EpisodeFacts, Trajectory

FOLDER = "ahead"
"""Folder of a checkpoint."""
_JSON = "groups.json"
_NOWHERE = RowPointer(None, 0)


@dataclass(frozen=True)
class SavedGroups:
    """What a checkpoint holds of groups sampled ahead.

    Attributes:
        state: As it was given.
        groups: By the name each was given.
    """

    state: Mapping[str, Any]
    groups: Mapping[str, Experience]


def write_groups(
    folder: Path,
    state: Mapping[str, Any],
    groups: Iterable[tuple[str, Experience]],
    store: TrajectoryStore,
) -> list[str]:
    """Writes groups, one after the other: no more than one is in this process at a time.

    Args:
        folder: Made here.
        state: JSON-able values to keep beside them.
        groups: By names that are fit for files.
        store: Where their content lies.

    Returns:
        Names of groups that cannot be written.
    """
    folder.mkdir()
    documents: dict[str, Any] = {}
    left_out = []
    for name, group in groups:
        data = store.read(group.batch)
        document = _document(group, data)
        try:
            json.dumps(document, allow_nan=False)
        except (TypeError, ValueError):
            left_out.append(name)
            continue
        documents[name] = document
        arrays = {"values": group.scored.values, "rewards": group.rewards, **_arrays(data.columns)}
        with (folder / f"{name}.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    content = {"state": dict(state), "groups": documents}
    (folder / _JSON).write_text(json.dumps(content), encoding="utf-8")
    return left_out


def read_groups(folder: Path, prompts: PromptSet, store: TrajectoryStore) -> SavedGroups:
    """Reads what `write_groups` wrote; contents go to the object store.

    Raises:
        CheckpointError: The files are damaged.
    """
    try:
        content = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        groups = {}
        for name, document in content["groups"].items():
            with np.load(folder / f"{name}.npz", allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            groups[name] = _experience(document, arrays, prompts, store)
        return SavedGroups(content["state"], groups)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is damaged ({type(error).__name__}: {error}): resume from an earlier checkpoint"
        ) from error


def _document(group: Experience, data: TrajectoryData) -> dict[str, Any]:
    """All of a group that is no array."""
    scored = group.scored
    return {
        "prompts": [t.prompt for t in group.batch],
        "groups": [t.group for t in group.batch],
        "episodes": [asdict(t.episode) for t in group.batch],
        "texts": data.texts,
        "dialogues": data.dialogues,
        "labels": scored.labels,
        "names": scored.names,
        "failures": [asdict(failure) for failure in scored.failures],
        "one_by_one": dict(scored.one_by_one),
    }


def _arrays(columns: Columns) -> dict[str, NDArray]:
    arrays: dict[str, NDArray] = {}
    for name, column in columns.items():
        assert isinstance(column, Ragged)
        arrays |= {f"{name}.values": column.values, f"{name}.offsets": column.offsets}
    return arrays


def _experience(
    document: Mapping[str, Any], arrays: Mapping[str, NDArray], prompts: PromptSet, store: TrajectoryStore
) -> Experience:
    names = [key.removesuffix(".values") for key in arrays if key.endswith(".values")]
    columns: Columns = {name: Ragged(arrays[f"{name}.values"], arrays[f"{name}.offsets"]) for name in names}
    data = TrajectoryData(columns, document["texts"], document["dialogues"])
    rows = zip(document["prompts"], document["groups"], document["episodes"], strict=True)
    trajectories = [
        Trajectory(prompt, group, _NOWHERE, _NOWHERE, EpisodeFacts(**episode))
        for prompt, group, episode in rows
    ]
    scored = RewardTable(
        tuple(document["labels"]),
        tuple(document["names"]),
        arrays["values"],
        tuple(Failure(**failure) for failure in document["failures"]),
        document["one_by_one"],
    )
    return Experience(store.write(data, trajectories, prompts), scored, arrays["rewards"])
