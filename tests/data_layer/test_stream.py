"""Windows over data sets: found again by number, endless, and with every bad row accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import SFTConfig
from raytune_rl.data.example import RowError
from raytune_rl.data.stream import RowWindows
from raytune_rl.errors import ConfigError, DataError


def chats(path: Path, numbers: range, bad: tuple[int, ...] = ()) -> str:
    rows = []
    for number in numbers:
        said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": str(number)}]
        rows.append('{"messages": [' if number in bad else json.dumps({"messages": said}))
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def answers(windows: RowWindows, number: int) -> list[int]:
    return [int(example.messages[-1].content) for example in windows.window(number).examples]


def test_windows_run_over_the_files_and_begin_anew(tmp_path: Path) -> None:
    specs = [chats(tmp_path / "a.jsonl", range(5)), chats(tmp_path / "b.jsonl", range(5, 8))]
    windows = RowWindows(specs, task="sft", size=3)
    found = [answers(windows, number) for number in range(4)]
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]]
    again = RowWindows(specs, task="sft", size=3)
    assert answers(again, 2) == [6, 7, 0], "a window is found without the ones before it"
    with pytest.raises(ValueError, match="after window 2"):
        again.window(1)


def test_bad_rows_are_counted_and_do_not_move_the_windows(tmp_path: Path) -> None:
    spec = chats(tmp_path / "a.jsonl", range(6), bad=(1,))
    bad_rows = tmp_path / "quarantine.jsonl"
    windows = RowWindows([spec], task="sft", size=3, strict=False, quarantine_path=bad_rows)
    first = windows.window(0)
    assert [e.messages[-1].content for e in first.examples] == ["0", "2"]
    (source,) = first.report.sources
    assert (source.rows, source.good, source.bad) == (3, 2, 1)
    assert json.loads(bad_rows.read_text())["line"] == 2
    assert answers(windows, 1) == [3, 4, 5]
    assert windows.window(2).report.bad == 1, "the second pass comes by the bad row again"
    RowWindows([spec], task="sft", size=3, strict=False, quarantine_path=bad_rows).window(0)
    assert len(bad_rows.read_text().splitlines()) == 1, "and a row is set aside once"
    with pytest.raises(RowError, match=r"a\.jsonl:2"):
        RowWindows([spec], task="sft", size=3).window(0)
    hopeless = chats(tmp_path / "b.jsonl", range(3), bad=(0, 1, 2))
    with pytest.raises(DataError, match="none of 3 rows"):
        RowWindows([hopeless], task="sft", size=3, strict=False).window(0)
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        RowWindows([str(tmp_path / "c.jsonl")], task="sft", size=3).window(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--streaming true needs --max_steps"),
        (
            {"max_steps": 5, "save_strategy": "epoch"},
            "--save_strategy epoch needs to know .*: give --save_steps",
        ),
        (
            {"max_steps": 5, "eval_strategy": "epoch"},
            "--eval_strategy epoch needs to know .*: give --eval_steps",
        ),
        ({"max_steps": 3, "split_dataset_ratio": 0.1}, "--split_dataset_ratio cannot set aside"),
        ({"max_steps": 3, "dataset": "a.jsonl#100"}, "--dataset a.jsonl#100: rows cannot be drawn"),
    ],
)
def test_what_a_stream_cannot_do_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SFTConfig(**{"model": "m", "dataset": "a.jsonl", "streaming": True, **settings})
