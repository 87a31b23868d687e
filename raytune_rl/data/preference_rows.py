"""Preference in rows: a rejected answer beside the chosen one, or a label.

A pair is a conversation that ends with the chosen answer, in any format of `row_formats`, and one of

    rejected_response, rejected   the rejected answer: text, one turn, or turns without a user's
    rejected_messages, rejected   the whole conversation with it; its prompt must be the chosen one's

The chosen answer may also stand in `chosen`, in the same ways, as TRL, LLaMA-Factory and HH-RLHF (whose
conversations are transcripts) have it. OpenAI's names are known too: `preferred_output`,
`non_preferred_output` and an object `input` with messages and tools. A labelled row is a conversation and
`label`, or LLaMA-Factory's `kto_tag`. Everything after the last user turn is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytune_rl.data.columns import columns_of
from raytune_rl.data.conversation import Conversation, FormatError, parse_text
from raytune_rl.data.dialects import as_turns, is_turns, parse_conversation
from raytune_rl.data.example import Message
from raytune_rl.data.transcripts import is_transcript, parse_transcript

CHOSEN = ("chosen", "chosen_response", "preferred_output")
REJECTED = ("rejected_response", "rejected_messages", "rejected", "non_preferred_output")
OTHER_MEDIA = ("rejected_images", "rejected_videos", "rejected_audios")
LABELS = ("label", "kto_tag")


def with_chosen(fields: dict[str, Any], explicit: dict[str, str]) -> tuple[dict[str, Any], str | None]:
    """A row with its `chosen` column where the formats look for it.

    Args:
        fields: The row's columns.
        explicit: Part to the column that `--columns` gives it.

    Returns:
        The columns, with the chosen conversation as `messages` if `chosen` holds it; and the name of the
        column that is the answer if it holds that alone.

    Raises:
        FormatError: `chosen` is neither text nor turns, or an answer without a prompt.
    """
    asked = fields.get("input")
    if isinstance(asked, dict) and is_turns(asked.get("messages")):
        opened = {name: asked[name] for name in ("messages", "tools") if name in asked}
        fields = {**opened, **{name: value for name, value in fields.items() if name != "input"}}
    column = _named(CHOSEN, fields)
    if column is None or "response" in explicit:
        return fields, None
    answer = fields[column]
    rest = {name: value for name, value in fields.items() if name != column}
    if is_transcript(answer):
        return {**_without_prompt(rest), "messages": _turns_of(answer)}, None
    if not isinstance(answer, str) and not is_turns(answer):
        raise FormatError(f"{column!r} is neither a text nor turns")
    whole = not isinstance(answer, str) and any(
        turn.role == "user" for turn in parse_conversation(answer, column).messages
    )
    before = explicit.get("messages") or next(
        (name for name in columns_of("messages", fields) if fields[name] is not None), None
    )
    if before is not None:
        turns = fields[before]
        turns = as_turns(parse_text(turns, before) if isinstance(turns, str) else turns)
        if parse_conversation(turns, before).messages[-1].role == "assistant":  # the chosen answer once more
            return fields, None
        return {**rest, before: answer if whole else [*turns, *_turns_of(answer)]}, None
    if whole:
        return {**_without_prompt(rest), "messages": answer}, None
    if "query" not in explicit and not any(fields[name] is not None for name in columns_of("query", fields)):
        raise FormatError(
            f"{column!r} is an answer, but there is no 'prompt' column"
            + (
                ". Cut what both answers begin with off into one, or write transcripts "
                r"(\n\nHuman: ... \n\nAssistant: ...)"
                if isinstance(answer, str)
                else ""
            )
        )
    return fields, column


def _without_prompt(fields: dict[str, Any]) -> dict[str, Any]:
    """The columns without the prompt that the chosen conversation repeats."""
    return {name: value for name, value in fields.items() if name != _named(("prompt",), fields)}


def _turns_of(answer: Any) -> list[Any]:
    if is_transcript(answer):
        return [{"role": turn.role, "content": turn.content} for turn in parse_transcript(answer).messages]
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return list(as_turns(answer))


def rejected_turns(
    fields: dict[str, Any], conversation: Conversation, messages: Sequence[Message]
) -> tuple[tuple[Message, ...], str]:
    """The conversation with the rejected answer, and the column that it came from.

    Args:
        fields: The row's columns.
        conversation: What the row's format made of it.
        messages: The same as it will be trained on, with its system prompt and tags in place.

    Raises:
        FormatError: There is no rejected answer, it is the chosen one, or it answers another prompt.
    """
    column = _named(REJECTED, fields)
    if column is None:
        raise FormatError(
            f"there is no rejected answer: none of the columns {', '.join(map(repr, fields))} is "
            f"{' or '.join(REJECTED)}"
        )
    if other := _named(OTHER_MEDIA, fields):
        raise FormatError(f"{other!r}: both answers must be about the same pictures")
    value = _turns_of(fields[column]) if is_transcript(fields[column]) else fields[column]
    if isinstance(value, str):
        answer: tuple[Message, ...] = (Message("assistant", value),)
    else:
        parsed = parse_conversation(value, column)
        answer = _answer(parsed.messages)
        if any(message.role == "user" for message in parsed.messages):
            _check_prompt(conversation.messages, parsed.messages, column)
        elif any(parsed.media.values()):
            raise FormatError(f"{column!r} holds media; only the prompt may")
    if not answer or answer[-1].role != "assistant" or not (answer[-1].content or answer[-1].tool_calls):
        raise FormatError(f"{column!r} does not end with an answer of the assistant")
    chosen = _answer(messages)
    if _said(answer) == _said(chosen):
        raise FormatError("the rejected answer is the same as the chosen one")
    return (*messages[: len(messages) - len(chosen)], *answer), column


def read_label(fields: dict[str, Any]) -> tuple[bool, str]:
    """Whether the row's answer is desirable, and the column that says so.

    Raises:
        FormatError: No column does, or its value is neither true nor false.
    """
    column = _named(LABELS, fields)
    if column is None:
        raise FormatError(
            f"there is no 'label' column among {', '.join(map(repr, fields))}: true for a desirable answer, "
            "false for an undesirable one"
        )
    value = fields[column]
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    label = known.get(str(value).strip().lower())
    if label is None:
        raise FormatError(f"{column!r} is {value!r}; it must be true or false")
    return label, column


def _named(names: Sequence[str], fields: dict[str, Any]) -> str | None:
    """The only column with one of these names and a value; None if there is none."""
    found = [name for name, value in fields.items() if name.lower() in names and value is not None]
    if len(found) > 1:
        raise FormatError(f"{' and '.join(map(repr, found))} say the same thing; keep one of them")
    return found[0] if found else None


def _answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The turns behind the last user turn."""
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    return tuple(messages[last + 1 :])


def _said(messages: Sequence[Message]) -> list[Any]:
    return [(message.role, message.content, message.tool_calls) for message in messages]


def _check_prompt(chosen: Sequence[Message], rejected: Sequence[Message], column: str) -> None:
    """Compared without system prompts, which a column of their own may give."""
    sides = []
    for messages in (chosen, rejected):
        prompt = messages[: len(messages) - len(_answer(messages))]
        sides.append(_said([message for message in prompt if message.role != "system"]))
    if sides[0] != sides[1]:
        raise FormatError(f"{column!r} has another prompt than the chosen answer: they cannot be compared")
