"""The conversation loop: what the model is shown, and what the user sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raytune_rl.data.example import Message
from raytune_rl.errors import DataError
from raytune_rl.infer.chat import converse
from raytune_rl.protocol.rollout import StreamChunk


class Parrot:
    """Answers with the number of messages it was shown, in two pieces."""

    def __init__(self) -> None:
        self.shown: list[list[tuple[str, str]]] = []

    def __call__(self, messages: Sequence[Message], turn: int) -> Iterator[StreamChunk]:
        self.shown.append([(m.role, m.content) for m in messages])
        if "too long" in messages[-1].content:
            raise DataError("it does not fit")
        yield StreamChunk(f"turn {turn}, ")
        yield StreamChunk(f"{len(messages)} messages", "length" if turn else "stop")


def talk(lines: list[str], **options: object) -> tuple[Parrot, str, int]:
    parrot, written, left = Parrot(), [], iter(lines)
    turns = converse(parrot, lambda: next(left, None), written.append, **options)  # type: ignore[arg-type]
    return parrot, "|".join(written), turns


def test_the_model_sees_the_whole_conversation() -> None:
    parrot, written, turns = talk(["Hello\n", "\n", "Again\n", "quit\n", "never\n"], system="Be brief.")
    assert parrot.shown == [
        [("system", "Be brief."), ("user", "Hello")],
        [
            ("system", "Be brief."),
            ("user", "Hello"),
            ("assistant", "turn 0, 2 messages"),
            ("user", "Again"),
        ],
    ]
    assert turns == 2
    assert written == "turn 0, |2 messages|\n|turn 1, |4 messages|\n(cut off at --max_new_tokens)\n"


def test_clear_begins_anew_and_the_end_of_input_leaves() -> None:
    parrot, _, turns = talk(["a\n", "clear\n", "b\n"])
    assert [len(shown) for shown in parrot.shown] == [1, 1]
    assert turns == 2


def test_a_turn_that_fails_is_told_and_forgotten() -> None:
    parrot, written, turns = talk(["much too long\n", "short\n"])
    assert parrot.shown[1] == [("user", "short")]
    assert written.startswith("it does not fit\n")
    assert turns == 1


def test_without_streaming_an_answer_comes_whole() -> None:
    assert talk(["a\n"], stream=False)[1] == "turn 0, 1 messages\n"
