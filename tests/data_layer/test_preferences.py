"""Preference rows: every shape they come in, what is wrong with a row, and their tokens."""

import numpy as np
import pytest

from raytune_rl.data.common_prefix import common_prefix
from raytune_rl.data.encode_preferences import encode_labelled, encode_pairs
from raytune_rl.data.example import Row, RowError
from raytune_rl.data.formats import Converter
from raytune_rl.errors import DataError
from raytune_rl.protocol.data import SHARED

USER = {"role": "user", "content": "Sum?"}
GOOD, BAD = {"role": "assistant", "content": "42."}, {"role": "assistant", "content": "It is calm today."}


def convert(fields, task="pairs", line=3, **kwargs):
    return Converter(task, **kwargs)(Row(fields, "d.jsonl", line))


def said(messages):
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, GOOD], "rejected_response": BAD["content"]},
        {"messages": [USER, GOOD], "rejected_response": [BAD]},
        {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"query": "Sum?", "response": "42.", "rejected_response": BAD["content"]},
        {"instruction": "Sum?", "input": "", "output": "42.", "rejected_response": BAD["content"]},
        {"conversations": [{"from": "human", "value": "Sum?"}, {"from": "gpt", "value": "42."}],
         "rejected": [{"from": "gpt", "value": BAD["content"]}]},
        {"prompt": "Sum?", "chosen": "42.", "rejected": BAD["content"]},
        {"prompt": "Sum?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)  # fmt: skip
def test_every_shape_of_a_pair_says_the_same(fields):
    example = convert(fields, system="Be calm.")
    prompt = [("system", "Be calm."), ("user", "Sum?")]
    assert said(example.messages) == [*prompt, ("assistant", "42.")]
    assert said(example.rejected) == [*prompt, ("assistant", BAD["content"])]
    assert example.extra == {}


def test_the_rejected_answer_replaces_what_follows_the_last_user_turn():
    turns = [USER, GOOD, {"role": "user", "content": "And today?"}, GOOD]
    example = convert({"messages": turns, "rejected_response": "x"})
    assert said(example.rejected) == [*said(example.messages)[:-1], ("assistant", "x")]


PAIR = {"messages": [USER, GOOD]}
WRONG = [
    (PAIR, "there is no rejected answer"),
    ({**PAIR, "rejected_response": None}, "there is no rejected answer"),
    ({**PAIR, "rejected_response": "42."}, "the rejected answer is the same as the chosen one"),
    ({**PAIR, "rejected_response": ""}, "does not end with an answer"),
    ({**PAIR, "rejected_messages": [USER]}, "does not end with an answer"),
    ({**PAIR, "rejected_messages": [{**USER, "content": "Why?"}, BAD]}, "has another prompt"),
    ({**PAIR, "rejected_response": "a", "rejected": "b"}, "say the same thing"),
    ({**PAIR, "rejected_response": "a", "rejected_images": ["a.png"]}, "both answers must be about the same"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "there is no 'prompt' column"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_is_wrong_with_a_pair_is_told_with_its_place(fields, message):
    with pytest.raises(RowError, match=message) as wrong:
        convert(fields)
    assert str(wrong.value).startswith("d.jsonl:3: ")


@pytest.mark.parametrize(
    ("value", "label"), [(True, True), (0, False), ("True", True), ("false", False), (1.0, True)]
)
def test_labels(value, label):
    assert convert({**PAIR, "label": value}, "labels").label is label


def test_a_row_without_a_label_is_bad():
    with pytest.raises(RowError, match="there is no 'label' column"):
        convert(PAIR, "labels")
    with pytest.raises(RowError, match="'label' is 'maybe'"):
        convert({**PAIR, "label": "maybe"}, "labels")


def pair(chosen, rejected, question="Sum?"):
    return convert({"query": question, "response": chosen, "rejected_response": rejected})


def text(tokenizer, tokens, mask):
    return tokenizer.decode(tokens[mask])


def test_sides_of_a_pair_are_neighbours_and_share_the_prompt(chatml):
    found = encode_pairs([pair("42.", "It is calm."), pair("Fine.", "Good morning.")], chatml)
    assert len(found.tokens) == 4
    answers = [text(chatml, found.tokens[i], found.loss_mask[i]) for i in range(4)]
    assert answers == ["42.<|im_end|>", "It is calm.<|im_end|>", "Fine.<|im_end|>", "Good morning.<|im_end|>"]
    for k in (0, 2):
        start = int(found.loss_mask[k].argmax())
        assert start == int(found.loss_mask[k + 1].argmax())
        np.testing.assert_array_equal(found.tokens[k][:start], found.tokens[k + 1][:start])


def test_only_the_last_round_is_an_answer(chatml):
    turns = [USER, GOOD, {"role": "user", "content": "And today?"}, BAD]
    example = convert({"messages": turns, "rejected_response": "Fine."})
    last = encode_pairs([example], chatml)
    assert text(chatml, last.tokens[0], last.loss_mask[0]) == "It is calm today.<|im_end|>"
    every = encode_pairs([example], chatml, loss_scale="default")
    assert text(chatml, every.tokens[1], every.loss_mask[1]) == "42.<|im_end|>Fine.<|im_end|>"


def test_a_pair_that_is_too_long_is_dropped_once_and_whole(chatml):
    examples = [pair("42.", "It is calm today. " * 9), pair("42.", "Fine."), pair("Fine. " * 9, "Fine. " * 8)]
    found = encode_pairs(examples, chatml, max_length=30)
    assert found.index.tolist() == [1]
    assert len(found.tokens) == 2
    assert found.reasons == {"longer than max_length 30": 2}


def test_truncation_keeps_one_prompt(chatml):
    long = pair("42.", "It is calm today. It is sunny.", question="What is the weather like today? Sum?")
    whole = encode_pairs([long], chatml)
    limit = int(whole.tokens.lengths.max()) - 4
    left = encode_pairs([long], chatml, limit, "left")
    for side in (0, 1):
        np.testing.assert_array_equal(left.tokens[side], whole.tokens[side][4:])
        np.testing.assert_array_equal(left.loss_mask[side], whole.loss_mask[side][4:])
    right = encode_pairs([long], chatml, limit, "right")
    np.testing.assert_array_equal(right.tokens[0], whole.tokens[0][:limit])
    np.testing.assert_array_equal(right.tokens[1], whole.tokens[1][:limit])
    with pytest.raises(DataError, match=r"none of 1 pairs.*d.jsonl:3: an answer alone is longer"):
        encode_pairs([long], chatml, 5, "left")
    with pytest.raises(DataError, match="nothing of an answer is left"):
        encode_pairs([long], chatml, 5, "right")


def test_margins_travel_with_both_sides(chatml):
    graded = convert({"query": "Sum?", "response": "a", "rejected_response": "b", "margin": 2})
    found = encode_pairs([graded, pair("c", "d")], chatml)
    assert found.values["margin"].tolist() == [2, 2, 0, 0]
    assert encode_pairs([pair("c", "d")], chatml).values.keys() == {SHARED}


def test_what_both_rows_of_a_unit_begin_with_is_counted(chatml):
    pairs = encode_pairs([pair("c c", "d"), pair("c c", "c d")], chatml)
    for unit in (0, 2):
        both = [pairs.tokens[unit], pairs.tokens[unit + 1]]
        shared = int(pairs.values[SHARED][unit])
        assert pairs.values[SHARED][unit + 1] == shared == common_prefix(both)
        assert (both[0][:shared] == both[1][:shared]).all()
        assert both[0][shared] != both[1][shared]
        assert shared >= int(pairs.loss_mask[unit].argmax())


def labelled(question, answer, label):
    return convert({"query": question, "response": answer, "label": label}, "labels")


def test_labelled_rows_have_an_answer_of_another_prompt_beside_them(chatml):
    examples = [labelled("A?", "one", True), labelled("B?", "two", False), labelled("B?", "three", True)]
    found = encode_labelled(examples, chatml)
    answers = [text(chatml, found.tokens[i], found.loss_mask[i])[:-10] for i in range(6)]
    assert answers == ["one", "three", "two", "one", "three", "one"]
    assert found.values["label"].tolist() == [1, 1, 0, 0, 1, 1]
    for row in (0, 2, 4):
        start = int(found.loss_mask[row].argmax())
        np.testing.assert_array_equal(found.tokens[row][:start], found.tokens[row + 1][:start])


def test_mismatched_rows_keep_to_the_limit(chatml):
    examples = [
        labelled("What is the weather like today, and the wind?", "one", True),
        labelled("B?", "two " * 12, False),
    ]
    limit = int(encode_labelled(examples, chatml).tokens.lengths[[0, 2]].max())
    found = encode_labelled(examples, chatml, limit)
    assert found.tokens.lengths.max() <= limit
    assert all(found.loss_mask[row].any() for row in range(4))


def test_one_prompt_alone_cannot_be_compared(chatml):
    with pytest.raises(DataError, match="at least two different prompts"):
        encode_labelled([labelled("A?", "one", True), labelled("A?", "two", False)], chatml)
