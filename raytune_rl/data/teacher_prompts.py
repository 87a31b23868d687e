"""Self-distillation: what a teacher is asked instead of the prompt, with a hint, a solution or feedback that
the policy does not see.

The column is ms-swift's `teacher_prompt`: a text stands in the place of the last user turn (OPSD, Zhao et al.
2026; SDPO, Hübotter et al. 2026; SDFT, Shenfeld et al. 2026). Here it may also be a whole list of turns. Both
show the same media; a row without it asks the teacher what it asks the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytune_rl.data.dialects import FormatError, is_turns, parse_conversation
from raytune_rl.data.encode import Dropped, EncodedPrompts, some_left
from raytune_rl.data.example import Example, Message, RowError
from raytune_rl.data.media_tags import TAGS, place_tags
from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.data import TEACHER_PROMPT


@dataclass(frozen=True)
class TeacherPrompts:
    """Prompts as a teacher sees them.

    Attributes:
        examples: The rows that have one, as the policy sees them.
        prompts: Of each of these, Ragged int32.
        dropped: The other rows, and why.
        plain: How many ask the teacher what they ask the policy.
    """

    examples: list[Example]
    prompts: Ragged
    dropped: tuple[Dropped, ...]
    plain: int

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences for the user."""
        rest = f"; {self.plain:,} of {len(self.examples):,} rows have none" if self.plain else ""
        return (f"teachers are asked the column {TEACHER_PROMPT!r} instead of the prompt{rest}",)


def has_views(examples: Sequence[Example]) -> bool:
    """Whether any row asks the teacher something else."""
    return any(_given(example) for example in examples)


def encode_teacher_prompts(
    examples: Sequence[Example], encode: Callable[[Sequence[Example]], EncodedPrompts], *, strict: bool
) -> TeacherPrompts:
    """Writes and tokenizes what a teacher is asked in every row.

    Args:
        examples: The rows.
        encode: As prompts are encoded.
        strict: A row that cannot be used stops; otherwise it is dropped with its reason.

    Raises:
        RowError: Of such a row.
        DataError: No row is left.
    """
    seen: list[int] = []
    views: list[Example] = []
    dropped: list[Dropped] = []
    for number, example in enumerate(examples):
        try:
            view = teacher_view(example)
        except RowError as error:
            if strict:
                raise
            dropped.append(Dropped(error.source, error.line, error.reason, unusable=True))
            continue
        seen.append(number)
        views.append(view)
    some_left(seen, dropped, "rows")
    try:
        encoded = encode(views)
    except RowError as error:
        raise RowError(error.source, error.line, f"{TEACHER_PROMPT!r}: {error.reason}") from error
    dropped += [replace(one, reason=f"{TEACHER_PROMPT!r}: {one.reason}") for one in encoded.dropped]
    kept = [examples[seen[place]] for place in encoded.index]
    plain = sum(not _given(example) for example in kept)
    return TeacherPrompts(kept, encoded.prompts, tuple(dropped), plain)


def teacher_view(example: Example) -> Example:
    """The row as a teacher sees it.

    Raises:
        RowError: The column holds neither text nor turns, turns that end with the assistant, or other media
            than the row.
    """
    given = _given(example)
    if not given:
        return example
    try:
        messages = _messages(example, given)
        for column in TAGS:
            messages, _ = place_tags(messages, column, len(getattr(example, column)))
    except ValueError as error:
        raise RowError(example.source, example.line, f"{TEACHER_PROMPT!r}: {error}") from error
    return replace(example, messages=messages)


def _given(example: Example) -> Any:
    return example.extra.get(TEACHER_PROMPT)


def _messages(example: Example, given: Any) -> tuple[Message, ...]:
    if isinstance(given, str):
        last = max((i for i, m in enumerate(example.messages) if m.role == "user"), default=None)
        if last is None:
            raise FormatError("the row has no user turn whose place it could take")
        asked = replace(example.messages[last], content=given)
        return (*example.messages[:last], asked, *example.messages[last + 1 :])
    if not is_turns(given):
        raise FormatError(f"is {given!r:.60}, which is neither a text nor a list of turns")
    conversation = parse_conversation(given, TEACHER_PROMPT)
    if any(conversation.media.values()):
        raise FormatError(
            "names media of its own; write their tags, as the teacher is shown those of the row"
        )
    if conversation.messages[-1].role == "assistant":
        raise FormatError("ends with the assistant, who is still to answer")
    return tuple(conversation.messages)
