"""What a teacher is asked instead of the prompt: read from a column, checked row by row."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.data.encode import encode_prompts
from raytune_rl.data.example import Example, Message, Row, RowError
from raytune_rl.data.formats import Converter
from raytune_rl.data.teacher_prompts import encode_teacher_prompts, has_views, teacher_view
from raytune_rl.errors import ConfigError
from raytune_rl.prepare.places import MediaPlaces
from raytune_rl.prepare.task import encode_prompts_task
from raytune_rl.tiny.model import make_tiny_model

HINT = "12+37=? The answer is 49."


def row(prompt: Any = HINT, **more: Any) -> Example:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "12+37=?"}]
    return Converter("grpo")(Row({"messages": turns, "teacher_prompt": prompt, **more}, "d.jsonl", 3))


def said(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


def test_a_text_stands_in_the_place_of_the_last_user_turn() -> None:
    assert said(teacher_view(row())) == [("system", "Be short."), ("user", HINT)]
    before = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "12+37=?"))
    several = Example(before, extra={"teacher_prompt": HINT})
    assert said(teacher_view(several)) == [("user", "Hi"), ("assistant", "Yes?"), ("user", HINT)]


def test_turns_stand_in_the_place_of_all() -> None:
    given = [{"role": "user", "content": "12+37=?"}, {"from": "gpt", "value": "50"}, {"user": "It is 49."}]
    assert said(teacher_view(row(given))) == [("user", "12+37=?"), ("assistant", "50"), ("user", "It is 49.")]


@pytest.mark.parametrize("given", [None, "", []])
def test_a_row_without_asks_the_teacher_the_same(given: Any) -> None:
    example = row(given)
    assert teacher_view(example) is example
    assert not has_views([example])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (7, "'teacher_prompt': is 7, which is neither a text nor a list of turns"),
        (["49"], "neither a text nor a list of turns"),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "49"}],
            "ends with the assistant",
        ),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "names media of its own"),
        ("<image> <image> two?", "1 images but 2 <image> tags"),
    ],
)
def test_what_cannot_be_asked_is_named_with_its_row(given: Any, reason: str) -> None:
    with pytest.raises(RowError, match=r"d\.jsonl:3: 'teacher_prompt'") as refused:
        teacher_view(row(given, images=["a.png"]))
    assert reason in str(refused.value)


def test_the_teacher_is_shown_the_same_media() -> None:
    assert said(teacher_view(row("49 is in it", images=["a.png"])))[-1] == ("user", "<image>49 is in it")
    assert said(teacher_view(row("Is <image> 49?", images=["a.png"])))[-1] == ("user", "Is <image> 49?")


def test_rows_are_left_out_together_and_said(chatml: Any) -> None:
    examples = [row(), row(7), row(None), row("far " * 40)]
    encode = partial(encode_prompts, tokenizer=chatml, max_length=60, truncation_strategy="delete")
    found = encode_teacher_prompts(examples, encode, strict=False)
    assert found.examples == [examples[0], examples[2]]
    texts = [chatml.decode(found.prompts[i]) for i in range(2)]
    assert [HINT in text for text in texts] == [True, False]
    assert [(drop.line, drop.unusable) for drop in found.dropped] == [(3, True), (3, False)]
    assert found.dropped[1].reason == "'teacher_prompt': longer than max_length 60"
    assert found.notices == (
        "teachers are asked the column 'teacher_prompt' instead of the prompt; 1 of 2 rows have none",
    )
    with pytest.raises(RowError, match="neither a text"):
        encode_teacher_prompts(examples, encode, strict=True)


def prepared(tmp_path: Path, **more: Any) -> tuple[Any, ...]:
    """What the data task gives of three rows, one without and one too long for its plain prompt."""
    model = make_tiny_model(tmp_path / "model", hidden=64, layers=1)
    rows = [{"query": "1+1=?", "teacher_prompt": "1+1=? 2."}, {"query": "long " * 60}, {"query": "2+2=?"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    given = {"reward_funcs": "accuracy", "max_length": 40, "truncation_strategy": "delete", **more}
    config = RLHFConfig(model=str(model), dataset=str(tmp_path / "d.jsonl"), beta=0.0, strict=False, **given)
    items = encode_prompts_task(config, str(tmp_path / "bad.jsonl"), MediaPlaces(".", False, False))
    return tuple(item for item in items if not isinstance(item, str))


def test_the_data_task_gives_both_prompts_of_each_row(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", hidden=64, layers=1)
    (lengths, account, values), columns, extra, _ = prepared(tmp_path, teacher_model=str(model))
    assert len(lengths) == len(columns["prompt"]) == len(columns["teacher_prompt"]) == 2
    asked = columns["teacher_prompt"].lengths
    assert values["teacher_prompt_tokens"].tolist() == asked.tolist()
    assert (asked - lengths > 0).tolist() == [True, False]
    assert extra["teacher_prompt"] == ["1+1=? 2.", None]
    assert "1 of 3 rows" not in " ".join(account.notices)
    assert "2 of 3 rows have none" in " ".join(account.notices)


def test_a_column_that_nobody_reads_is_said(tmp_path: Path) -> None:
    (_, account, values), columns, _, _ = prepared(tmp_path)
    assert "teacher_prompt" not in columns
    assert not values
    assert (
        "the column 'teacher_prompt' does nothing: there is no --teacher_model; --model can be one"
        in account.notices
    )


def test_answers_of_the_data_have_no_other_prompt(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", hidden=64, layers=1)
    with pytest.raises(ConfigError, match="use --lmbda 1, or leave the column out"):
        prepared(tmp_path, rlhf_type="gkd", teacher_model=str(model), lmbda=0.5)
