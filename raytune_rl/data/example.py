"""The common form of every data format: a conversation, its media, and the other columns of its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raytune_rl.errors import DataError
from raytune_rl.redaction import redact_text

Task = Literal["sft", "grpo", "ppo", "pairs", "labels", "infer"]

#: Tasks that need the prompt only: a last assistant message is taken off, the policy writes its own.
PROMPT_TASKS: frozenset[str] = frozenset({"grpo", "ppo", "infer"})

#: A file as the data names it, never decoded here: a path, a URL, a base64 data URI, or encoded bytes.
FileRef = str | bytes
#: A medium: one file, or of a video also its frames, each a file.
MediaRef = FileRef | tuple[FileRef, ...]


@dataclass(frozen=True)
class Row:
    """One row as its source holds it.

    Attributes:
        fields: Column name to value.
        source: The file, or `hub::id:subset[split]`.
        line: 1-based: the line on which the row begins in a text file, else the row's number in the source.
        present: Of a table, by column with structs: what leaves the keys without a value out of one of its
            values. A table gives every struct every key, and nobody wrote those.
        parts: Part to column, where the preparation of the data set says so (see `registered`).
    """

    fields: dict[str, Any]
    source: str
    line: int
    present: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)

    def written(self) -> dict[str, Any]:
        """The columns without the keys that only the table has put into them."""
        if not self.present:
            return self.fields
        return {
            name: self.present[name](value) if value is not None and name in self.present else value
            for name, value in self.fields.items()
        }


@dataclass(frozen=True)
class BadRow:
    """A place in a source that could not be read as a row."""

    source: str
    line: int
    reason: str
    raw: str


class RowError(DataError):
    """One row cannot be used.

    Attributes:
        source, line: Where the row is.
        reason: What is wrong with it, without the place.
    """

    def __init__(self, source: str, line: int, reason: str) -> None:
        super().__init__(source, line, reason)
        self.source = source
        self.line = line
        self.reason = reason

    def __str__(self) -> str:
        return f"{redact_text(self.source)}:{self.line}: {redact_text(self.reason)}"


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: The text; media appear in it as `<image>`, `<video>`, `<audio>` tags.
        loss: Overrides whether an assistant turn is trained on; None leaves it to `loss_scale`.
        tool_calls: Calls the assistant makes, each `{"type": "function", "function": {"name", "arguments"}}`.
        other: Further keys of the message, handed to the chat template as they are (`reasoning_content`,
            ...).
    """

    role: str
    content: str
    loss: bool | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    other: Mapping[str, Any] = field(default_factory=dict)

    def for_template(self) -> dict[str, Any]:
        """The message as a Hugging Face chat template expects it."""
        rendered: dict[str, Any] = {"role": self.role, "content": self.content, **self.other}
        if self.tool_calls:
            rendered["tool_calls"] = list(self.tool_calls)
        return rendered


@dataclass(frozen=True)
class Example:
    """One row, understood.

    Attributes:
        messages: The conversation. For a prompt task it does not end with the assistant.
        images, videos, audios: References in the order of their tags.
        extra: The row's other columns under their own names; rewards receive them.
        tools: JSON schemas of the tools the assistant may call.
        template_kwargs: Further arguments of the chat template, such as `enable_thinking`.
        rejected: For the task "pairs": the conversation with the rejected answer instead of the chosen one.
        label: For the task "labels": whether the answer is desirable.
        plain: The messages are one text to be learned as it stands, without a chat template.
        source, line: Where the row came from, as in `Row`.
    """

    messages: tuple[Message, ...]
    images: tuple[MediaRef, ...] = ()
    videos: tuple[MediaRef, ...] = ()
    audios: tuple[MediaRef, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    plain: bool = False
    source: str = ""
    line: int = 0

    @property
    def has_media(self) -> bool:
        return bool(self.images or self.videos or self.audios)


def conversations(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The turns of examples as rewards receive them: "messages", and "tools" if any has some."""
    columns: dict[str, list[Any]] = {"messages": [[m.for_template() for m in e.messages] for e in examples]}
    if any(example.tools for example in examples):
        columns["tools"] = [list(example.tools) for example in examples]
    return columns
