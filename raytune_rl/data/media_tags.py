"""Media by reference: what a row may write for one, and that every one has its tag in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raytune_rl.data.example import MediaRef, Message

#: Column to the tag that stands for one medium of it.
TAGS: dict[str, str] = {"images": "<image>", "videos": "<video>", "audios": "<audio>"}

_LEGACY = re.compile(r"<img>\s*(\S.*?)\s*</img>", re.DOTALL)

#: What ms-swift replaces by the names and boxes of the column `objects`.
GROUNDING = ("<ref-object>", "<bbox>")


def media_ref(value: Any) -> MediaRef:
    """One medium: a path, URL or data URI, bytes, or the `{"bytes", "path"}` (`{"url"}`) object of
    `datasets`.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(value, str | bytes) and value:
        return value
    if isinstance(value, dict):
        for key in ("bytes", "path", "url"):
            inner = value.get(key)
            if isinstance(inner, str | bytes) and inner:
                return inner
    raise ValueError(f"{_shown(value)} is no path, URL, data URI, bytes or {{bytes, path}} object")


def media_refs(value: Any) -> tuple[MediaRef, ...]:
    """The media of one column: one, a list of them, or None.

    Raises:
        ValueError: An item is no medium.
    """
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(media_ref(item) for item in value)
    return (media_ref(value),)


def legacy_images(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[MediaRef, ...]]:
    """Messages in which `<img>a.png</img>`, as older ms-swift data name a picture, has become a tag; and the
    pictures named so, in their order."""
    refs = tuple(ref for message in messages for ref in _LEGACY.findall(message.content))
    if not refs:
        return tuple(messages), ()
    tag = TAGS["images"]
    return tuple(replace(m, content=_LEGACY.sub(tag, m.content)) for m in messages), refs


def place_tags(messages: Sequence[Message], column: str, count: int) -> tuple[tuple[Message, ...], bool]:
    """Checks that the conversation has one tag a medium.

    Args:
        messages: The conversation.
        column: images, videos or audios.
        count: Number of media.

    Returns:
        The messages, and whether tags had to be put first, which is done when there are media and no tag at
        all.

    Raises:
        ValueError: The numbers differ.
    """
    tag = TAGS[column]
    tags = sum(message.content.count(tag) for message in messages)
    if tags == count:
        return tuple(messages), False
    if tags:
        raise ValueError(
            f"{count} {column} but {tags} {tag} tags in the conversation; each needs one tag, in their order"
        )
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise ValueError(f"{count} {column} but no user turn to put them in")
    tagged = replace(messages[first], content=tag * count + messages[first].content)
    return (*messages[:first], tagged, *messages[first + 1 :]), True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
