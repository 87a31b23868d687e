"""A row of any known format (see `row_formats`) becomes an `Example`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_rl.data.columns import ColumnMap, columns_of
from raytune_rl.data.conversation import Conversation, FormatError, parse_text
from raytune_rl.data.example import PROMPT_TASKS, Example, MediaRef, Message, Row, RowError, Task
from raytune_rl.data.media_tags import GROUNDING, TAGS, legacy_images, media_refs, place_tags
from raytune_rl.data.preference_rows import read_label, rejected_turns, with_chosen
from raytune_rl.data.row_formats import Parsed, Parts, format_of
from raytune_rl.data.rules import PLACEHOLDERS
from raytune_rl.data.tool_calls import tools_of
from raytune_rl.protocol.rewards import RUN_COLUMNS

#: Parts that are no text of their own: without a value their columns say nothing about a row.
_STRUCTURE = (*TAGS, "messages", "tools", "chat_template_kwargs", "history", "system")


#: What the data say the answer is, where a model is to give its own (`infer`); ms-swift's name.
LABELS = "labels"


class Converter:
    """Turns rows into examples, and counts what the user should be told once (`notices`)."""

    def __init__(
        self, task: Task, *, system: str | None = None, columns: Mapping[str, str] | None = None
    ) -> None:
        """`system` is used where a row has none of its own (an empty one is none); `columns` maps source to
        target names."""
        self.notices: Counter[str] = Counter()
        self.seen_columns: set[str] = set()
        self._task = task
        self._prompt_only = task in PROMPT_TASKS
        self._keeps_answer = task == "infer"
        self._system = system if system and system.strip() else None
        self._columns = ColumnMap(columns or {})

    def __call__(self, row: Row) -> Example:
        """Converts one row.

        Raises:
            RowError: The row is in no known format, is ambiguous, or is incomplete for the task.
        """
        try:
            return self._convert(row)
        except ValueError as error:  # FormatError, ColumnError, and what `media_tags` finds
            raise RowError(row.source, row.line, str(error)) from error

    def unseen_columns(self) -> list[str]:
        """Sources in `columns` that no row so far had: most likely misspelt."""
        seen = {name.lower() for name in self.seen_columns}
        return [source for source in self._columns.renames if source.lower() not in seen]

    def _convert(self, row: Row) -> Example:
        inner = self._columns.inner(row.fields)
        self.seen_columns.update(row.fields, inner)
        given, explicit = self._columns.apply({**row.fields, **inner})
        fields = self._columns.apply({**row.written(), **inner})[0] if row.present else given
        explicit = {**row.parts, **explicit}
        answer = None
        if self._task == "pairs":
            fields, answer = with_chosen(fields, explicit)
        parts = Parts(fields, explicit, self._prompt_only, answer, may_be_plain=self._task == "sft")
        parsed = format_of(parts).parse(parts)
        structure = (*TAGS, "tools", "chat_template_kwargs")
        used = {*parsed.used, *(name for modality in structure if (name := parts.column(modality)))}
        messages = self._for_task(self._with_system(parsed))
        media = {modality: _media(parts, modality, parsed.conversation) for modality in TAGS}
        if parsed.plain and any(media.values()):
            raise FormatError(
                "a text with media must answer something: give the row a user turn, or a query column"
            )
        messages, named = (messages, ()) if parsed.plain else legacy_images(messages)
        if named:
            if media["images"]:
                raise FormatError("images stand both in <img> tags and beside the text; keep one of them")
            media["images"] = named
            self.notices["rows name images between <img> and </img>; each is read as an image"] += 1
        _check_grounding(fields, messages)
        if any(mark in message.content for message in messages for mark in PLACEHOLDERS):
            self.notices[f"rows have {' or '.join(PLACEHOLDERS)} in their text, and keep it"] += 1
        for modality, refs in media.items():
            if not refs and any(TAGS[modality] in message.content for message in messages):
                self.notices[
                    f"rows have {TAGS[modality]} in their text but no {modality}: there it is text"
                ] += 1
            messages, added = place_tags(messages, modality, len(refs))
            if added:
                self.notices[f"rows had {modality} but no {TAGS[modality]} tag; tags were put first"] += 1
        said = [*parsed.notices, *(f"rows whose {u}, which nothing uses" for u in parsed.conversation.unused)]
        if said:
            self.notices.update(said)
        rejected: tuple[Message, ...] = ()
        label = None
        if self._task == "pairs":
            rejected, column = rejected_turns(fields, parsed.conversation, messages)
            used.add(column)
        elif self._task == "labels":
            label, column = read_label(fields)
            used.add(column)
        extra = {
            name: given.get(name, value) for name, value in fields.items() if _survives(name, value, used)
        }
        if self._task in ("grpo", "ppo"):
            self._for_rewards(extra)
        last = parsed.conversation.messages[-1:]
        if self._keeps_answer and last and last[0].role == "assistant":
            extra[LABELS] = last[0].content
        return Example(
            messages=tuple(messages),
            **media,
            extra=extra,
            tools=_tools(parts),
            template_kwargs=_template_kwargs(parts),
            rejected=rejected,
            label=label,
            plain=parsed.plain,
            source=row.source,
            line=row.line,
        )

    def _for_rewards(self, extra: dict[str, Any]) -> None:
        """verl's rows have the right answer in an object; and some names are the run's own."""
        held = extra.get("reward_model")
        if isinstance(held, str) and held.lstrip().startswith("{"):  # in CSV, or written as JSON
            held = parse_text(held, "reward_model")
        truth = held.get("ground_truth") if isinstance(held, dict) else None
        if truth is not None and extra.get("solution") is None:
            extra["solution"] = truth
            self.notices["rows have reward_model.ground_truth; it is the 'solution' of rewards"] += 1
        for name in extra.keys() & set(RUN_COLUMNS):
            del extra[name]
            self.notices[
                f"rows have a column {name!r}; rewards receive the run's own value by that name, and not the "
                f'column, unless it is given another with --columns \'{{"{name}": "..."}}\''
            ] += 1

    def _with_system(self, parsed: Parsed) -> list[Message]:
        own = list(parsed.conversation.messages)
        # CSV files and tables have the column in every row: an empty prompt is none.
        if own and own[0].role == "system" and not own[0].content.strip():
            del own[0]
        if self._system is None or parsed.plain or (own and own[0].role == "system"):
            return own
        return [Message("system", self._system), *own]

    def _for_task(self, messages: list[Message]) -> Sequence[Message]:
        if not messages:
            raise FormatError("the conversation has no turn but an empty system prompt")
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


def _survives(name: str, value: Any, used: set[str]) -> bool:
    """Is a column handed on in `extra`? `solution` always is; an empty column of media or turns is not."""
    if value is None and any(columns_of(part, [name]) for part in _STRUCTURE):
        return False
    return name not in used or name.lower() == "solution"


def _check_grounding(fields: Mapping[str, Any], messages: Sequence[Message]) -> None:
    """Placeholders that nothing fills in would be learned as they stand."""
    if any(name.lower() == "objects" and value for name, value in fields.items()):
        for mark in GROUNDING:
            if any(mark in message.content for message in messages):
                raise FormatError(
                    f"{mark} is not filled in from the column 'objects': write names and coordinates as "
                    "text, as the model is to say them"
                )


def _media(parts: Parts, modality: str, conversation: Conversation) -> tuple[MediaRef, ...]:
    column = parts.column(modality)
    refs = media_refs(parts.fields[column], modality) if column else ()
    return conversation.filled(modality, refs, column)


def _tools(parts: Parts) -> tuple[dict[str, Any], ...]:
    column = parts.column("tools")
    return () if column is None else tools_of(parts.fields[column], column)


# Arguments of a chat template that a row may not give: the conversation itself, and how it is written.
_RENDERING = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
}  # fmt: skip


def _template_kwargs(parts: Parts) -> dict[str, Any]:
    column = parts.column("chat_template_kwargs")
    value = None if column is None else parts.fields[column]
    if column is None or value is None or value == "":
        return {}
    given = parse_text(value, column) if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise FormatError(f'{column!r} must be an object, such as {{"enable_thinking": false}}')
    if taken := sorted(given.keys() & _RENDERING):
        raise FormatError(f"{column!r} sets {', '.join(taken)}, which no row may")
    # A table of rows has every key in every row.
    return {str(name): argument for name, argument in given.items() if argument is not None}
