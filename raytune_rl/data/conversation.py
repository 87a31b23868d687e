"""A conversation as it is read from a row, whatever wrote it down."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_rl.data.example import MediaRef, Message
from raytune_rl.data.media_tags import TAGS


class FormatError(ValueError):
    """A row does not fit its format; the message says what is wrong, the caller adds where."""


@dataclass(frozen=True)
class Hole:
    """A medium that has its place in the text and lies in a column: `{"type": "image"}`.

    Attributes:
        index: Its number in the column, where the part says so.
    """

    index: int | None = None


@dataclass
class Conversation:
    """A parsed conversation, and the media its content lists carried, by modality.

    Attributes:
        messages: The turns.
        media: Column to media in the order of their tags; of some the text has the place alone.
        unused: Keys of turns and parts that say nothing here, each as a notice names it.
    """

    messages: list[Message] = field(default_factory=list)
    media: dict[str, list[MediaRef | Hole]] = field(
        default_factory=lambda: {modality: [] for modality in TAGS}
    )
    unused: set[str] = field(default_factory=set)

    def extend(self, other: Conversation) -> None:
        """Puts another conversation behind this one."""
        self.messages += other.messages
        for modality, found in other.media.items():
            self.media[modality] += found
        self.unused |= other.unused

    def filled(self, modality: str, refs: Sequence[MediaRef], column: str | None) -> tuple[MediaRef, ...]:
        """The media of one modality: those of the content lists, those of a column, or the column's in the
        places that the content lists have for them.

        Args:
            modality: Its column: images, videos or audios.
            refs: The media of the column.
            column: Its name; None if there is none.

        Raises:
            FormatError: Media stand in both, or a column has more or fewer than there are places.
        """
        inline = self.media[modality]
        holes = [item for item in inline if isinstance(item, Hole)]
        if not holes:
            if refs and inline:
                raise FormatError(
                    f"{modality} stand both in the content and in column {column!r}; keep one of them"
                )
            return tuple(refs) or tuple(item for item in inline if not isinstance(item, Hole))
        if len(refs) != len(holes):
            where = (
                f"there is no {modality!r} column" if column is None else f"column {column!r} has {len(refs)}"
            )
            raise FormatError(
                f'{len(holes)} parts {{"type": "{modality[:-1]}"}} have no {modality[:-1]} of their own, '
                f"and {where}"
            )
        numbers = [hole.index for hole in holes]
        known = [number for number in numbers if number is not None]
        order = known if sorted(known) == list(range(len(holes))) else range(len(holes))
        if known and order != known:
            raise FormatError(f"parts name {modality} by index {known}; each of 0 to {len(holes) - 1} once")
        waiting = iter([refs[number] for number in order])
        return tuple(next(waiting) if isinstance(item, Hole) else item for item in inline)


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


def present(item: Mapping[str, Any]) -> dict[str, Any]:
    """An object without what is null: tables give every turn and part every key of its column."""
    return {key: value for key, value in item.items() if value is not None}
