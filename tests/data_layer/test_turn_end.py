"""The end of an answer: found in any template, trained, and saved."""

from dataclasses import replace

import pytest
from tokenizers import AddedToken
from transformers import GenerationConfig

from raytune_rl.data.chat import CHATML, ChatTemplate
from raytune_rl.data.encode import encode_prompts, encode_sft
from raytune_rl.data.encode_preferences import encode_pairs
from raytune_rl.data.example import Example, Message
from raytune_rl.data.model_tokens import ModelTokens, read_eos
from raytune_rl.data.turn_end import stop_in_files
from raytune_rl.errors import ModelError
from tests.data_layer.conftest import make_tokenizer

GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'observation' }}|>\n"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GLM_TOKENS = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"]
# Phi-3 and Gemma: an end mark that is neither eos nor among the special tokens of the tokenizer.
PHI = CHATML.replace("<|im_end|>", "<|end|>")
# The mark between turns, none behind the last one.
BETWEEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def glm():
    made = make_tokenizer(GLM_TOKENS, GLM)
    made.eos_token = "<|endoftext|>"
    return made


def base(template=CHATML, added=()):
    """A base model's: it ends a text with <|endoftext|>."""
    made = make_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template)
    made.add_tokens([AddedToken(token, special=True) for token in added])
    made.eos_token = "<|endoftext|>"
    return made


def row(*contents, calls=()):
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    turns[-1] = replace(turns[-1], tool_calls=tuple(calls))
    return Example(tuple(turns), source="rows.jsonl", line=3)


def trained(tokenizer, example, eos=(), **settings):
    """The text that is trained on, by turn."""
    model = ModelTokens("m", None, tuple(eos))
    made = encode_sft([example], tokenizer, model=model, **settings)
    pieces, before = [], False
    for token, on in zip(made.tokens[0], made.loss_mask[0], strict=True):
        if on and not before:
            pieces.append([])
        if on:
            pieces[-1].append(int(token))
        before = bool(on)
    return [tokenizer.decode(piece) for piece in pieces], made


def test_the_next_roles_mark_ends_an_answer_where_the_model_lists_it() -> None:
    tokenizer = glm()
    eos = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    said, made = trained(tokenizer, row("Hi", "Fine.", "And?", "Good."), eos)
    assert said == ["Fine.<|user|>", "Good.<|user|>"]
    assert any("'<|user|>' is trained as its end" in notice for notice in made.notices)
    called = row("Hi", "Calling.", calls=[{"type": "function", "function": {"name": "f"}}])
    assert trained(tokenizer, called, eos)[0] == ["Calling.<|observation|>"]
    assert set(ChatTemplate(tokenizer, eos_token_ids=tuple(eos)).stop_token_ids()) == set(eos)


def test_eos_ends_the_last_answer_where_nothing_else_does() -> None:
    """Without the list, GLM's next mark is no stop token; a template of plain text has none at all."""
    for tokenizer in (glm(), base(PLAIN)):
        said, made = trained(tokenizer, row("Hi", "Fine.", "And?", "Good."))
        assert said == ["Fine.", "Good.<|endoftext|>"]
        assert made.tokens[0][-1] == tokenizer.eos_token_id
        assert any("eos" in notice for notice in made.notices)
        assert trained(tokenizer, row("Hi", "Good."), loss_scale="all")[0][0].endswith("Good.<|endoftext|>")


def test_a_mark_that_the_last_answer_lacks_is_put_there() -> None:
    tokenizer = base(BETWEEN)
    assert trained(tokenizer, row("Hi", "Fine.", "And?", "Good."))[0] == [
        "Fine.<|im_end|>",
        "Good.<|im_end|>",
    ]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ChatTemplate.of(tokenizer).stop_token_ids() == (tokenizer.eos_token_id, end)


def test_both_answers_of_a_pair_end() -> None:
    tokenizer = glm()
    pair = replace(row("Hi", "Fine."), rejected=row("Hi", "Bad.").messages)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    made = encode_pairs([pair], tokenizer, model=ModelTokens("m", None, (user,)))
    assert [made.tokens[i][-1] for i in range(2)] == [user, user]
    assert all(made.loss_mask[i][-1] for i in range(2))


def test_an_added_token_ends_a_turn_though_no_list_has_it() -> None:
    tokenizer = base(PHI, ["<|end|>"])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in tokenizer.all_special_ids
    assert ChatTemplate.of(tokenizer).stop_token_ids() == (tokenizer.eos_token_id, end)
    said, made = trained(tokenizer, row("Hi", "Fine."))
    assert said == ["Fine.<|end|>"]
    assert made.notices == ()


def test_the_mark_of_every_turn_ends_one_not_what_ends_the_conversation() -> None:
    """Phi-3 writes its eos behind the last turn's mark; others write two marks behind each answer."""
    tokenizer = base(PHI + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", ["<|end|>"])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert ChatTemplate.of(tokenizer).turn_end.mark == end
    assert trained(tokenizer, row("Hi", "Fine.", "And?", "Good."))[0][0] == "Fine.<|end|>"
    two = base(PHI.replace("<|end|>", "<x><|end|>"), ["<x>", "<|end|>"])
    assert ChatTemplate.of(two).turn_end.mark == two.convert_tokens_to_ids("<|end|>")


def test_nothing_is_added_where_the_template_ends_a_turn() -> None:
    tokenizer = base()
    plain = encode_sft([row("Hi", "Fine.")], tokenizer)
    assert tokenizer.decode(plain.tokens[0]).endswith("Fine.<|im_end|>\n")
    assert ChatTemplate.of(tokenizer).turn_end.added == ""


def test_a_model_without_any_end_is_told() -> None:
    tokenizer = make_tokenizer([], PLAIN)
    tokenizer.eos_token = None
    notices = encode_prompts([Example((Message("user", "Hi"),))], tokenizer).notices
    assert any("nothing ends an answer" in notice for notice in notices)


def test_files_stop_where_the_turns_end(tmp_path) -> None:
    tokenizer = base(template=None)
    generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    notice = stop_in_files(ChatTemplate.of(tokenizer), generation)
    assert "'<|im_end|>' ends the turns" in notice
    generation.save_pretrained(tmp_path)
    assert read_eos(tmp_path) == tuple(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert tokenizer.chat_template == CHATML
    assert stop_in_files(ChatTemplate.of(tokenizer), generation) is None


def test_tokens_that_the_model_does_not_have_are_named() -> None:
    tokenizer = base(added=[f"<x{i}>" for i in range(10)])
    rows = len(tokenizer) - 10
    model = ModelTokens("tiny", rows)
    assert len(encode_sft([row("Hi", "Fine.")], tokenizer, model=model).index) == 1  # extra, but unused
    wrong = rf"rows.jsonl:3: .*'<x9>' \(id {rows + 9}\).*tiny has only {rows} embeddings.*resize"
    for encode, example in ((encode_sft, row("Hi", "A<x9>")), (encode_prompts, row("Hi <x9>"))):
        with pytest.raises(ModelError, match=wrong):
            encode([example], tokenizer, model=model)
    for encode, example in ((encode_sft, row("Hi", "Fine.")), (encode_prompts, row("Hi"))):
        with pytest.raises(ModelError, match=r"end of a turn has the token '<.end.>'"):
            encode([example], base(PHI, ["<|end|>"]), model=ModelTokens("tiny", rows))
