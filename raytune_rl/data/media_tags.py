"""Media by reference: what a row may write for one, and that every one has its tag in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raytune_rl.data.example import Example, FileRef, MediaRef, Message
from raytune_rl.protocol.media import Modality

#: Column to the tag that stands for one medium of it.
TAGS: dict[str, str] = {"images": "<image>", "videos": "<video>", "audios": "<audio>"}

MODALITIES: dict[str, Modality] = {"images": "image", "videos": "video", "audios": "audio"}
_TAG = re.compile("|".join(TAGS.values()))
_LEGACY = re.compile(r"<img>\s*(\S.*?)\s*</img>", re.DOTALL)

#: What ms-swift replaces by the names and boxes of the column `objects`.
GROUNDING = ("<ref-object>", "<bbox>")


def media_ref(value: Any) -> FileRef:
    """One file: a path, URL or data URI, bytes, or the `{"bytes", "path"}` (`{"url"}`) object of
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


def video_ref(value: Any) -> MediaRef:
    """One video: a file as of `media_ref`, or a list of its frames, each of them such a file."""
    if isinstance(value, list | tuple) and value:
        return tuple(media_ref(frame) for frame in value)
    return media_ref(value)


def media_refs(value: Any, column: str = "images") -> tuple[MediaRef, ...]:
    """The media of one column: one, a list of them, or None. In a list of videos, each may be a list of
    frames.

    Raises:
        ValueError: An item is no medium.
    """
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple((video_ref if column == "videos" else media_ref)(item) for item in value)
    return (media_ref(value),)


def modalities_of(processor: Any) -> tuple[Modality, ...]:
    """The media that a Transformers processor has a part for."""
    parts = {
        "image": ("image_processor",),
        "video": ("video_processor",),
        "audio": ("audio_processor", "feature_extractor"),
    }
    return tuple(
        modality
        for modality in MODALITIES.values()
        if any(getattr(processor, part, None) is not None for part in parts[modality])
        and (modality == "image" or getattr(processor, f"{modality}_token", None) is not None)
    )


def split_tags(content: str, modalities: Sequence[Modality]) -> list[dict[str, str]]:
    """A text with tags as the list of parts that processors' templates take; tags of other modalities are
    text.
    """
    of_tag = {TAGS[column]: modality for column, modality in MODALITIES.items() if modality in modalities}
    parts: list[dict[str, str]] = []
    for piece in re.split(f"({'|'.join(of_tag)})", content) if of_tag else [content]:
        if piece in of_tag:
            parts.append({"type": of_tag[piece]})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": ""}]


def in_order(example: Example) -> list[tuple[Modality, MediaRef]]:
    """The media of a row in the order of their tags."""
    columns = {TAGS[name]: (modality, list(getattr(example, name))) for name, modality in MODALITIES.items()}
    found = []
    for message in example.messages:
        for tag in _TAG.findall(message.content):
            modality, refs = columns[tag]
            if refs:
                found.append((modality, refs.pop(0)))
    return found


def legacy_images(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[MediaRef, ...]]:
    """Messages in which `<img>a.png</img>`, as older ms-swift data name a picture, has become a tag; and the
    pictures named so, in their order."""
    refs = tuple(ref for message in messages for ref in _LEGACY.findall(message.content))
    if not refs:
        return tuple(messages), ()
    tag = TAGS["images"]
    return tuple(replace(m, content=_LEGACY.sub(tag, m.content)) for m in messages), refs


def place_tags(messages: Sequence[Message], column: str, count: int) -> tuple[tuple[Message, ...], bool]:
    """Checks that the conversation has one tag a medium. Where there are no media, tags are words (HTML has a
    `<video>`, too).

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
    if tags == count or not count:
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
