"""Groups that were sampled ahead, through files and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_rl.algorithms.experience import Experience
from raytune_rl.errors import CheckpointError
from raytune_rl.groups.trajectory_data import TrajectoryData, TrajectoryStore
from raytune_rl.pipelines.buffer_files import read_groups, write_groups
from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rewards import Failure, RewardTable
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.trajectory import EpisodeFacts, Trajectory
from tests.pipelines.fakes import prompt_set


class Memory(TrajectoryStore):
    """Contents by the number that refers to them."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.held: dict[Any, TrajectoryData] = {}

    def read(self, trajectories: Sequence[Trajectory]) -> TrajectoryData:
        return self.held[trajectories[0].data.ref]

    def write(
        self, data: TrajectoryData, trajectories: Sequence[Trajectory], prompts: PromptSet
    ) -> list[Trajectory]:
        ref = len(self.held)
        self.held[ref] = data
        return [
            replace(t, data=RowPointer(ref, i), text=RowPointer(ref, i)) for i, t in enumerate(trajectories)
        ]


def group(store: Memory, number: int, infos: Any = None) -> Experience:
    """Two completions of a prompt, one of which has no reward."""
    rng = np.random.default_rng(number)
    lengths = (3, 5)
    columns: dict[str, Any] = {
        "tokens": Ragged.from_rows([rng.integers(0, 99, n) for n in lengths], np.int32),
        "loss_mask": Ragged.from_rows([rng.random(n) > 0.5 for n in lengths], np.bool_),
        "logprobs": Ragged.from_rows([rng.random(n) for n in lengths], np.float32),
        "versions": Ragged.from_rows([rng.integers(0, 3, n) for n in lengths], np.int32),
    }
    dialogues = [] if infos is None else [{"messages": [], "rollout_infos": infos}] * 2
    data = TrajectoryData(columns, [f"text {number} ünï", "\n"], dialogues)
    batch = [
        Trajectory(
            number, number, RowPointer(None, 0), RowPointer(None, 0),
            EpisodeFacts(number, sample, sample, 2, n - 2, "stop", 3, turns=2, newest_version=4),
        )
        for sample, n in enumerate(lengths)
    ]  # fmt: skip
    scored = RewardTable(
        ("A", "B"), ("a", "b"), np.array([[1 / 3, np.nan], [np.nan, 2.0]]),
        (Failure(1, "a", "timeout", "slow"),), {"b": "why"},
    )  # fmt: skip
    return Experience(store.write(data, batch, prompt_set(3)), scored, np.array([1 / 3, np.nan]))


def same(a: Experience, b: Experience, store: Memory) -> None:
    assert [replace(t, data=t.text, text=t.text) for t in a.batch] == [
        replace(t, data=s.text, text=s.text) for t, s in zip(b.batch, a.batch, strict=True)
    ]
    np.testing.assert_array_equal(a.rewards, b.rewards)
    np.testing.assert_array_equal(a.scored.values, b.scored.values)
    assert replace(a.scored, values=b.scored.values) == b.scored
    one, other = store.read(a.batch), store.read(b.batch)
    assert (one.texts, one.dialogues) == (other.texts, other.dialogues)
    for name, column in one.columns.items():
        back = other.columns[name]
        assert isinstance(column, Ragged)
        assert isinstance(back, Ragged)
        assert column.values.dtype == back.values.dtype
        np.testing.assert_array_equal(column.values, back.values)
        np.testing.assert_array_equal(column.offsets, back.offsets)


def test_groups_come_back_to_the_last_bit(tmp_path: Path) -> None:
    store = Memory()
    groups = {"4": group(store, 4, infos={"n": [1, 2]}), "7": group(store, 7)}
    assert write_groups(tmp_path / "ahead", {"number": 8}, groups.items(), store) == []
    saved = read_groups(tmp_path / "ahead", prompt_set(9), store)
    assert saved.state == {"number": 8}
    assert saved.groups.keys() == groups.keys()
    for name, one in groups.items():
        same(one, saved.groups[name], store)


def test_what_is_no_json_is_left_to_be_asked_again(tmp_path: Path) -> None:
    store = Memory()
    groups = {"1": group(store, 1, infos={"x": object()}), "2": group(store, 2)}
    assert write_groups(tmp_path / "ahead", {}, groups.items(), store) == ["1"]
    assert read_groups(tmp_path / "ahead", prompt_set(9), store).groups.keys() == {"2"}


@pytest.mark.parametrize("name", ["1.npz", "groups.json"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    store = Memory()
    write_groups(tmp_path / "ahead", {}, [("1", group(store, 1))], store)
    (tmp_path / "ahead" / name).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"is damaged .* resume from an earlier checkpoint"):
        read_groups(tmp_path / "ahead", prompt_set(9), store)
