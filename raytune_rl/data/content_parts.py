"""Content lists, in which text, media and what tools were asked and said stand one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytune_rl.data.conversation import Conversation, FormatError, Hole, present
from raytune_rl.data.example import MediaRef, Message
from raytune_rl.data.media_tags import TAGS, media_ref, video_ref
from raytune_rl.data.tool_calls import tool_call

_VALUES = ("url", "path", "source")
_KNOWN = {"type", "text", "index", "cache_control", *_VALUES}


def without_tool_parts(
    parts: Sequence[Any], conversation: Conversation
) -> tuple[list[Any], tuple[dict[str, Any], ...]]:
    """Of Anthropic's content lists the parts that are said, and the calls made (`tool_use`). Results of tools
    (`tool_result`) become turns of their own, before it."""
    rest: list[Any] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type == "tool_use":
            calls.append(
                tool_call({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")})
            )
        elif part_type == "tool_result":
            result = part.get("content")
            text = flatten(result, conversation) if isinstance(result, list | tuple) else result or ""
            if not isinstance(text, str):
                raise FormatError("a tool_result needs a text as its content")
            identity = {"tool_call_id": part["tool_use_id"]} if part.get("tool_use_id") else {}
            conversation.messages.append(Message("tool", text, other=identity))
        else:
            rest.append(part)
    return rest, tuple(calls)


def flatten(parts: Sequence[Any], conversation: Conversation) -> str:
    """An OpenAI content list as text with tags; its media are collected in their order.

    Raises:
        FormatError: A part is of no known type.
    """
    pieces: list[str] = []
    for part in parts:
        if isinstance(part, str):
            pieces.append(part)
            continue
        given = present(part) if isinstance(part, dict) else {}
        part_type = str(given.get("type", ""))
        medium = part_type.removeprefix("input_").removesuffix("_url")
        keys = (part_type, medium, f"{medium}_url", *_VALUES)
        conversation.unused |= {
            f"parts of content lists have {key!r}" for key in given.keys() - _KNOWN - {*keys}
        }
        if part_type in ("text", "input_text", "output_text") and isinstance(given.get("text"), str):
            pieces.append(given["text"])
        elif f"{medium}s" in TAGS:
            value = next((given[key] for key in keys if key in given), None)
            conversation.media[f"{medium}s"].append(_medium(value, medium, given.get("index")))
            pieces.append(TAGS[f"{medium}s"])
        else:
            raise FormatError(
                f"a content part of type {part_type!r} is not known; known are text, image, video, audio"
            )
    return "".join(pieces)


def _medium(value: Any, medium: str, index: Any) -> MediaRef | Hole:
    if value is None or value == "" or (isinstance(value, dict) and not present(value)):
        return Hole(index if isinstance(index, int) else None)
    if isinstance(value, dict) and value.get("type") == "base64":  # Anthropic's
        value = f"data:{value.get('media_type')};base64,{value.get('data')}"
    elif isinstance(value, dict) and isinstance(value.get("data"), str) and "format" in value:  # input_audio
        value = f"data:{medium}/{value['format']};base64,{value['data']}"
    try:
        return video_ref(value) if medium == "video" else media_ref(value)
    except ValueError as error:
        raise FormatError(f"{medium}: {error}") from error
