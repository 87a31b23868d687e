"""Two small byte-level tokenizers: one that writes ChatML, one in the style of Llama 3."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Like Qwen3: thoughts of earlier turns are left out once the user has spoken again.
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What Qwen3 does: a thought, if only an empty one, before what is said after the last question, none before.
QWEN3_TEMPLATE = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}"
    "{% if m.role != 'assistant' %}{{ m.content }}"
    "{% elif loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{{ said }}"
    "{% else %}{{ said }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Writes tools, calls, the key `name` of a turn and the argument `think`.
CALLS_TEMPLATE = (
    "{{ think or '' }}{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.name or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "What is the weather like today? It is sunny, and the wind is calm.",
    "user assistant system tool\n\nThe answer is 42.\nGood morning, how are you? Fine, thank you.",
    "Grüße aus München, 今天天气很好。",
] * 20


def make_tokenizer(special, template):
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(CORPUS, trainer)
    names = {"pad_token": special[0], "eos_token": special[-1]} if special else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, additional_special_tokens=special, chat_template=template, **names
    )


def chatml_tokenizer(template=CHATML_TEMPLATE):
    return make_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template)


@pytest.fixture(scope="session")
def chatml():
    return chatml_tokenizer()


@pytest.fixture(scope="session")
def llama3():
    header = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return make_tokenizer(header, LLAMA3_TEMPLATE)


@pytest.fixture(scope="session")
def forgetful():
    return chatml_tokenizer(FORGETFUL_TEMPLATE)


@pytest.fixture(scope="session")
def qwen3():
    return chatml_tokenizer(QWEN3_TEMPLATE)


@pytest.fixture(scope="session")
def calling():
    return chatml_tokenizer(CALLS_TEMPLATE)


@pytest.fixture(scope="session")
def new_tokenizer():
    """`(special tokens, template) -> tokenizer`."""
    return make_tokenizer


@pytest.fixture(scope="session")
def new_chatml():
    """`(template) -> tokenizer` with the tokens of ChatML."""
    return chatml_tokenizer
