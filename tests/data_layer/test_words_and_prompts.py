"""Tags that are words, system prompts that are empty, columns that change places."""

import json

import pytest

from raytune_rl.data.encode import encode_sft
from raytune_rl.data.example import Row, RowError
from raytune_rl.data.formats import Converter
from raytune_rl.data.load import load_examples


def convert(fields, task="sft", **kwargs):
    return Converter(task, **kwargs)(Row(fields, "d.jsonl", 3))


def turns(example):
    return [(message.role, message.content) for message in example.messages]


HTML = "What does the <video> tag do?"


@pytest.mark.parametrize("task", ["sft", "grpo", "infer"])
@pytest.mark.parametrize(
    "fields",
    [
        {"query": HTML, "response": "It plays, as <audio> does."},
        {"messages": [{"role": "user", "content": HTML}, {"role": "assistant", "content": "<image>"}]},
        {"instruction": HTML, "input": "", "output": "x", "images": [], "videos": None},
    ],
)
def test_tags_are_words_in_a_row_without_media(fields, task):
    assert turns(convert(fields, task))[0] == ("user", HTML)


def test_a_tag_that_is_read_as_a_word_is_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"query": HTML, "response": "x"}) + "\n" + '{"query": "q", "response": "a"}\n')
    (notice,) = load_examples([str(path)], task="sft", strict=True).report.notices
    assert notice == "1 rows have <video> in their text but no videos: there it is text"


def test_the_number_of_media_that_a_row_has_is_still_checked():
    with pytest.raises(RowError, match="1 images but 2 <image> tags"):
        convert({"query": "<image> or <image>?", "response": "x", "images": ["a.png"]})
    example = convert({"query": "<image>: is it a <video>?", "response": "x", "images": ["a.png"]})
    assert example.images == ("a.png",)


def test_words_are_trained_on_as_they_stand(chatml):
    encoded = encode_sft([convert({"query": HTML, "response": "<image>, <audio>"})], chatml)
    text = chatml.decode([t for t, kept in zip(encoded.tokens[0], encoded.loss_mask[0], strict=True) if kept])
    assert text == "<image>, <audio><|im_end|>"


EMPTY = [
    {"system": "", "query": "q", "response": "a"},
    {"system": " \n", "instruction": "q", "input": "", "output": "a"},
    {
        "system_prompt": "",
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    },
    {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": None},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
    },
    {
        "system": "",
        "conversations": [
            {"from": "system", "value": ""},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ],
    },
]


@pytest.mark.parametrize("fields", EMPTY)
def test_an_empty_system_prompt_is_none(fields):
    assert turns(convert(fields)) == [("user", "q"), ("assistant", "a")]
    assert turns(convert(fields, "grpo", system="S")) == [("system", "S"), ("user", "q")]
    pair = convert({**fields, "rejected_response": "b"}, "pairs", system="S")
    assert [m.role for m in pair.rejected] == ["system", "user", "assistant"]
    assert turns(convert(fields, system=""))[0] == ("user", "q")


def test_an_empty_prompt_in_one_place_leaves_the_one_in_the_other():
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    empty, own = ({"role": "system", "content": text} for text in ("", "own"))
    assert turns(convert({"system": "", "messages": [own, *chat]}))[0] == ("system", "own")
    assert turns(convert({"system": "own", "messages": [empty, *chat]}))[:2] == [
        ("system", "own"),
        ("user", "q"),
    ]
    with pytest.raises(RowError, match="no turn but an empty system prompt"):
        convert({"messages": [empty]})


def test_a_csv_field_without_a_prompt_takes_the_flags(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("system,query,response\n,q,a\nown,q,a\n")
    loaded = load_examples([str(path)], task="sft", system="S", strict=True, shuffle=False)
    assert [turns(e)[0] for e in loaded.examples] == [("system", "S"), ("system", "own")]


@pytest.mark.parametrize(
    ("columns", "answer", "solution"),
    [
        ({"answer": "solution", "solution": "answer"}, "long", "42"),
        ({"answer": "solution", "solution": "response"}, "long", "42"),
        ({"solution": "response", "Answer": "solution"}, "long", "42"),
        ({"answer": "solution", "solution": "worked"}, "42", "42"),
    ],
)
def test_columns_change_places(columns, answer, solution):
    """DeepScaleR's idiom: the short answer is what the accuracy reward is to compare with."""
    fields = {"problem": "p", "answer": "42", "solution": "long"}
    if "Answer" in columns:
        fields["Answer"] = fields.pop("answer")
    example = convert(fields, "grpo", columns=columns)
    assert example.extra["solution"] == solution
    if "answer" not in columns or columns["solution"] == "response":
        assert turns(convert(fields, columns=columns))[-1] == ("assistant", answer)


def test_two_sides_of_a_pair_change_places():
    fields = {"query": "q", "chosen": "c", "rejected": "r"}
    example = convert(fields, "pairs", columns={"chosen": "rejected", "rejected": "chosen"})
    assert (example.messages[-1].content, example.rejected[-1].content) == ("r", "c")
    swapped = convert({"query": "a", "response": "q"}, columns={"query": "response", "response": "query"})
    assert turns(swapped) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    "columns", [{"a": "truth"}, {"a": "x", "b": "x"}, {"a": "solution", "solution": "response"}]
)
def test_a_name_that_two_columns_would_have_is_refused(columns):
    fields = {"query": "q", "a": "1", "b": "2", "truth": "3", "solution": "4", "response": "5"}
    with pytest.raises(RowError, match=r"has a '(truth|response)' already|two columns to 'x'"):
        convert(fields, "grpo", columns=columns)
