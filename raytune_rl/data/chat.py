"""Conversations as text, by the model's own chat template; and where in that text the assistant speaks.

Tokenizers and processors are passed in; nothing here imports Transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from os.path import commonprefix
from typing import Any

from raytune_rl.data.example import Example, Message
from raytune_rl.data.media_tags import modalities_of, split_tags
from raytune_rl.data.turn_end import TurnEnd, find_turn_end
from raytune_rl.errors import DataError, ModelError
from raytune_rl.protocol.media import Modality

#: For base models that know ChatML's tokens but bring no template: no default system prompt, nothing added.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_MARK = "(what the turn says)"


@dataclass(frozen=True)
class ChatTemplate:
    """How a tokenizer writes conversations.

    Attributes:
        tokenizer: The tokenizer, unchanged.
        template: The template in use when it is not the tokenizer's own.
        notice: A sentence for the user when it is not.
        processor: Of a vision model: it writes conversations, from lists of parts, instead of the tokenizer.
        parts_always: Whether its template wants turns without media as lists of parts too.
        eos_token_ids: Ids that end an answer by the model's generation_config.
    """

    tokenizer: Any
    template: str | None = None
    notice: str | None = None
    processor: Any = None
    parts_always: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, processor: Any = None) -> ChatTemplate:
        """The processor's own template, else the tokenizer's, else ChatML for one that has none but has
        ChatML's tokens (Qwen base models).

        Raises:
            ModelError: There is none of these.
        """
        if processor is not None and getattr(processor, "chat_template", None):
            chat = cls(tokenizer, processor=processor)
            return replace(chat, parts_always=not chat._takes_text())
        if getattr(tokenizer, "chat_template", None):
            return cls(tokenizer)
        if all(len(tokenizer.encode(token, add_special_tokens=False)) == 1 for token in _CHATML_TOKENS):
            return cls(
                tokenizer,
                CHATML,
                "the tokenizer has no chat template; it has the tokens of ChatML, so plain ChatML is used",
            )
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ModelError(
            f"the tokenizer of {name} has no chat template and not the tokens of ChatML. Use an "
            "instruction-tuned model, or put a chat_template into its tokenizer_config.json"
        )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict] = (),
        *,
        generation_prompt: bool,
        more: Mapping[str, Any] | None = None,
        modalities: Sequence[Modality] | None = None,
    ) -> str:
        """The conversation as text, special tokens written out.

        Args:
            messages: The conversation.
            tools: JSON schemas of the tools that the assistant may call.
            generation_prompt: Whether to end with the beginning of an assistant's turn.
            more: Further arguments of the template.
            modalities: The media whose tags stand for one; other tags are text. None: all that the model
                takes.

        Raises:
            DataError: The template refuses the conversation (roles out of order, for example).
        """
        overrides = {} if self.template is None else {"chat_template": self.template}
        writer = self.tokenizer if self.processor is None else self.processor
        try:
            return writer.apply_chat_template(
                [self._written(message, modalities) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **overrides,
                **(more or {}),
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise DataError(f"the chat template refuses the conversation: {error}") from error

    def plain(self, text: str) -> tuple[str, int]:
        """A text as a document of its own, and where in what is returned it begins. It begins with the bos of
        a tokenizer that puts one before texts, else with the eos, which ends the document before (without
        anything before it the first token would not be learned), and ends with the eos."""
        specials = self.tokenizer.encode("")
        eos = self.tokenizer.eos_token or ""
        bos = self.tokenizer.bos_token or ""
        before = bos if bos and specials[:1] == [self.tokenizer.bos_token_id] else eos
        before = "" if before and text.startswith(before) else before
        return f"{before}{text}{'' if eos and text.endswith(eos) else eos}", len(before)

    def unwritten(self, example: Example) -> list[str]:
        """Keys of a row's turns, and other arguments of its own, that the template never names."""
        keys = {key for message in example.messages for key in message.other}
        keys |= {"tool_calls"} if any(message.tool_calls for message in example.messages) else set()
        keys |= {"tools"} if example.tools else set()
        keys |= example.template_kwargs.keys()
        if not keys:
            return []
        writer = self.tokenizer if self.processor is None else self.processor
        source = self.template or writer.chat_template
        text = source if isinstance(source, str) else " ".join((source or {}).values())
        return sorted(key for key in keys if not _names(text, key))

    def _written(self, message: Message, modalities: Sequence[Modality] | None) -> dict[str, Any]:
        plain = message.for_template()
        if self.processor is not None:
            taken = modalities_of(self.processor)
            parts = split_tags(
                message.content,
                [modality for modality in taken if modalities is None or modality in modalities],
            )
            if self.parts_always or any(part["type"] != "text" for part in parts):
                plain["content"] = parts
        return plain

    def _takes_text(self) -> bool:
        """Whether the template writes a text as it writes a list of one text. Some go through the characters
        of a text as if they were parts."""
        turn = Message("user", "Good morning.")
        try:
            return self.render([turn], generation_prompt=False) == replace(self, parts_always=True).render(
                [turn], generation_prompt=False
            )
        except DataError:
            return False

    @cached_property
    def turn_end(self) -> TurnEnd:
        """How an assistant's turn ends.

        Raises:
            DataError: The template refuses a question and its answer.
        """
        answer = "Fine."
        turns = (Message("user", "How are you?"), Message("assistant", answer))
        text = self.render(turns, generation_prompt=False)
        (_, end) = assistant_spans(turns, [1], text, self.render)[1]
        if answer not in text[:end]:
            raise DataError(f"the chat template does not write an answer as it was said: {text!r:.200}")
        tail = text[text.rindex(answer, 0, end) + len(answer) : end]
        return find_turn_end(tail, self.render, self.tokenizer, self.eos_token_ids)

    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an assistant turn: the tokenizer's eos, the token its template writes after an answer,
        and those that the model's generation_config lists.

        They differ for base models: Qwen2.5-7B ends a text with `<|endoftext|>` and a turn with `<|im_end|>`.
        """
        return self.turn_end.stops


@lru_cache(maxsize=256)
def _names(template: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", template) is not None


def trained_turns(example: Example, loss_scale: str) -> list[int]:
    """Which messages are trained on: by `loss_scale`, unless a message says so itself (`loss`)."""
    last_user = max((i for i, m in enumerate(example.messages) if m.role == "user"), default=-1)
    chosen = []
    for number, message in enumerate(example.messages):
        by_scale = loss_scale != "last_round" or number > last_user
        if message.role == "assistant" and (by_scale if message.loss is None else message.loss):
            chosen.append(number)
    return chosen


def assistant_spans(
    messages: Sequence[Message],
    turns: Sequence[int],
    text: str,
    render: Callable[..., str],
) -> dict[int, tuple[int, int]]:
    """Where assistant turns stand in a rendered conversation, as character ranges `[start, end)`.

    A range begins where the generation prompt ends, and ends with the end-of-turn mark, without white space
    after it.
    It is found by rendering the conversation up to the turn and through it, which is the beginning of the
    whole for most templates. One that writes earlier turns in another way (Qwen3 puts an empty thought before
    the last answer alone) is followed as long as it leaves out nothing that the row says.

    Args:
        messages: The conversation.
        turns: Numbers of the assistant messages wanted.
        text: The whole conversation rendered, without generation prompt.
        render: `(messages, *, generation_prompt) -> str`.

    Raises:
        DataError: The template leaves a part of a turn out once others follow (Qwen3 removes earlier
            thoughts), so that what the model would be trained on is not what the row says.
    """
    spans = {}
    for turn in turns:
        if turn == 0:
            raise DataError(
                "the conversation begins with the assistant; a chat template needs a user turn first"
            )
        before = render(messages[:turn], generation_prompt=True)
        through = text if turn == len(messages) - 1 else render(messages[: turn + 1], generation_prompt=False)
        end: int | None = None
        if text.startswith(through) and through.startswith(before):
            end = _end_of_turn(through, len(before), messages[turn].content)
        elif text.startswith(before):
            end = _end_in_history(messages, turn, text, before, render)
        if end is None:
            raise DataError(
                f"the chat template does not write turn {turn} as the row has it once others follow (it may "
                "leave out earlier thoughts). Train on the last round only (--loss_scale last_round), make "
                "it one row for each answer, ending there, or use another template. Trained on as the "
                "template writes it, an answer without its thought would teach the model not to think"
            )
        spans[turn] = (len(before), end)
    return spans


def _end_in_history(
    messages: Sequence[Message], turn: int, text: str, before: str, render: Callable[..., str]
) -> int | None:
    """The end of a turn that is written as a part of the past; None where that is not the whole turn.

    Another word in the turn's place shows what follows it, and alone, the mark that ends it.
    """
    marked = replace(messages[turn], content=_MARK)
    _, *following = render([*messages[:turn], marked, *messages[turn + 1 :]], generation_prompt=False).split(
        _MARK
    )
    _, *ending = render([*messages[:turn], marked], generation_prompt=False).split(_MARK)
    if len(following) != 1 or len(ending) != 1 or not text.endswith(following[0]):
        return None
    mark, end = ending[0].rstrip(), len(text) - len(following[0])
    if not following[0].startswith(mark):  # Phi-3 writes the conversation's end on a line behind the turn's
        shared = commonprefix([mark, following[0]])  # noqa: RUF071, characters are meant
        mark = shared.rpartition("\n")[0].rstrip()
        if not mark:
            return None
    whole = messages[turn].content.strip() in text[len(before) : end]
    return end + len(mark) if whole and following[0].startswith(mark) else None


def _end_of_turn(text: str, start: int, content: str) -> int:
    """The end of the turn that runs from `start` to the end of `text`, without what separates it
    from the next."""
    trimmed = start + len(text[start:].rstrip())
    spoken = text.find(content, start) if content else -1
    # White space that the assistant wrote stays: only a template without an end mark would lose it.
    return trimmed if spoken < 0 else max(trimmed, spoken + len(content))
