"""The row formats, and what each makes of a row's columns.

Which format a row is in is decided from its column names, in the order of `FORMATS`; the first that matches
wins:

    messages   a conversation under messages, conversation or conversations, in any dialect of `dialects`
    alpaca     instruction, input and output
    query      a query and a response column, under one of the names of `columns.SYNONYMS`; each is a text or
               a list of turns
    text       a text to be learned as it stands, without a chat template

For a prompt task (GRPO, PPO) the response is not read at all; it survives in `extra` under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raytune_rl.data.columns import SYNONYMS, ColumnError, single
from raytune_rl.data.conversation import Conversation, FormatError, parse_text
from raytune_rl.data.dialects import is_turns, parse_conversation
from raytune_rl.data.example import Message
from raytune_rl.data.transcripts import NOTICE, is_transcript, parse_transcript

PLAIN = "rows are plain text: learned whole and with an end, without the chat template and --system"


@dataclass(frozen=True)
class Parts:
    """The columns of a row and the part each plays, as far as `--columns` or the names tell.

    Attributes:
        fields: Column name to value.
        explicit: Part to the column that `--columns` gives it.
        prompt_only: The answer is not read.
        answer: The column that is the answer whatever else might be: `chosen` of a pair.
        may_be_plain: A text without a question may be learned as it stands.
    """

    fields: dict[str, Any]
    explicit: dict[str, str]
    prompt_only: bool
    answer: str | None = None
    may_be_plain: bool = False

    @cached_property
    def filled(self) -> tuple[str, ...]:
        """Columns with a value."""
        return tuple(name for name, value in self.fields.items() if value is not None)

    def column(self, part: str) -> str | None:
        """The column that plays a part; None when there is none. Columns without a value do not count. Of
        several that could be the query, the one that holds turns is."""
        if part == "response" and self.answer is not None and part not in self.explicit:
            return self.answer
        names = self.filled
        if part in ("query", "messages") and part not in self.explicit:
            known = SYNONYMS["query"] if part == "query" else ("texts",)
            turns = [name for name in names if name.lower() in known and is_turns(self.fields[name])]
            turns = [name for name in turns if name not in self.explicit.values()]
            if len(turns) == 1 and (part == "query" or single(part, names, self.explicit) is None):
                return turns[0]
        return single(part, names, self.explicit)

    def alpaca_column(self, part: str) -> str | None:
        """The column named like a field of the instruction format."""
        if part in self.explicit:
            return self.explicit[part]
        found = [name for name in self.fields if name.lower() == part and name not in self.explicit.values()]
        if len(found) > 1:
            raise ColumnError(f"{' and '.join(map(repr, found))} differ only in case")
        return found[0] if found else None


@dataclass(frozen=True)
class Parsed:
    """A row as a format reads it: the conversation, the columns it used up, notices to count, and whether
    it is a plain text rather than a conversation."""

    conversation: Conversation
    used: tuple[str, ...]
    notices: tuple[str, ...] = ()
    plain: bool = False


@dataclass(frozen=True)
class Format:
    """One row format: does a row have its columns, and what do they say."""

    name: str
    matches: Callable[[Parts], bool]
    parse: Callable[[Parts], Parsed]


def format_of(parts: Parts) -> Format:
    for known in FORMATS:
        if known.matches(parts):
            return known
    empty = ", ".join(repr(name) for name, value in parts.fields.items() if value is None)
    without = f" ({empty} without a value)" if empty else ""
    raise FormatError(
        f"no format fits the columns {', '.join(map(repr, parts.fields))}{without}: there is no messages, no "
        'instruction and no query column. Map them with --columns \'{"your column": "query"}\''
    )


def _is_messages(parts: Parts) -> bool:
    if {"query", "response", "instruction", "input", "output"} & parts.explicit.keys():
        return False
    return parts.column("messages") is not None


def _parse_messages(parts: Parts) -> Parsed:
    column = parts.column("messages")
    assert column is not None
    conversation = parse_conversation(parts.fields[column], column)
    used = (column, *_with_system(parts, conversation, column))
    said = [turn for turn in conversation.messages if turn.role != "system" or turn.content.strip()]
    plain = [turn.role for turn in said] == ["assistant"] and said[0].content and not said[0].tool_calls
    if plain and parts.may_be_plain:
        return Parsed(conversation, used, (PLAIN,), plain=True)
    return Parsed(conversation, used)


def _is_alpaca(parts: Parts) -> bool:
    if {"query", "response"} & parts.explicit.keys():
        return False
    return parts.alpaca_column("instruction") is not None and parts.alpaca_column("input") is not None


def _parse_alpaca(parts: Parts) -> Parsed:
    names = [parts.alpaca_column(part) for part in ("instruction", "input")]
    query = "\n".join(piece for name in names if name is not None and (piece := _text(parts, name)))
    if not query:
        raise FormatError(f"both {names[0]!r} and {names[1]!r} are empty")
    answer = None
    if not parts.prompt_only:
        answer = parts.answer or parts.alpaca_column("output") or parts.column("response")
        if answer is None:
            raise FormatError("there is an instruction but no output column")
    conversation = Conversation([Message("user", query)])
    used = (*_names(*names), *_with_history(parts, conversation), *_with_system(parts, conversation, ""))
    return _answered(parts, conversation, used, answer)


def _is_query(parts: Parts) -> bool:
    return parts.column("query") is not None or _plain_text_prompt(parts) is not None


def _parse_query(parts: Parts) -> Parsed:
    column = parts.column("query") or _plain_text_prompt(parts)
    assert column is not None
    notices: tuple[str, ...] = ()
    value = parts.fields[column]
    answer = None if parts.prompt_only else parts.column("response")
    if is_turns(value):
        conversation = parse_conversation(value, column)
        whole = conversation.messages[-1].role == "assistant"
        if whole and (parts.prompt_only or answer is not None):
            raise FormatError(
                f"the prompt {column!r} ends with a turn of the assistant's. If that is the answer, map it "
                f'with --columns \'{{"{column}": "messages"}}\''
            )
        used = (column, *_with_system(parts, conversation, column))
        if whole:
            return Parsed(conversation, used)
    elif is_transcript(value):
        conversation, notices = parse_transcript(value), (NOTICE,)
        used = (column, *_with_system(parts, conversation, column))
    else:
        if not (query := _text(parts, column)):
            raise FormatError(f"{column!r} is empty")
        conversation = Conversation([Message("user", query)])
        used = (column, *_with_history(parts, conversation), *_with_system(parts, conversation, column))
        notices = _left_out(parts, column)
    if answer is None and not parts.prompt_only:
        raise FormatError(
            f"{column!r} is the query, but no response column is among {', '.join(map(repr, parts.fields))}. "
            'Map it with --columns \'{"your column": "response"}\''
        )
    return _answered(parts, conversation, used, answer, notices)


def _left_out(parts: Parts, column: str) -> tuple[str, ...]:
    """Of an instruction that `--columns` calls the query, the input that stands beside it."""
    other = next((name for name in parts.fields if name.lower() == "input"), column)
    if column.lower() != "instruction" or other in (column, *parts.explicit.values()):
        return ()
    if not parts.fields[other]:
        return ()
    return (f"rows have {other!r} beside {column!r}, which --columns makes the query: it is left out of it",)


def _plain_text_prompt(parts: Parts) -> str | None:
    """The only column of a text file: for a prompt task it can be nothing else than the prompt."""
    names = list(parts.fields)
    return names[0] if parts.prompt_only and len(names) == 1 and names[0].lower() == "text" else None


def _is_text(parts: Parts) -> bool:
    return parts.may_be_plain and _text_column(parts) is not None


def _text_column(parts: Parts) -> str | None:
    return next((n for n, value in parts.fields.items() if n.lower() == "text" and value is not None), None)


def _parse_text(parts: Parts) -> Parsed:
    column = _text_column(parts)
    assert column is not None
    if not (text := _text(parts, column)):
        raise FormatError(f"{column!r} is empty")
    return Parsed(Conversation([Message("assistant", text)]), (column,), (PLAIN,), plain=True)


def _answered(
    parts: Parts,
    conversation: Conversation,
    used: tuple[str, ...],
    answer: str | None,
    notices: tuple[str, ...] = (),
) -> Parsed:
    """The conversation with the answer of a column behind it: text, turns, or of alternatives the first,
    which is announced."""
    if answer is None:
        return Parsed(conversation, used, notices)
    value = parts.fields[answer]
    if is_turns(value):
        conversation.extend(parse_conversation(value, answer))
    else:
        if isinstance(value, list | tuple) and value:
            value = value[0]
            notices = (*notices, f"rows have a list as {answer!r}; its first item is the response")
        conversation.messages.append(Message("assistant", _as_text(value, answer)))
    return Parsed(conversation, (*used, answer), notices)


def _with_system(parts: Parts, conversation: Conversation, column: str) -> tuple[str, ...]:
    """Puts the row's system prompt before a conversation, in the place of an empty one, and says which column
    holds it."""
    name, system = parts.column("system"), _system(parts)
    first = conversation.messages[:1]
    own = first[0].content if first and first[0].role == "system" else None
    if system is not None and own is not None and own.strip() and own != system:
        raise FormatError(f"two different system prompts: column {name!r} and {column!r}[0]")
    if system is not None:
        conversation.messages[: 0 if own is None else 1] = [Message("system", system)]
    return _names(name)


def _with_history(parts: Parts, conversation: Conversation) -> tuple[str, ...]:
    """Puts the rounds of the history before a conversation, and says which column holds them."""
    name = parts.column("history")
    rounds = [(Message("user", q), Message("assistant", a)) for q, a in _history(parts, name)]
    conversation.messages[:0] = [message for pair in rounds for message in pair]
    return _names(name)


def _history(parts: Parts, column: str | None) -> list[tuple[str, str]]:
    if column is None:
        return []
    value = parts.fields[column]
    turns = (parse_text(value, column) if value.strip() else []) if isinstance(value, str) else value
    pairs: list[tuple[str, str]] = []
    for pair in turns if isinstance(turns, list | tuple) else [None]:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise FormatError(f"{column!r} must be a list of [query, response] pairs")
        pairs.append((pair[0], pair[1]))
    return pairs


def _system(parts: Parts) -> str | None:
    """The prompt in the row's column; None without one. An empty one is none."""
    column = parts.column("system")
    text = "" if column is None else _text(parts, column)
    return text if text.strip() else None


def _text(parts: Parts, column: str) -> str:
    return _as_text(parts.fields[column], column)


def _as_text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        raise FormatError(f"column {column!r} holds {value}: a missing value, no text")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise FormatError(
            f"column {column!r} holds {type(value).__name__}, not text. If another column is meant, name it "
            'with --columns \'{"your column": "response"}\' (or "query")'
        )
    return value


def _names(*columns: str | None) -> tuple[str, ...]:
    return tuple(column for column in columns if column is not None)


FORMATS: tuple[Format, ...] = (
    Format("messages", _is_messages, _parse_messages),
    Format("alpaca", _is_alpaca, _parse_alpaca),
    Format("query", _is_query, _parse_query),
    Format("text", _is_text, _parse_text),
)
