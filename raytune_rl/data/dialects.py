"""The ways in which people write down a conversation, brought to `Message`.

Known: `{role, content}` (with the content lists and tool calls of OpenAI, also the older ones, and of
Anthropic), ShareGPT `{from, value}`, and pairs `{human, assistant}`. A conversation may also be the text of
any of these, as CSV files hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raytune_rl.data.content_parts import flatten, without_tool_parts
from raytune_rl.data.conversation import Conversation, FormatError, parse_text, present
from raytune_rl.data.example import Message
from raytune_rl.data.tool_calls import calls_of, tool_call

__all__ = ["ROLES", "Conversation", "FormatError", "as_turns", "is_turns", "parse_conversation", "parse_text"]

ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
    "observations": "tool",
    "tool_call": "tool_call",
    "function_call": "tool_call",
}
_USER_KEYS = {"human", "user"}
_ASSISTANT_KEYS = {"assistant", "gpt", "bot"}

#: Keys by which a turn says whether it is trained on: ms-swift's two, OpenAI's, Axolotl's two. The last three
#: can only take a turn out: 1 and true are what a turn without them is.
_LOSS_KEYS = ("loss", "loss_scale", "weight", "train", "training")


def as_turns(value: Any) -> Any:
    """One turn as a list of it; and turns that `datasets` has turned about (its `Sequence` of objects is an
    object of lists) as a list. All else as it is."""
    if not isinstance(value, dict):
        return value
    columns = present(value)
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        return [value]
    if len({len(column) for column in columns.values()}) > 1:
        return [value]
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]


def is_turns(value: Any) -> bool:
    """Is it a list of turns, or one turn, rather than a list of anything else?"""
    turns = as_turns(value)
    if not isinstance(turns, list | tuple) or not turns:
        return False
    keys = [turn.keys() if isinstance(turn, dict) else () for turn in turns]
    return all("role" in one or "from" in one or {*one} & _USER_KEYS for one in keys)


def parse_conversation(value: Any, column: str) -> Conversation:
    """Reads the column that holds the conversation.

    Raises:
        FormatError: It is no list of turns, or a turn is in no known dialect.
    """
    turns = as_turns(parse_text(value, column) if isinstance(value, str) else value)
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise FormatError(f"{column!r} must be a list of turns that is not empty")
    conversation = Conversation()
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise FormatError(f"{column!r}[{number}] is no object with a role and a content")
        try:
            _add_turn(conversation, present(turn))
        except FormatError as error:
            raise FormatError(f"{column!r}[{number}]: {error}") from error
    for number, message in enumerate(conversation.messages[1:], start=1):
        if message.role == "system":
            raise FormatError(f"{column!r}[{number}]: a system message must come first")
    return conversation


def _add_turn(conversation: Conversation, turn: dict[str, Any]) -> None:
    if "role" in turn:
        rest = {key: item for key, item in turn.items() if key not in ("role", "content")}
        _add_message(conversation, turn["role"], turn.get("content"), rest)
    elif "from" in turn:
        rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
        _add_message(conversation, turn["from"], turn.get("value"), rest)
    else:
        _add_pair(conversation, turn)


def _add_pair(conversation: Conversation, turn: dict[str, Any]) -> None:
    user = _USER_KEYS & turn.keys()
    assistant = _ASSISTANT_KEYS & turn.keys()
    if len(user) != 1 or len(assistant) > 1 or ROLES.keys() & (turn.keys() - user - assistant):
        raise FormatError(
            f"keys {sorted(turn)} are no known dialect; use role/content, from/value, or human/assistant"
        )
    conversation.unused |= {f"turns have {key!r}" for key in turn.keys() - user - assistant}
    _add_message(conversation, "user", turn[user.pop()], {})
    if assistant:
        _add_message(conversation, "assistant", turn[assistant.pop()], {})


def _add_message(conversation: Conversation, name: Any, content: Any, rest: dict[str, Any]) -> None:
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise FormatError(f"unknown role {name!r}; known are {', '.join(ROLES)}")
    if role == "tool_call":
        _add_call(conversation, content, _loss(rest))
        return
    loss = _loss(rest) if rest else None
    calls = calls_of(rest) if rest else ()
    if isinstance(content, list | tuple):
        said, used = without_tool_parts(content, conversation)
        if content and not said and not used:  # it held results of tools only
            return
        content, calls = said, (*calls, *used)
    if content is None and (calls or role == "system"):
        content = ""  # an empty system prompt is none
    text = flatten(content, conversation) if isinstance(content, list | tuple) else content
    if not isinstance(text, str):
        raise FormatError(
            f"the content of the {role} turn is {'missing' if text is None else repr(text)}, not text"
        )
    conversation.messages.append(Message(role, text, loss, calls, rest))


def _loss(rest: dict[str, Any]) -> bool | None:
    """Whether a turn says of itself that it is trained on; the keys it says so by are taken out of it."""
    says: dict[str, bool | None] = {}
    for key in _LOSS_KEYS:
        value = rest.pop(key, None)
        if value is None:
            continue
        as_number = key in ("loss_scale", "weight")
        if (value not in (0, 1)) if as_number else not isinstance(value, bool):
            of_what = " of a turn" if as_number else ""
            what = "0 or 1, and as 'loss' says if both are there" if as_number else "true or false"
            raise FormatError(f"{key!r}{of_what} is {value!r}; it is {what}")
        says[key] = bool(value) if key in _LOSS_KEYS[:2] or not value else None
    loss_values = {value for value in says.values() if value is not None}
    if len(loss_values) > 1:
        raise FormatError(f"{' and '.join(map(repr, says))} of a turn say different things")
    return loss_values.pop() if loss_values else None


def _add_call(conversation: Conversation, content: Any, loss: bool | None) -> None:
    """A `tool_call` turn; consecutive ones are calls of one and the same assistant turn."""
    call = tool_call(content)
    last = conversation.messages[-1] if conversation.messages else None
    if last is not None and last.role == "assistant" and last.tool_calls and not last.content:
        if last.loss != loss:
            raise FormatError("calls of one turn say different things of whether they are trained on")
        conversation.messages[-1] = replace(last, tool_calls=(*last.tool_calls, call))
    else:
        conversation.messages.append(Message("assistant", "", loss, (call,)))
