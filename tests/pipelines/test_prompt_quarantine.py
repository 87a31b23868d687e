"""Prompts that no engine survived, in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raytune_rl.pipelines import prompt_quarantine
from raytune_rl.pipelines.prompt_quarantine import PromptQuarantine
from raytune_rl.protocol.data import Account, PromptSet
from raytune_rl.tracking.files import read_jsonl

TEXTS = ["what is 1+1?", "my key is sk-abcdefghijklmnopqrstuvwxyz0123456789", "and?"]
PROMPTS = PromptSet(None, None, "texts", np.full(3, 5), Account((), {}, None, (), None, ()))


def test_each_is_written_once_over_all_parts_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_quarantine, "fetch", lambda pending: TEXTS)
    path = tmp_path / "quarantine-prompts.jsonl"
    first = PromptQuarantine(path, 1.0)
    assert not path.exists()
    for row in (0, 1, 0):
        first.add("train", PROMPTS, row, f"prompt {row} is given up")
    resumed = PromptQuarantine(path, 1.0)
    resumed.add("train", PROMPTS, 0, "once more")
    resumed.add("held out", PROMPTS, 0, "prompt 0 is given up")
    rows = read_jsonl(path)
    assert [(row["set"], row["prompt_id"]) for row in rows] == [
        ("train", "0"),
        ("train", "1"),
        ("held out", "0"),
    ]
    assert rows[0] == {
        "set": "train", "prompt_id": "0", "reason": "prompt 0 is given up", "prompt": TEXTS[0],
    }  # fmt: skip
    assert "sk-abcdef" not in rows[1]["prompt"]
