"""The ways in which people write down a conversation, brought to `Message`.

Known: `{role, content}` (with the content lists and tool calls of OpenAI and of Anthropic), ShareGPT
`{from, value}`, and pairs `{human, assistant}`. A conversation may also be the text of any of these, as CSV
files hold it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_rl.data.example import MediaRef, Message
from raytune_rl.data.media_tags import TAGS, media_ref, video_ref

ROLES: dict[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
    "observations": "tool",
    "tool_call": "tool_call",
    "function_call": "tool_call",
}
_USER_KEYS = {"human", "user"}
_ASSISTANT_KEYS = {"assistant", "gpt", "bot"}


class FormatError(ValueError):
    """A row does not fit its format; the message says what is wrong, the caller adds where."""


@dataclass
class Conversation:
    """A parsed conversation, and the media its content lists carried, by kind."""

    messages: list[Message] = field(default_factory=list)
    media: dict[str, list[MediaRef]] = field(default_factory=lambda: {kind: [] for kind in TAGS})


def parse_conversation(value: Any, column: str) -> Conversation:
    """Reads the column that holds the conversation.

    Raises:
        FormatError: It is no list of turns, or a turn is in no known dialect.
    """
    turns = parse_text(value, column) if isinstance(value, str) else value
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise FormatError(f"{column!r} must be a list of turns that is not empty")
    conversation = Conversation()
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise FormatError(f"{column!r}[{number}] is no object with a role and a content")
        # Parquet and Arrow give every turn every key of the column.
        present = {key: item for key, item in turn.items() if item is not None}
        try:
            _add_turn(conversation, present)
        except FormatError as error:
            raise FormatError(f"{column!r}[{number}]: {error}") from error
    for number, message in enumerate(conversation.messages[1:], start=1):
        if message.role == "system":
            raise FormatError(f"{column!r}[{number}]: a system message must come first")
    return conversation


def parse_text(value: str, column: str) -> Any:
    """A list or object written as text, in JSON or as Python literals.

    Raises:
        FormatError: It is neither.
    """
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise FormatError(f"{column!r} is text that is neither JSON nor a Python literal") from error


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
    if len(user) != 1 or len(assistant) > 1 or turn.keys() - user - assistant:
        raise FormatError(
            f"keys {sorted(turn)} are no known dialect; use role/content, from/value, or human/assistant"
        )
    _add_message(conversation, "user", turn[user.pop()], {})
    if assistant:
        _add_message(conversation, "assistant", turn[assistant.pop()], {})


def _add_message(conversation: Conversation, name: Any, content: Any, rest: dict[str, Any]) -> None:
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise FormatError(f"unknown role {name!r}; known are {', '.join(ROLES)}")
    if role == "tool_call":
        _add_call(conversation, content)
        return
    loss = _loss(rest)
    asked = rest.pop("tool_calls", None) or ()
    if not isinstance(asked, list | tuple):
        raise FormatError(f"'tool_calls' is {asked!r:.80}; it is a list of calls")
    calls = tuple(_openai_call(call) for call in asked)
    if isinstance(content, list | tuple):
        said, used = _without_tool_parts(content, conversation)
        if content and not said and not used:  # it held results of tools only
            return
        content, calls = said, (*calls, *used)
    if content is None and calls:
        content = ""
    text = _flatten(content, conversation) if isinstance(content, list | tuple) else content
    if not isinstance(text, str):
        raise FormatError(
            f"the content of the {role} turn is {'missing' if text is None else repr(text)}, not text"
        )
    conversation.messages.append(Message(role, text, loss, calls, rest))


def _loss(rest: dict[str, Any]) -> bool | None:
    """Whether a turn says of itself that it is trained on, by `loss` or by a `loss_scale` of 1 or 0."""
    loss, scale = rest.pop("loss", None), rest.pop("loss_scale", None)
    if loss is not None and not isinstance(loss, bool):
        raise FormatError(f"'loss' is {loss!r}; it is true or false")
    if scale is None:
        return loss
    if scale not in (0, 1) or (loss is not None and loss != bool(scale)):
        raise FormatError(
            f"'loss_scale' of a turn is {scale!r}; it is 0 or 1, and as 'loss' says if both are there"
        )
    return bool(scale)


def _without_tool_parts(
    parts: Sequence[Any], conversation: Conversation
) -> tuple[list[Any], tuple[dict[str, Any], ...]]:
    """Of Anthropic's content lists the parts that are said, and the calls made (`tool_use`). Results of tools
    (`tool_result`) become turns of their own, before it."""
    said: list[Any] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_use":
            calls.append(
                _openai_call({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")})
            )
        elif kind == "tool_result":
            result = part.get("content")
            text = _flatten(result, conversation) if isinstance(result, list | tuple) else result or ""
            if not isinstance(text, str):
                raise FormatError("a tool_result needs a text as its content")
            identity = {"tool_call_id": part["tool_use_id"]} if part.get("tool_use_id") else {}
            conversation.messages.append(Message("tool", text, other=identity))
        else:
            said.append(part)
    return said, tuple(calls)


def _add_call(conversation: Conversation, content: Any) -> None:
    """A `tool_call` turn; consecutive ones are calls of one and the same assistant turn."""
    call = _openai_call(parse_text(content, "tool_call") if isinstance(content, str) else content)
    last = conversation.messages[-1] if conversation.messages else None
    if last is not None and last.role == "assistant" and last.tool_calls and not last.content:
        conversation.messages[-1] = Message("assistant", "", last.loss, (*last.tool_calls, call), last.other)
    else:
        conversation.messages.append(Message("assistant", "", tool_calls=(call,)))


def _openai_call(call: Any) -> dict[str, Any]:
    if isinstance(call, dict):
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            arguments = function.get("arguments", function.get("parameters", {}))
            if isinstance(arguments, str):
                # Chat templates write the arguments with `tojson`: as text they would come out quoted twice.
                arguments = parse_text(arguments, "arguments")
            identity = {"id": call["id"]} if call.get("id") is not None else {}
            return {
                **identity,
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
    raise FormatError("a tool call needs a name and arguments")


def _flatten(parts: Sequence[Any], conversation: Conversation) -> str:
    """An OpenAI content list as text with tags; its media are collected in their order."""
    pieces: list[str] = []
    for part in parts:
        if isinstance(part, str):
            pieces.append(part)
            continue
        present = (
            {key: item for key, item in part.items() if item is not None} if isinstance(part, dict) else {}
        )
        kind = str(present.get("type", ""))
        medium = kind.removeprefix("input_").removesuffix("_url")
        if kind in ("text", "input_text") and isinstance(present.get("text"), str):
            pieces.append(present["text"])
        elif f"{medium}s" in TAGS:
            value = next(
                (present[key] for key in (kind, medium, "url", "path", "source") if key in present), None
            )
            if isinstance(value, dict) and value.get("type") == "base64":  # Anthropic's
                value = f"data:{value.get('media_type')};base64,{value.get('data')}"
            conversation.media[f"{medium}s"].append(_checked_ref(value, medium))
            pieces.append(TAGS[f"{medium}s"])
        else:
            raise FormatError(
                f"a content part of type {kind!r} is not known; known are text, image, video, audio"
            )
    return "".join(pieces)


def _checked_ref(value: Any, medium: str) -> MediaRef:
    try:
        return video_ref(value) if medium == "video" else media_ref(value)
    except ValueError as error:
        raise FormatError(f"{medium}: {error}") from error
