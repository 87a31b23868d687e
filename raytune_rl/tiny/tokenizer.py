"""A Qwen2 tokenizer of exactly 512 tokens, trained on the questions of `arithmetic` and some prose.

Digits are one token each (as in Qwen2), `<think>`, `</think>`, `<answer>` and `</answer>` are one token each.
Those four are not special: they stay in the text when special tokens are skipped, so rewards see them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain

from tokenizers import AddedToken, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from raytune_rl.tiny.arithmetic import corpus

VOCAB_SIZE = 512
END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Merges beyond the questions' words, so that the vocabulary reaches its size and system prompts stay short.
PROSE = """
You are a helpful assistant. The user asks a question and the assistant solves it. The assistant first
thinks about the reasoning process in the mind and then provides the user with the answer. Put your final
answer within the tags. Solve the following problem step by step, check the result, and write nothing
after it. If there are several numbers, show how each of them was found. A model learns from rewards:
better samples become more likely, worse samples become less likely, and the reference keeps the policy
near the place where it started.
"""


def make_tiny_tokenizer(
    extra_special_tokens: Sequence[str] = (),
    *,
    texts: Sequence[str] = (),
    chat_template: str = CHAT_TEMPLATE,
) -> Qwen2Tokenizer:
    """Trains the tokenizer; deterministic.

    Args:
        extra_special_tokens: More special tokens (an image placeholder, for example). They take the place
            of as many merges: the size stays 512.
        texts: More texts to learn merges from.
        chat_template: How a conversation is written.

    Returns:
        A tokenizer with eos `<|im_end|>` and pad `<|endoftext|>`.
    """
    special = [END_OF_TEXT, IM_START, IM_END, *extra_special_tokens]
    # Qwen2's own normalizer and pre-tokenizer do the splitting: AutoTokenizer will rebuild exactly those.
    bare = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(special) - len(TAGS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    bare.train_from_iterator(chain(_texts(), texts), trainer)
    trained = json.loads(bare.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token=None,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        chat_template=chat_template,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    if len(tokenizer) != VOCAB_SIZE:
        raise RuntimeError(f"the tiny tokenizer has {len(tokenizer)} tokens instead of {VOCAB_SIZE}")
    return tokenizer


def _texts() -> Iterator[str]:
    yield from corpus()
    yield PROSE
    # Every chat pays for the roles: make each one token.
    yield from ["system", "user", "assistant", "tool"] * 50
