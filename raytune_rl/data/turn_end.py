"""How an answer ends: which token the chat template writes behind it, and what to teach where it writes none.

Found by rendering a short conversation, so that it holds for any template:

- ChatML and most others write a mark behind each answer: it is trained, and stops generation.
- GLM's writes none: the next role's mark follows, and generation_config lists it as an end.
- Some leave the last answer's mark out, or have none at all: then the tokenizer's eos ends an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from raytune_rl.data.example import Message
from raytune_rl.errors import DataError

_ASKED, _SAID, _NEXT = Message("user", "How are you?"), Message("assistant", "Fine."), "(the next turn)"

Render = Callable[..., str]


@dataclass(frozen=True)
class TurnEnd:
    """How a template ends an assistant's turn.

    Attributes:
        stops: Ids that end an answer: the tokenizer's eos, the end mark, and those that the model lists.
        mark: The id that the template, or `added`, ends the last answer with; None without one.
        added: What a conversation's last answer is trained to end with, where the template itself writes no
            stop token there; else empty.
        marks: Texts of stop tokens that may follow earlier answers in its place; empty where `added` is.
        notice: A sentence for the user if anything is added, or nothing ends an answer.
    """

    stops: tuple[int, ...]
    mark: int | None = None
    added: str = ""
    marks: tuple[str, ...] = ()
    notice: str | None = None


def find_turn_end(tail: str, render: Render, tokenizer: Any, listed: Sequence[int]) -> TurnEnd:
    """The end of an assistant's turn.

    Args:
        tail: What the template writes behind the last answer, without white space at its end.
        render: `(messages, *, generation_prompt) -> str`.
        tokenizer: The model's.
        listed: Ids that end an answer by the model's generation_config.
    """
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    stops = [*eos, *listed]
    marks = {*map(int, tokenizer.added_tokens_decoder), *tokenizer.all_special_ids, *stops}

    def result(found: int | None, **more: Any) -> TurnEnd:
        own = [] if found is None else [found]
        return TurnEnd(tuple(dict.fromkeys((*eos, *own, *listed))), found, **more)

    between, opening = _between(render)
    if (written := _written_mark(tail, between, tokenizer, marks, stops)) is not None:
        return result(written)
    between = between.removeprefix(tail) if between.startswith(tail) else ""
    following = _first_mark(between, tokenizer, marks)
    if following is not None:
        text = tokenizer.convert_ids_to_tokens(following)
        # A mark that does not open the next turn is this one's end, left out behind the last answer.
        if following in stops or not opening.startswith(text):
            added = between[: between.index(text) + len(text)]
            ends = tuple(dict.fromkeys(tokenizer.convert_ids_to_tokens([*stops, following])))
            notice = f"the chat template writes no end behind the last answer: {text!r} is trained as its end"
            return result(following, added=added, marks=ends, notice=notice)
    if eos:
        text = tokenizer.eos_token
        notice = (
            "the chat template ends answers with no token that stops generation: the tokenizer's eos, "
            f"{text!r}, is trained as the end of a row's last answer"
        )
        return result(eos[0], added=text, notice=notice)
    return result(
        None,
        notice=None
        if stops
        else "nothing ends an answer: the chat template writes no end mark, and neither tokenizer nor "
        "generation_config has an eos. Answers will run to their longest; set eos_token in the tokenizer",
    )


def closed(
    end: TurnEnd, messages: Sequence[Message], text: str, spans: Mapping[int, tuple[int, int]], render: Render
) -> tuple[str, dict[int, tuple[int, int]]]:
    """A conversation in which every trained answer ends with a stop token, as far as the template lets it.

    Args:
        end: Of the template.
        messages: The conversation.
        text: It, rendered.
        spans: Of trained turns, see `data.chat.assistant_spans`.
        render: As in `find_turn_end`.

    Returns:
        The text, and the spans with what ends the answers.
    """
    if not end.added:
        return text, dict(spans)
    made = {}
    for turn, (start, stop) in spans.items():
        if turn == len(messages) - 1:
            text = text[:stop] + _ending(end, messages, text, stop, render)
            made[turn] = (start, len(text))
        else:
            made[turn] = (start, _past_mark(end, text, stop))
    return text, made


def _ending(end: TurnEnd, messages: Sequence[Message], text: str, stop: int, render: Render) -> str:
    """The mark that ends the last answer; behind a tool's call another role speaks next, so its mark may
    differ.
    """
    if end.marks and messages[-1].tool_calls:
        try:
            longer = render([*messages, Message("tool", _NEXT)], generation_prompt=False)
        except DataError:
            return end.added
        past = _past_mark(end, longer, stop) if longer.startswith(text[:stop]) else stop
        return longer[stop:past] or end.added
    return end.added


def _past_mark(end: TurnEnd, text: str, stop: int) -> int:
    """Behind the stop token that follows a turn; the turn's end if none does."""
    rest = text[stop:].lstrip()
    mark = next((mark for mark in end.marks if rest.startswith(mark)), None)
    return stop if mark is None else len(text) - len(rest) + len(mark)


def _written_mark(
    tail: str, between: str, tokenizer: Any, marks: set[int], stops: Sequence[int]
) -> int | None:
    """The mark that the template writes behind an answer, last or not: Phi-3's `<|end|>`, and not the eos
    that follows it at a conversation's end."""
    ids = [[int(i) for i in tokenizer.encode(text, add_special_tokens=False)] for text in (tail, between)]
    always = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False))]
    found = [one for one in always if one in marks]
    if found:
        return next((one for one in found if one in stops), found[-1])
    return next((one for one in ids[0] if one in marks), None)


def _first_mark(text: str, tokenizer: Any, marks: set[int]) -> int | None:
    ids = tokenizer.encode(text, add_special_tokens=False) if text else []
    return next((int(one) for one in ids if int(one) in marks), None)


def _between(render: Render) -> tuple[str, str]:
    """The text between an answer and the next question, and of that what opens any question; empty if the
    template does not say."""
    try:
        question = render([_ASKED], generation_prompt=False)
        text = render([_ASKED, _SAID, Message("user", _NEXT)], generation_prompt=False)
    except DataError:
        return "", ""
    before, _, behind = text.rpartition(_SAID.content)
    between = behind.partition(_NEXT)[0]
    if not before or _NEXT not in behind:
        return "", ""
    head = question.partition(_ASKED.content)[0]
    shared = 0
    while shared < min(len(between), len(head)) and between[-1 - shared] == head[-1 - shared]:
        shared += 1
    return between, between[len(between) - shared :]


def stop_in_files(chat: Any, generation: Any) -> str | None:
    """Makes what is saved of a model stop where its turns end, and know the template in use.

    Args:
        chat: A `ChatTemplate`; a tokenizer without a template gets the one in use.
        generation: Transformers' GenerationConfig of the model, changed here; None if it has none.

    Returns:
        A sentence for the user if the model's own settings would not have stopped there.
    """
    from raytune_rl.data.model_tokens import as_ids

    if chat.template is not None:
        chat.tokenizer.chat_template = chat.template
    if generation is None:
        return None
    own = as_ids(generation.eos_token_id)
    added = [one for one in chat.stop_token_ids() if one not in own]
    if not added:
        return None
    generation.eos_token_id = [*own, *added]
    names = " and ".join(map(repr, chat.tokenizer.convert_ids_to_tokens(added)))
    return f"{names} ends the turns: added to eos_token_id of the generation_config that checkpoints have"
