"""A row of any known format becomes an `Example`.

Which format a row is in is decided from its column names, in the order of `FORMATS`; the first that matches
wins:

    messages   a conversation under messages, conversation or conversations, in any dialect of `dialects`
    alpaca     instruction, input and output
    query      a query and a response column, under one of the names of `columns.SYNONYMS`

For a prompt task (GRPO, PPO) the response is not read at all; it survives in `extra` under its own name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_rl.data.columns import ColumnError, ColumnMap, columns_of, single
from raytune_rl.data.dialects import Conversation, FormatError, parse_conversation, parse_text
from raytune_rl.data.example import PROMPT_TASKS, Example, MediaRef, Message, Row, RowError, Task
from raytune_rl.data.media_tags import TAGS, media_refs, place_tags


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


class Converter:
    """Turns rows into examples, and counts what the user should be told once (`notices`)."""

    def __init__(
        self, task: Task, *, system: str | None = None, columns: Mapping[str, str] | None = None
    ) -> None:
        """`system` is used where a row has none of its own; `columns` maps source names to target names."""
        self.notices: Counter[str] = Counter()
        self.seen_columns: set[str] = set()
        self._prompt_only = task in PROMPT_TASKS
        self._system = system
        self._columns = ColumnMap(columns or {})

    def __call__(self, row: Row) -> Example:
        """Converts one row.

        Raises:
            RowError: The row is in no known format, is ambiguous, or is incomplete for the task.
        """
        self.seen_columns.update(row.fields)
        try:
            return self._convert(row)
        except ValueError as error:  # FormatError, ColumnError, and what `media_tags` finds
            raise RowError(row.source, row.line, str(error)) from error

    def unseen_columns(self) -> list[str]:
        """Sources in `columns` that no row so far had: most likely misspelt."""
        seen = {name.lower() for name in self.seen_columns}
        return [source for source in self._columns.renames if source.lower() not in seen]

    def _convert(self, row: Row) -> Example:
        renames = self._columns.plain_renames(row.fields)
        explicit = self._columns.explicit_parts(row.fields)
        fields = {renames.get(name, name): value for name, value in row.fields.items()}
        parts = Parts(fields, explicit, self._prompt_only)
        parsed = _format_of(parts).parse(parts)
        used = {*parsed.used, *(name for kind in (*TAGS, "tools") if (name := parts.column(kind)))}
        messages = self._for_task(self._with_system(parsed.conversation.messages))
        media = {kind: _media(parts, kind, parsed.conversation) for kind in TAGS}
        for kind, refs in media.items():
            messages, added = place_tags(messages, kind, len(refs))
            if added:
                self.notices[f"rows had {kind} but no {TAGS[kind]} tag; tags were put first"] += 1
        self.notices.update(parsed.notices)
        extra = {
            name: value for name, value in fields.items() if name not in used or name.lower() == "solution"
        }
        return Example(
            messages=tuple(messages),
            **media,
            extra=extra,
            tools=_tools(parts),
            source=row.source,
            line=row.line,
        )

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self._system is None or (messages and messages[0].role == "system"):
            return list(messages)
        return [Message("system", self._system), *messages]

    def _for_task(self, messages: list[Message]) -> Sequence[Message]:
        if self._prompt_only:
            if messages and messages[-1].role == "assistant":
                messages = messages[:-1]
            if not any(message.role in ("user", "tool") for message in messages):
                raise FormatError("there is no user turn to answer")
            if messages[-1].role == "assistant":
                raise FormatError(
                    "the conversation ends with two assistant turns; one can be left for the policy"
                )
            return messages
        last = messages[-1]
        if last.role != "assistant":
            raise FormatError(f"the last turn is by {last.role}; training needs one by the assistant")
        if not last.content and not last.tool_calls:
            raise FormatError("the last assistant turn is empty: there is nothing to learn from")
        return messages


def _format_of(parts: Parts) -> Format:
    for known in FORMATS:
        if known.matches(parts):
            return known
    raise FormatError(
        f"no format fits the columns {', '.join(map(repr, parts.fields))}: there is no messages, no "
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
    has_own = conversation.messages and conversation.messages[0].role == "system"
    if system is not None and has_own and conversation.messages[0].content != system:
        raise FormatError(
            f"two different system prompts: column {parts.column('system')!r} and {column!r}[0]"
        )
    if system is not None and not has_own:
        conversation.messages.insert(0, Message("system", system))
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
    if system is not None:
        conversation.messages.append(Message("system", _text(parts, system)))
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
    column = parts.column("system")
    return None if column is None else _text(parts, column)


def _text(parts: Parts, column: str) -> str:
    value = parts.fields[column]
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise FormatError(f"column {column!r} holds {type(value).__name__}, not text")
    return value


def _media(parts: Parts, kind: str, conversation: Conversation) -> tuple[MediaRef, ...]:
    column = parts.column(kind)
    inline = conversation.media[kind]
    refs = media_refs(parts.fields[column]) if column else ()
    if refs and inline:
        raise FormatError(f"{kind} stand both in the content and in column {column!r}; keep one of them")
    return refs or tuple(inline)


def _tools(parts: Parts) -> tuple[dict[str, Any], ...]:
    column = parts.column("tools")
    if column is None:
        return ()
    value = parts.fields[column]
    tools = (parse_text(value, column) if value.strip() else []) if isinstance(value, str) else value
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise FormatError(f"{column!r} must be a list of tool schemas")
    return tuple(tools)


def _names(*columns: str | None) -> tuple[str, ...]:
    return tuple(column for column in columns if column is not None)


FORMATS: tuple[Format, ...] = (
    Format("messages", _is_messages, _parse_messages),
    Format("alpaca", _is_alpaca, _parse_alpaca),
    Format("query", _is_query, _parse_query),
)
__all__ = ["FORMATS", "ColumnError", "Converter", "Format", "FormatError", "columns_of"]
