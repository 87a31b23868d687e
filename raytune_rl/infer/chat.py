"""A conversation at the terminal: lines in, pieces of answers out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from raytune_rl.data.example import Message
from raytune_rl.errors import RaytuneError
from raytune_rl.protocol.rollout import StreamChunk

Answer = Callable[[Sequence[Message], int], Iterator[StreamChunk]]
HELP = "Write to the model. clear begins anew; quit, exit or the end of input leaves."


def converse(
    answer: Answer,
    ask: Callable[[], str | None],
    write: Callable[[str], None],
    *,
    system: str | None = None,
    stream: bool = True,
) -> int:
    """Talks until the user leaves.

    Args:
        answer: `(conversation, number of the turn) -> pieces`.
        ask: The user's next line, or None at the end of input.
        write: Puts text out as it is.
        system: System prompt.
        stream: Write pieces as they come, instead of a whole answer.

    Returns:
        The number of answers.
    """
    start = [] if system is None else [Message("system", system)]
    messages, turns = list(start), 0
    while (line := ask()) is not None:
        text = line.strip()
        if text in ("quit", "exit"):
            break
        if text == "clear":
            messages = list(start)
            write("(a new conversation)\n")
        elif text:
            try:
                reply = _reply(answer([*messages, Message("user", text)], turns), write, stream)
            except RaytuneError as error:
                write(f"{error}\n")
                continue
            messages += [Message("user", text), Message("assistant", reply)]
            turns += 1
    return turns


def _reply(chunks: Iterator[StreamChunk], write: Callable[[str], None], stream: bool) -> str:
    text, reason = "", None
    for chunk in chunks:
        text += chunk.text
        reason = chunk.finish_reason or reason
        if stream:
            write(chunk.text)
    write(("" if stream else text) + ("\n(cut off at --max_new_tokens)\n" if reason == "length" else "\n"))
    return text
