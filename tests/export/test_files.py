from __future__ import annotations

from pathlib import Path

import pytest

from raytune_rl.export.files import files_to_push
from raytune_rl.export.guard import Guard

GUARD = Guard("a-secret-token")


def card(base: str) -> str:
    return f"---\n{base}library_name: peft\n---\n# Model\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (card("base_model: Qwen/Qwen2.5-7B\n"), True),
        (card("base_model:\n- Qwen/Qwen2.5-7B\n"), True),
        (card(""), True),
        ("# Model\n", True),
        (card("base_model: [unclosed\n"), True),
        (card("base_model: /home/me/models/qwen\n"), False),
        (card("base_model: ../qwen\n"), False),
        (card("base_model:\n- Qwen/Qwen2.5-7B\n- models/own/qwen\n"), False),
    ],
)
def test_a_card_that_names_a_local_folder_stays_here(checkpoint: Path, text: str, kept: bool) -> None:
    (checkpoint / "README.md").write_text(text)
    lines: list[str] = []
    assert ("README.md" in files_to_push(checkpoint, GUARD, lines.append)) == kept
    assert any(line.startswith("README.md is not uploaded") for line in lines) != kept


def test_what_ms_swift_leaves_in_a_checkpoint(checkpoint: Path) -> None:
    before = files_to_push(checkpoint, GUARD, [].append)
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "latest",
        "zero_to_fp32.py",
        "global_step7/zero_pp_rank_0.pt",
        "runs/events.out",
        "export.json",
        ".git/config",
    ):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("a-secret-token")
    (checkpoint / "args.json").write_text("{}")
    (checkpoint / "chat").mkdir()
    (checkpoint / "chat" / "latest").write_text("")
    lines: list[str] = []
    after = files_to_push(checkpoint, GUARD, lines.append)
    assert sorted(after) == sorted([*before, "args.json", "chat/latest"])
    assert "training_args.bin" in lines[0]
