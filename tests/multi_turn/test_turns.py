"""Tokens between turns, against the chat template itself."""

from __future__ import annotations

import random

import pytest

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.example import Message
from raytune_rl.data.turns import follow_up, go_on
from raytune_rl.errors import DataError
from raytune_rl.tiny.tokenizer import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
CHAT = ChatTemplate.of(TOKENIZER)
END = TOKENIZER.eos_token_id


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("ended", [True, False])
def test_a_follow_up_is_what_the_template_writes(ended: bool) -> None:
    said = [*encode("I need a tool"), *([END] if ended else [])]
    found = follow_up(CHAT, said, [{"role": "tool", "content": "42"}, {"role": "user", "content": "and?"}])
    whole = CHAT.render(
        [
            Message("user", "6*7=?"),
            Message("assistant", "I need a tool"),
            Message("tool", "42"),
            Message("user", "and?"),
        ],
        generation_prompt=True,
    )
    prompt = CHAT.render([Message("user", "6*7=?")], generation_prompt=True)
    assert TOKENIZER.decode([*encode(prompt), *said[: found.kept], *found.added]) == whole


def test_a_template_that_rewrites_the_assistant_is_refused() -> None:
    shouting = make_tiny_tokenizer(
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    )
    with pytest.raises(DataError, match="as it was said"):
        follow_up(ChatTemplate.of(shouting), [1], [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("new", [{"role": "user"}, {"content": "x"}, {"role": "user", "content": [1]}])
def test_a_message_without_text_is_refused(new: dict) -> None:
    with pytest.raises(DataError, match="needs the texts"):
        follow_up(CHAT, [1], [new])


def test_going_on_takes_the_end_token_off_and_adds_the_rest() -> None:
    sampled = [*encode("the answer is 4"), END]
    found = go_on(TOKENIZER, sampled, [END], "the answer is 4", "the answer is 4. But wait,")
    assert found.kept == len(sampled) - 1
    assert TOKENIZER.decode(found.added) == ". But wait,"


def test_going_on_from_an_earlier_place_drops_what_was_said_after_it() -> None:
    sampled = [*encode("<think>two</think><answer>4</answer>"), END]
    said = TOKENIZER.decode(sampled, skip_special_tokens=True)
    found = go_on(TOKENIZER, sampled, [END], said, "<think>two But wait,")
    assert TOKENIZER.decode(sampled[: found.kept]) == "<think>two"
    assert TOKENIZER.decode(found.added) == " But wait,"


def test_going_on_says_exactly_the_content() -> None:
    draw = random.Random(0)
    letters = "ab 12<>/\n\u00e9\u4f60\u597d\U0001f600"
    for _ in range(500):
        text = "".join(draw.choice(letters) for _ in range(draw.randrange(30)))
        sampled = encode(text)
        said = TOKENIZER.decode(sampled, skip_special_tokens=True)
        content = said[: draw.randrange(30)] + draw.choice(["", " wait", "\u597d!"])
        found = go_on(TOKENIZER, sampled, [END], said, content)
        assert TOKENIZER.decode([*sampled[: found.kept], *found.added], skip_special_tokens=True) == content
