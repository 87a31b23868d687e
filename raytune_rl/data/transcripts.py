"""Conversations as one text, in the way of Anthropic's HH-RLHF: `\\n\\nHuman: ...\\n\\nAssistant: ...`."""

from __future__ import annotations

import re
from typing import Any

from raytune_rl.data.conversation import Conversation
from raytune_rl.data.example import Message

NOTICE = r"rows are transcripts (\n\nHuman: ... \n\nAssistant: ...); each is read as turns"

_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    """Does a text begin with a turn of the human's, and have one of the assistant's?"""
    return isinstance(value, str) and value.startswith(("\n\nHuman:", "Human:")) and "\n\nAssistant:" in value


def parse_transcript(text: str) -> Conversation:
    """The turns of a transcript, without the white space around them. A last turn that is empty stands for
    the answer to come, and is left out."""
    _, *pieces = _MARK.split(text)
    turns = [
        Message(_ROLES[name], said.strip()) for name, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns[-1].role == "assistant" and not turns[-1].content:
        turns.pop()
    return Conversation(turns)
