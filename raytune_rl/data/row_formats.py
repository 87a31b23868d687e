"""The row formats, and what each makes of a row's columns.

Which format a row is in is decided from its column names, in the order of `FORMATS`; the first that matches
wins:

    messages   a conversation under messages, conversation or conversations, in any dialect of `dialects`
    alpaca     instruction, input and output
    query      a query and a response column, under one of the names of `columns.SYNONYMS`

For a prompt task (GRPO, PPO) the response is not read at all; it survives in `extra` under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raytune_rl.data.columns import ColumnError, single
from raytune_rl.data.dialects import Conversation, FormatError, parse_conversation, parse_text
from raytune_rl.data.example import Message


@dataclass(frozen=True)
class Parts:
    """The columns of a row and the part each plays, as far as `--columns` or the names tell."""

    fields: dict[str, Any]
    explicit: dict[str, str]
    prompt_only: bool

    def column(self, part: str) -> str | None:
        """The column that plays a part; None when there is none. Columns without a value do not count."""
        return single(part, [name for name, value in self.fields.items() if value is not None], self.explicit)

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
    """What a format makes of a row: the conversation, the columns it used up, and notices to count."""

    conversation: Conversation
    used: tuple[str, ...]
    notices: tuple[str, ...] = ()


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
    system = _system(parts)
    first = conversation.messages[:1]
    has_own = bool(first and first[0].role == "system" and first[0].content.strip())
    if system is not None and has_own and conversation.messages[0].content != system:
        raise FormatError(
            f"two different system prompts: column {parts.column('system')!r} and {column!r}[0]"
        )
    if system is not None and not has_own:
        emptied = 1 if first and first[0].role == "system" else 0
        conversation.messages[:emptied] = [Message("system", system)]
    return Parsed(conversation, _names(column, parts.column("system")))


def _is_alpaca(parts: Parts) -> bool:
    if {"query", "response"} & parts.explicit.keys():
        return False
    return parts.alpaca_column("instruction") is not None and parts.alpaca_column("input") is not None


def _parse_alpaca(parts: Parts) -> Parsed:
    names = [parts.alpaca_column(part) for part in ("instruction", "input", "output")]
    instruction, context, output = (None if name is None else _text(parts, name) for name in names)
    query = "\n".join(piece for piece in (instruction, context) if piece)
    if not query:
        raise FormatError(f"both {names[0]!r} and {names[1]!r} are empty")
    answer = names[2] or (None if parts.prompt_only else parts.column("response"))
    if not parts.prompt_only and answer is None:
        raise FormatError("there is an instruction but no output column")
    response, notices = (output, ()) if names[2] else _response(parts, answer)
    used = _names(names[0], names[1], *(() if parts.prompt_only else (answer,)))
    return _turns(parts, query, response, used, notices)


def _is_query(parts: Parts) -> bool:
    return parts.column("query") is not None or _plain_text_prompt(parts) is not None


def _parse_query(parts: Parts) -> Parsed:
    column = parts.column("query") or _plain_text_prompt(parts)
    assert column is not None
    query = _text(parts, column)
    if not query:
        raise FormatError(f"{column!r} is empty")
    if parts.prompt_only:
        return _turns(parts, query, None, (column,), ())
    answer = parts.column("response")
    if answer is None:
        raise FormatError(
            f"{column!r} is the query, but no response column is among {', '.join(map(repr, parts.fields))}. "
            'Map it with --columns \'{"your column": "response"}\''
        )
    response, notices = _response(parts, answer)
    return _turns(parts, query, response, (column, answer), notices)


def _plain_text_prompt(parts: Parts) -> str | None:
    """The only column of a text file: for a prompt task it can be nothing else than the prompt."""
    names = list(parts.fields)
    return names[0] if parts.prompt_only and len(names) == 1 and names[0].lower() == "text" else None


def _response(parts: Parts, column: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The text of the response; of a list of alternatives the first, which is announced."""
    if column is None:
        return None, ()
    value = parts.fields[column]
    if isinstance(value, list | tuple) and value:
        first = Parts({column: value[0]}, {}, parts.prompt_only)
        return _text(first, column), (f"rows have a list as {column!r}; its first item is the response",)
    return _text(parts, column), ()


def _turns(
    parts: Parts, query: str, response: str | None, used: tuple[str, ...], notices: tuple[str, ...]
) -> Parsed:
    system, history = parts.column("system"), parts.column("history")
    conversation = Conversation()
    if prompt := _system(parts):
        conversation.messages.append(Message("system", prompt))
    for asked, answered in _history(parts, history):
        conversation.messages += [Message("user", asked), Message("assistant", answered)]
    conversation.messages.append(Message("user", query))
    if response is not None and not parts.prompt_only:
        conversation.messages.append(Message("assistant", response))
    return Parsed(conversation, (*used, *_names(system, history)), notices)


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
    value = parts.fields[column]
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        raise FormatError(f"column {column!r} holds {value}: a missing value, no text")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise FormatError(f"column {column!r} holds {type(value).__name__}, not text")
    return value


def _names(*columns: str | None) -> tuple[str, ...]:
    return tuple(column for column in columns if column is not None)


FORMATS: tuple[Format, ...] = (
    Format("messages", _is_messages, _parse_messages),
    Format("alpaca", _is_alpaca, _parse_alpaca),
    Format("query", _is_query, _parse_query),
)
