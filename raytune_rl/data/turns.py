"""The tokens between two turns of a model. What the model sampled is never tokenized again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.example import Message
from raytune_rl.errors import DataError

_SAID = "(said before)"


@dataclass(frozen=True)
class Continuation:
    """How a conversation goes on after a turn.

    Attributes:
        kept: How many of the sampled tokens stay, from the first.
        added: Ids of what is put behind them, by the environment.
        untrained: Positions among the kept ones that are not trained on.
    """

    kept: int
    added: tuple[int, ...]
    untrained: tuple[int, ...] = ()


def follow_up(chat: ChatTemplate, sampled: Sequence[int], new: Sequence[Mapping[str, Any]]) -> Continuation:
    """The model's turn is over and others speak: the end of its turn, their messages, and the next prompt.

    Args:
        chat: The model's chat template.
        sampled: Ids of the model's turn, with or without its end token.
        new: Messages after it, `{"role", "content"}` each.

    Raises:
        DataError: The template refuses the messages or does not show an assistant's turn as it was written.
    """
    messages = [Message("user", "?"), Message("assistant", _SAID), *(_message(m) for m in new)]
    text = chat.render(messages, generation_prompt=True)
    if text.count(_SAID) != 1:
        raise DataError("the chat template does not write an assistant's turn as it was said")
    after = text[text.index(_SAID) + len(_SAID) :]
    added = chat.tokenizer.encode(after, add_special_tokens=False)
    if sampled and added and added[0] == sampled[-1]:  # the end token that the model wrote itself
        added = added[1:]
    return Continuation(len(sampled), tuple(added))


def go_on(
    tokenizer: Any, sampled: Sequence[int], stops: Sequence[int], said: str, content: str
) -> Continuation:
    """The model's turn is not over: it is made to have said `content`, and speaks on.

    Of its tokens the longest beginning stays whose text `content` begins with.

    Args:
        tokenizer: The model's.
        sampled: Ids of the turn.
        stops: Ids that end a turn; one at the end is taken off.
        said: Text of `sampled`, without special tokens.
        content: What it shall have said.
    """
    ids = list(sampled)
    if ids and ids[-1] in stops:
        ids.pop()

    def text_of(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=True)

    common = next(
        (i for i, (a, b) in enumerate(zip(said, content, strict=False)) if a != b),
        min(len(said), len(content)),
    )
    kept = _last_true(len(ids), lambda count: len(text_of(count)) <= common)
    # A token may be half a character, whose text is a sign that stands for the missing half.
    while kept and not content.startswith(text_of(kept)):
        kept -= 1
    added = tokenizer.encode(content[len(text_of(kept)) :], add_special_tokens=False)
    return Continuation(kept, tuple(added))


def as_returned(
    chat: ChatTemplate,
    sampled: Sequence[int],
    ids: Sequence[int],
    mask: Sequence[int] | None,
    new: Sequence[Mapping[str, Any]],
    stops: Sequence[int],
) -> Continuation:
    """The scheduler says with which tokens the conversation goes on: what they have in common with the
    sampled ones from the first on is the model's, the rest the environment's.

    Args:
        chat: The model's chat template.
        sampled: Ids of the model's turn.
        ids: Ids to stand in its place.
        mask: For each of `ids` whether it is trained on; None: all that were sampled.
        new: Messages behind them; without any the model goes on from the last of `ids`.
        stops: Ids that end a turn; one between what was sampled and what was added to the same turn is taken
            off.

    Raises:
        ValueError: The mask has another length, or trains on what the model did not sample.
        DataError: As in `follow_up`.
    """
    kept = next((i for i, (a, b) in enumerate(zip(sampled, ids, strict=False)) if a != b), None)
    kept = min(len(sampled), len(ids)) if kept is None else kept
    if mask is not None and len(mask) != len(ids):
        raise ValueError(f"response_loss_mask has {len(mask)} entries for {len(ids)} response_token_ids")
    if mask is not None and any(mask[kept:]):
        raise ValueError("response_loss_mask trains on tokens that the model did not sample")
    added = tuple(ids[kept:])
    if added and not new and kept and sampled[kept - 1] in stops:
        kept -= 1
    untrained = () if mask is None else tuple(i for i in range(kept) if not mask[i])
    behind = follow_up(chat, ids, new).added if new else ()
    return Continuation(kept, (*added, *behind), untrained)


def _last_true(count: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `count` for which `holds` is true, given that it turns false once."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _message(raw: Mapping[str, Any]) -> Message:
    role, content = raw.get("role"), raw.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"a message needs the texts 'role' and 'content', not {dict(raw)!r:.200}")
    other = {k: v for k, v in raw.items() if k not in ("role", "content", "loss")}
    return Message(role, content, other=other)
