import os
from dataclasses import replace

import numpy as np
import pytest

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.encode import encode_prompts, encode_sft
from raytune_rl.data.example import Example, Message, RowError
from raytune_rl.data.parallel import map_chunks
from raytune_rl.errors import ConfigError, DataError, ModelError

SYSTEM = Message("system", "Be kind.")
USER_1, BOT_1 = (
    Message("user", "Good morning, how are you?"),
    Message("assistant", "Fine, thank you. Grüße 今天!"),
)
USER_2, BOT_2 = Message("user", "What is the answer?"), Message("assistant", "The answer is 42.")


def example(*messages, line=1, **extra):
    return Example(messages, extra=extra, source="data.jsonl", line=line)


def trained_text(tokenizer, encoded, row=0):
    """The trained tokens, decoded span by span."""
    tokens, mask = encoded.tokens[row], encoded.loss_mask[row]
    borders = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [tokenizer.decode(tokens[a:b]) for a, b in zip(borders[::2], borders[1::2], strict=True)]


def whole(tokenizer, messages):
    text = tokenizer.apply_chat_template([m.for_template() for m in messages], tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_exactly_the_answers_and_their_end_marks_are_trained_on_in_chatml(chatml):
    turns = (SYSTEM, USER_1, BOT_1, USER_2, BOT_2)
    encoded = encode_sft([example(*turns)], chatml)
    assert trained_text(chatml, encoded) == [BOT_1.content + "<|im_end|>", BOT_2.content + "<|im_end|>"]
    assert encoded.tokens[0].tolist() == whole(chatml, turns)
    assert encoded.tokens.values.dtype == np.int32
    assert encoded.loss_mask.values.dtype == np.bool_
    assert encoded.tokens.offsets.tolist() == encoded.loss_mask.offsets.tolist()


def test_exactly_the_answers_and_their_end_marks_are_trained_on_in_llama3(llama3):
    turns = (SYSTEM, USER_1, BOT_1, USER_2, BOT_2)
    encoded = encode_sft([example(*turns)], llama3)
    assert trained_text(llama3, encoded) == [BOT_1.content + "<|eot_id|>", BOT_2.content + "<|eot_id|>"]
    assert encoded.tokens[0].tolist() == whole(llama3, turns)


def test_a_template_without_marks_trains_on_the_answers_alone(new_tokenizer):
    template = (
        "{% for m in messages %}{{ 'Question:' if m.role == 'user' else 'Answer:' }}\n"
        "{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}Answer:\n{% endif %}"
    )
    tokenizer = new_tokenizer([], template)
    encoded = encode_sft([example(USER_1, BOT_1, USER_2, BOT_2)], tokenizer)
    assert trained_text(tokenizer, encoded) == [BOT_1.content, BOT_2.content]


def test_an_answer_that_merges_with_the_generation_prompt_is_an_error_not_a_guess(new_tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    rows = [example(USER_1, BOT_1, line=3), example(USER_1, Message("assistant", "<hi>"))]
    tokenizer = new_tokenizer([], template)
    with pytest.raises(RowError, match=r"data.jsonl:3: the tokenizer merges the beginning"):
        encode_sft(rows, tokenizer)
    encoded = encode_sft(rows, tokenizer, strict=False)
    assert [drop.line for drop in encoded.dropped] == [3]
    assert trained_text(tokenizer, encoded) == ["<hi>"]


def test_last_round_trains_on_what_follows_the_last_user_turn(chatml):
    encoded = encode_sft([example(USER_1, BOT_1, USER_2, BOT_2)], chatml, loss_scale="last_round")
    assert trained_text(chatml, encoded) == [BOT_2.content + "<|im_end|>"]


def test_all_trains_on_every_token_but_the_first(chatml):
    encoded = encode_sft([example(USER_1, BOT_1)], chatml, loss_scale="all")
    assert not encoded.loss_mask[0][0]
    assert encoded.loss_mask[0][1:].all()


def test_a_message_decides_for_itself(chatml):
    silent = Message("assistant", BOT_1.content, loss=False)
    encoded = encode_sft([example(USER_1, silent, USER_2, BOT_2)], chatml)
    assert trained_text(chatml, encoded) == [BOT_2.content + "<|im_end|>"]
    loud = Message("assistant", BOT_1.content, loss=True)
    encoded = encode_sft([example(USER_1, loud, USER_2, BOT_2)], chatml, loss_scale="last_round")
    assert len(trained_text(chatml, encoded)) == 2


def test_an_answer_that_repeats_the_question_or_ends_in_blanks(chatml):
    echo = Message("assistant", USER_1.content)
    assert trained_text(chatml, encode_sft([example(USER_1, echo)], chatml)) == [
        USER_1.content + "<|im_end|>"
    ]
    blank = Message("assistant", "Yes. \n")
    assert trained_text(chatml, encode_sft([example(USER_1, blank)], chatml)) == ["Yes. \n<|im_end|>"]


def test_a_template_that_rewrites_history_is_refused_unless_only_the_last_round_counts(forgetful):
    thinking = Message("assistant", "<think>hm</think>Fine.")
    row = example(USER_1, thinking, USER_2, BOT_2, line=7)
    with pytest.raises(RowError, match=r"data.jsonl:7: .*last_round"):
        encode_sft([row], forgetful)
    encoded = encode_sft([row], forgetful, loss_scale="last_round")
    assert trained_text(forgetful, encoded) == [BOT_2.content + "<|im_end|>"]
    encoded = encode_sft([row, example(USER_1, thinking)], forgetful, strict=False)
    assert encoded.index.tolist() == [1]
    assert [(drop.source, drop.line) for drop in encoded.dropped] == [("data.jsonl", 7)]
    assert trained_text(forgetful, encoded) == ["<think>hm</think>Fine.<|im_end|>"]


def test_the_thought_that_qwen3_writes_is_trained_on_with_the_answer(qwen3):
    thinking = Message("assistant", "<think>\nhm\n</think>\n\nFine.")
    alone = encode_sft([example(USER_1, BOT_1), example(USER_1, thinking)], qwen3)
    assert trained_text(qwen3, alone, 0) == [f"<think>\n\n</think>\n\n{BOT_1.content}<|im_end|>"]
    assert trained_text(qwen3, alone, 1) == ["<think>\nhm\n</think>\n\nFine.<|im_end|>"]
    row = example(USER_1, thinking, USER_2, BOT_2, line=7)
    with pytest.raises(RowError, match=r"data.jsonl:7: .*write turn 1 as .*--loss_scale last_round"):
        encode_sft([row], qwen3)
    last = encode_sft([row], qwen3, loss_scale="last_round")
    assert trained_text(qwen3, last) == [f"<think>\n\n</think>\n\n{BOT_2.content}<|im_end|>"]
    text = qwen3.decode(last.tokens[0])
    assert "hm" not in text
    assert "Fine.<|im_end|>" in text, "what came before is seen, not learned"


def test_earlier_answers_are_trained_on_as_qwen3_writes_the_past(qwen3):
    """Without thoughts in the row nothing is lost, though the last answer alone gets an empty one."""
    several = encode_sft([example(USER_1, BOT_1, USER_2, BOT_2)], qwen3)
    assert trained_text(qwen3, several) == [
        BOT_1.content + "<|im_end|>",
        f"<think>\n\n</think>\n\n{BOT_2.content}<|im_end|>",
    ]
    echo = Message("assistant", USER_1.content)
    found = encode_sft([example(USER_1, echo, USER_1, echo, USER_2, BOT_2)], qwen3)
    assert trained_text(qwen3, found)[:2] == [USER_1.content + "<|im_end|>"] * 2
    called = Message("assistant", "Let me see.\n")
    used = encode_sft([example(USER_1, called, Message("tool", "42"), BOT_1)], qwen3)
    assert trained_text(qwen3, used)[0] == "Let me see.\n<|im_end|>"


def test_half_a_character_is_an_error_of_its_row(chatml):
    rows = [example(USER_1, BOT_1), example(Message("user", "\ud800"), BOT_1, line=9)]
    with pytest.raises(RowError, match=r"data.jsonl:9: the text holds '\\ud800', half of a character"):
        encode_sft(rows, chatml)
    assert encode_sft(rows, chatml, strict=False).index.tolist() == [0]


def test_a_tokenizer_without_offsets_gives_the_same_mask(chatml, llama3):
    class WithoutOffsets:
        def __init__(self, inner):
            self.inner = inner
            self.is_fast = False

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, texts, *, return_offsets_mapping=False, **kwargs):
            assert not return_offsets_mapping
            return self.inner(texts, **kwargs)

    row = example(SYSTEM, USER_1, BOT_1, USER_2, BOT_2)
    for tokenizer in (chatml, llama3):
        fast, slow = (encode_sft([row], t) for t in (tokenizer, WithoutOffsets(tokenizer)))
        assert fast.tokens[0].tolist() == slow.tokens[0].tolist()
        assert fast.loss_mask[0].tolist() == slow.loss_mask[0].tolist()


def test_tool_calls_are_trained_on_and_tool_answers_are_not(new_chatml):
    template = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}CALL {{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = new_chatml(template)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    turns = (USER_1, Message("assistant", "", tool_calls=(call,)), Message("tool", "sunny"), BOT_2)
    row = Example(turns, tools=({"type": "function", "function": {"name": "weather"}},), source="x", line=1)
    first, second = trained_text(tokenizer, encode_sft([row], tokenizer))
    assert first == 'CALL {"name": "weather", "arguments": {"city": "Paris"}}<|im_end|>'
    assert second == BOT_2.content + "<|im_end|>"


@pytest.mark.parametrize(("strategy", "part"), [("left", slice(-20, None)), ("right", slice(0, 20))])
def test_truncation_keeps_one_end(chatml, strategy, part):
    turns = (USER_1, BOT_1, USER_2, BOT_2)
    full = encode_sft([example(*turns)], chatml)
    encoded = encode_sft([example(*turns)], chatml, 20, strategy, "all")
    assert encoded.tokens[0].tolist() == full.tokens[0][part].tolist()
    assert encoded.notices == (f"1 rows were over --max_length 20 and lost their {strategy} end",)
    assert full.notices == ()
    assert not encoded.loss_mask[0][0]


def test_delete_drops_long_rows_and_names_them(chatml):
    rows = [example(USER_1, BOT_1, line=1), example(USER_2, Message("assistant", "word " * 99), line=2)]
    encoded = encode_sft(rows, chatml, 100, "delete")
    assert encoded.index.tolist() == [0]
    assert [(drop.line, drop.reason) for drop in encoded.dropped] == [(2, "longer than max_length 100")]
    assert encoded.reasons == {"longer than max_length 100": 1}
    with pytest.raises(RowError, match=r"data.jsonl:2: longer than max_length 100"):
        encode_sft(rows, chatml, 100, "error", strict=False)
    with pytest.raises(DataError, match="none of 1 rows"):
        encode_sft(rows[1:], chatml, 100, "delete")


def test_truncation_that_leaves_nothing_to_learn_drops_the_row(chatml):
    rows = [example(USER_2, BOT_2), example(Message("user", "word " * 50), BOT_2)]
    encoded = encode_sft(rows, chatml, 40, "right")
    assert encoded.index.tolist() == [0]
    assert encoded.reasons == {"nothing to train on is left within max_length 40": 1}


def test_prompts_end_with_the_generation_prompt_and_carry_the_other_columns(chatml):
    rows = [example(SYSTEM, USER_1, solution="1"), example(USER_2, level=3)]
    encoded = encode_prompts(rows, chatml)
    assert chatml.decode(encoded.prompts[0]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nGood morning, how are you?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert encoded.prompts.values.dtype == np.int32
    assert encoded.extra == {"solution": ["1", None], "level": [None, 3]}
    assert encoded.index.tolist() == [0, 1]


def test_long_prompts(chatml):
    rows = [example(USER_1, n=0), example(Message("user", "word " * 99), n=1), example(USER_2, n=2)]
    left = encode_prompts(rows, chatml, 30, "left")
    assert left.prompts.lengths.max() == 30
    assert chatml.decode(left.prompts[1]).endswith("word <|im_end|>\n<|im_start|>assistant\n")
    deleted = encode_prompts(rows, chatml, 30, "delete")
    assert deleted.index.tolist() == [0, 2]
    assert deleted.extra == {"n": [0, 2]}
    with pytest.raises(ConfigError, match="right"):
        encode_prompts(rows, chatml, 30, "right")


def test_a_base_tokenizer_with_chatml_tokens_gets_chatml_and_says_so(chatml, new_chatml):
    base = new_chatml(template=None)
    encoded = encode_prompts([example(USER_1)], base)
    assert encoded.prompts[0].tolist() == encode_prompts([example(USER_1)], chatml).prompts[0].tolist()
    assert "plain ChatML" in encoded.notices[0]
    assert base.chat_template is None


def test_a_tokenizer_without_template_and_chatml_tokens_is_refused(new_tokenizer):
    with pytest.raises(ModelError, match="no chat template"):
        encode_prompts([example(USER_1)], new_tokenizer(["<eos>"], None))


def test_generation_stops_at_the_end_of_a_turn_also_for_base_models(new_chatml, llama3):
    assert ChatTemplate.of(llama3).stop_token_ids() == (llama3.convert_tokens_to_ids("<|eot_id|>"),)
    base = new_chatml(template=None)
    base.eos_token = "<|endoftext|>"
    ids = base.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert ChatTemplate.of(base).stop_token_ids() == tuple(ids)


def test_what_the_template_refuses_is_named(new_chatml):
    strict_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match=r"data.jsonl:5: .*roles must alternate"):
        encode_prompts([example(USER_1, line=5)], new_chatml(strict_template))


def test_images_need_a_processor(chatml):
    row = Example((Message("user", "<image>"),), images=("a.png",), source="x", line=2)
    with pytest.raises(RowError, match=r"x:2: .*takes texts only"):
        encode_prompts([row], chatml)


def _lengths(shared, chunk):
    return [shared + len(item) for item in chunk]


def test_processes_return_results_in_order():
    items = ["x" * (i % 7) for i in range(2000)]
    done = []
    result = map_chunks(_lengths, 10, items, num_proc=2, alone_s=0, progress=done.append)
    assert list(result) == [10 + i % 7 for i in range(2000)]
    assert sum(done) == 2000


def _who(shared, chunk):
    return [os.getpid() for _ in chunk]


def test_processes_are_started_once_one_has_worked_for_a_while():
    assert set(map_chunks(_who, None, range(2000), num_proc=2)) == {os.getpid()}
    others = set(map_chunks(_who, None, range(2000), num_proc=2, alone_s=0))
    assert os.getpid() not in others
    first, *_, last = map_chunks(_who, None, range(2000), num_proc=2, alone_s=1e-9)
    assert (first == os.getpid(), last == os.getpid()) == (True, False)


def test_encoding_does_not_depend_on_the_number_of_processes(chatml, monkeypatch):
    monkeypatch.setattr("raytune_rl.data.parallel.ALONE_S", 0)
    rows = [
        example(Message("user", f"question {i}"), Message("assistant", f"answer {i}")) for i in range(1100)
    ]
    one, two = encode_sft(rows, chatml), encode_sft(rows, chatml, num_proc=2)
    assert one.tokens.values.tolist() == two.tokens.values.tolist()
    assert one.loss_mask.values.tolist() == two.loss_mask.values.tolist()


def test_a_rows_own_arguments_reach_its_template(qwen3):
    asked = [example(USER_1), replace(example(USER_1), template_kwargs={"enable_thinking": False})]
    found = encode_prompts(asked, qwen3)
    plain, silent = (qwen3.decode(found.prompts[row]) for row in range(2))
    assert silent == f"{plain}<think>\n\n</think>\n\n"
    mute = replace(example(USER_1, BOT_1), template_kwargs={"enable_thinking": False})
    trained = trained_text(qwen3, encode_sft([mute], qwen3))
    assert trained == [f"{BOT_1.content}<|im_end|>"], "the empty thought is given, not learned"
