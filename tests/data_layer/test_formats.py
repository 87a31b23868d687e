import pytest

from raytune_rl.data.example import Message, Row, RowError
from raytune_rl.data.formats import Converter
from raytune_rl.data.media_tags import in_order


def convert(fields, task="sft", **kwargs):
    return Converter(task, **kwargs)(Row(fields, "d.jsonl", 3))


def turns(example):
    return [(message.role, message.content) for message in example.messages]


CHAT = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": role, "content": content} for role, content in CHAT]},
        {"system": "s", "Messages": [{"role": role, "content": content} for role, content in CHAT[1:]]},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q1"},
                {"from": "gpt", "value": "a1"},
                {"from": "user", "value": "q2"},
                {"from": "bot", "value": "a2"},
            ]
        },
        {
            "system": "s",
            "conversation": [{"human": "q1", "assistant": "a1"}, {"human": "q2", "assistant": "a2"}],
        },
        {"system": "s", "conversations": [{"user": "q1", "gpt": "a1"}, {"human": "q2", "bot": "a2"}]},
        {"messages": str([{"role": role, "content": content} for role, content in CHAT])},
        {"messages": [{"role": role, "content": content, "loss": None} for role, content in CHAT]},
        {"system_prompt": "s", "query": "q2", "response": "a2", "history": [["q1", "a1"]]},
        {"system": "s", "Question": "q2", "Answer": "a2", "history": "[['q1', 'a1']]"},
        {"system": "s", "instruction": "q2", "input": "", "output": "a2", "history": [["q1", "a1"]]},
    ],
    ids=[
        "role",
        "role+system",
        "sharegpt",
        "pairs",
        "pairs-mixed",
        "text",
        "null-keys",
        "query",
        "cased",
        "alpaca",
    ],
)
def test_every_dialect_says_the_same(fields):
    example = convert(fields)
    assert turns(example) == CHAT
    assert example.extra == {}
    assert (example.source, example.line) == ("d.jsonl", 3)


def test_anthropic_content_lists():
    fields = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}]},
            {"role": "assistant", "content": "Sunny. And this?"},
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"},
                    },
                    {"type": "text", "text": "Say it."},
                ],
            },
            {"role": "assistant", "content": "A square."},
        ]
    }
    example = convert(fields)
    assert turns(example) == [
        ("user", "Weather?"), ("assistant", "I look."), ("tool", "sunny"), ("assistant", "Sunny. And this?"),
        ("user", "<image>Say it."), ("assistant", "A square."),
    ]  # fmt: skip
    (call,) = example.messages[1].tool_calls
    assert call == {
        "id": "t1",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Paris"}},
    }
    assert example.messages[2].other == {"tool_call_id": "t1"}
    assert example.images == ("data:image/png;base64,QUJD",)


def test_tool_calls_that_are_no_list_and_columns_without_a_value_are_named():
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": 5}]
    with pytest.raises(RowError, match=r"'messages'\[1\]: 'tool_calls' is 5; it is a list"):
        convert({"messages": said})
    with pytest.raises(RowError, match=r"'query', 'response' \('query' without a value\): there is no"):
        convert({"query": None, "response": "a"})


def test_a_turn_may_say_by_loss_scale_whether_it_is_learned():
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss_scale": 0.0}]
    assert convert({"messages": said}).messages[1].loss is False
    said[1]["loss_scale"] = 0.5
    with pytest.raises(RowError, match=r"'loss_scale' of a turn is 0\.5; it is 0 or 1"):
        convert({"messages": said})


def test_images_between_img_tags_are_images():
    converter = Converter("sft")
    fields = {"query": "<img>a.png</img>What? <img>\nb.png</img>", "response": "x"}
    example = converter(Row(fields, "d.jsonl", 1))
    assert turns(example)[0] == ("user", "<image>What? <image>")
    assert example.images == ("a.png", "b.png")
    assert list(converter.notices) == ["rows name images between <img> and </img>; each is read as an image"]
    with pytest.raises(RowError, match="both in <img> tags and beside"):
        convert({**fields, "images": ["c.png"]})


def test_placeholders_that_nothing_fills_in_are_refused():
    fields = {
        "query": "Find <ref-object>",
        "response": "<bbox>",
        "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]},
    }
    with pytest.raises(RowError, match="<ref-object> is not filled in"):
        convert(fields)
    assert convert({**fields, "objects": None}).messages[1].content == "<bbox>"


@pytest.mark.parametrize("missing", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_no_text(missing):
    with pytest.raises(RowError, match="column 'response' holds"):
        convert({"query": "q", "response": missing})
    assert turns(convert({"query": "1+1?", "response": 2}))[1] == ("assistant", "2")


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Add. 1 2 3"}
    example = convert(row)
    assert turns(example) == [("user", "Add.\n1 2"), ("assistant", "3")]
    assert example.extra == {"text": "Add. 1 2 3"}
    assert turns(convert(row, "grpo")) == [("user", "Add.\n1 2")]
    assert convert(row, "grpo").extra == {"output": "3", "text": "Add. 1 2 3"}


def test_grpo_takes_the_last_answer_off_and_keeps_every_other_column():
    fields = {
        "problem": "1+1?",
        "solution": "2",
        "level": 3,
        "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}],
    }
    example = convert(fields, "grpo")
    assert turns(example) == [("user", "1+1?")]
    assert example.extra == {"problem": "1+1?", "solution": "2", "level": 3}


def test_grpo_keeps_a_conversation_that_ends_with_the_user():
    fields = {"messages": [{"role": role, "content": content} for role, content in CHAT[:4]]}
    assert turns(convert(fields, "grpo")) == CHAT[:4]


def test_grpo_keeps_answer_columns_for_the_rewards():
    fields = {"image": "a.png", "problem": "<image>What?", "solution": "x", "original_answer": "y"}
    example = convert(fields, "grpo")
    assert turns(example) == [("user", "<image>What?")]
    assert example.images == ("a.png",)
    assert example.extra == {"solution": "x", "original_answer": "y"}
    # Several answers are no ambiguity when none of them is read.
    assert convert({"question": "q", "answer": "a", "solution": "s"}, "grpo").extra == {
        "answer": "a",
        "solution": "s",
    }


def test_solution_survives_being_the_response():
    example = convert({"problem": "p", "solution": "s"})
    assert turns(example) == [("user", "p"), ("assistant", "s")]
    assert example.extra == {"solution": "s"}
    assert convert({"problem": "p", "answer": "s"}).extra == {}


def test_two_columns_for_one_part_are_an_error_that_names_them():
    with pytest.raises(RowError, match=r"d.jsonl:3: 'question' and 'problem' could each be the query"):
        convert({"question": "a", "problem": "b", "answer": "c"})
    with pytest.raises(RowError, match=r"'answer' and 'solution' could each be the response"):
        convert({"question": "a", "answer": "c", "solution": "d"})
    with pytest.raises(RowError, match=r"'Query' and 'query' could each be the query"):
        convert({"Query": "a", "query": "b", "answer": "c"})
    with pytest.raises(RowError, match=r"'messages' and 'conversations' could each be the messages"):
        convert({"messages": [], "conversations": []})


def test_a_column_without_a_value_is_no_candidate():
    example = convert({"question": "a", "problem": None, "answer": "c", "images": None})
    assert turns(example) == [("user", "a"), ("assistant", "c")]
    assert example.extra == {"problem": None}


def test_explicit_columns_win():
    fields = {"question": "a", "problem": "b", "answer": "c", "solution": "d"}
    example = convert(fields, columns={"problem": "query", "Answer": "response"})
    assert turns(example) == [("user", "b"), ("assistant", "c")]
    assert example.extra == {"question": "a", "solution": "d"}


def test_columns_may_rename_for_a_reward():
    example = convert({"question": "a", "final": "c"}, "grpo", columns={"final": "truth"})
    assert example.extra == {"truth": "c"}
    with pytest.raises(RowError, match="already"):
        convert({"question": "a", "final": "c", "truth": "d"}, "grpo", columns={"final": "truth"})


def test_explicit_query_goes_before_a_messages_column():
    fields = {"problem": "p", "messages": [{"role": "user", "content": "other"}], "solution": "s"}
    assert turns(convert(fields, "grpo", columns={"problem": "query"})) == [("user", "p")]


def test_columns_that_no_row_has_are_reported():
    converter = Converter("grpo", columns={"Question": "query", "sol": "solution"})
    converter(Row({"question": "a"}, "x", 1))
    assert converter.unseen_columns() == ["sol"]


def test_row_system_goes_before_the_flag():
    with_own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]}
    assert turns(convert(with_own, "grpo", system="flag"))[0] == ("system", "own")
    assert turns(convert({"query": "q", "system": "own"}, "grpo", system="flag"))[0] == ("system", "own")
    assert turns(convert({"query": "q"}, "grpo", system="flag"))[0] == ("system", "flag")


def test_a_text_is_a_prompt_or_is_learned_as_it_stands():
    assert turns(convert({"text": "Hello"}, "grpo")) == [("user", "Hello")]
    learned = convert({"text": "Hello", "url": "x"}, system="s")
    assert (turns(learned), learned.plain, learned.extra) == ([("assistant", "Hello")], True, {"url": "x"})
    for task in ("pairs", "labels"):
        with pytest.raises(RowError, match="no format fits the columns 'text'"):
            convert({"text": "Hello"}, task)


@pytest.mark.parametrize(
    ("task", "fields", "reason"),
    [
        ("sft", {"messages": [{"role": "user", "content": "q"}]}, "the last turn is by user"),
        ("sft", {"query": "q"}, "no response column"),
        ("sft", {"query": "q", "response": ""}, "last assistant turn is empty"),
        ("sft", {"query": "", "response": "a"}, "'query' is empty"),
        ("sft", {"query": ["q"], "response": "a"}, "column 'query' holds list"),
        (
            "sft",
            {"instruction": "", "input": None, "output": "a"},
            "both 'instruction' and 'input' are empty",
        ),
        ("sft", {"something": "q"}, "no format fits the columns 'something'"),
        ("sft", {"messages": "not a list"}, "neither JSON nor a Python literal"),
        ("sft", {"messages": []}, "must be a list of turns that is not empty"),
        (
            "sft",
            {"messages": [{"role": "wizard", "content": "x"}]},
            r"'messages'\[0\]: unknown role 'wizard'",
        ),
        ("sft", {"messages": [{"role": "user"}]}, r"\[0\]: the content of the user turn is missing"),
        ("sft", {"messages": [{"a": "b"}]}, r"keys \['a'\] are no known dialect"),
        (
            "sft",
            {"messages": [{"role": "user", "content": "q"}, {"role": "system", "content": "s"}]},
            "come first",
        ),
        ("grpo", {"messages": [{"role": "assistant", "content": "a"}]}, "no user turn to answer"),
        ("grpo", {"query": "q", "history": [["a"]]}, r"list of \[query, response\] pairs"),
        (
            "grpo",
            {"system": "x", "messages": [{"role": "system", "content": "y"}]},
            "two different system prompts",
        ),
    ],
)
def test_what_cannot_be_used_is_named(task, fields, reason):
    with pytest.raises(RowError, match=f"^d.jsonl:3: .*{reason}"):
        convert(fields, task)


def test_numbers_are_text():
    assert turns(convert({"query": 1, "response": 2.5})) == [("user", "1"), ("assistant", "2.5")]


def test_of_several_answers_the_first_is_taken_and_counted():
    converter = Converter("sft")
    for _ in range(2):
        example = converter(Row({"question": "q", "answers": ["a", "b"]}, "x", 1))
    assert turns(example)[-1] == ("assistant", "a")
    assert list(converter.notices.values()) == [2]


def test_media_without_tags_are_put_first_and_counted():
    converter = Converter("grpo")
    example = converter(
        Row({"system": "s", "query": "What?", "images": ["a.png", {"bytes": b"x", "path": None}]}, "x", 1)
    )
    assert turns(example) == [("system", "s"), ("user", "<image><image>What?")]
    assert example.images == ("a.png", b"x")
    converter(Row({"query": "What?", "videos": "v.mp4"}, "x", 2))
    assert sorted(converter.notices.items()) == [
        ("rows had images but no <image> tag; tags were put first", 1),
        ("rows had videos but no <video> tag; tags were put first", 1),
    ]


@pytest.mark.parametrize(
    ("query", "images", "reason"),
    [
        ("<image>What?", ["a", "b"], "2 images but 1 <image> tags"),
        ("<image><image>What?", ["a"], "1 images but 2 <image> tags"),
        ("<image>What?", [{"bytes": None, "path": None}], "is no path, URL"),
    ],
)
def test_media_and_tags_must_agree(query, images, reason):
    with pytest.raises(RowError, match=f"d.jsonl:3: .*{reason}"):
        convert({"query": query, "images": images}, "grpo")


def test_content_lists_carry_media_in_order():
    content = [
        {"type": "text", "text": "Compare ", "image_url": None},
        {"type": "image_url", "image_url": {"url": "https://x/a.png"}, "text": None},
        {"type": "text", "text": " and "},
        {"type": "image", "image": "b.png"},
    ]
    fields = {"messages": [{"role": "user", "content": content}]}
    example = convert(fields, "grpo")
    assert turns(example) == [("user", "Compare <image> and <image>")]
    assert example.images == ("https://x/a.png", "b.png")
    with pytest.raises(RowError, match="both in the content and in column 'images'"):
        convert({**fields, "images": ["c.png"]}, "grpo")


def test_tool_calls_of_both_dialects():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    own = [
        {"role": "user", "content": "q"},
        {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "tool_response", "content": "r"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
    ]
    openai = [
        own[0],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call, {"function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "r"},
        own[-1],
    ]
    expected = (
        Message("user", "q"),
        Message("assistant", "", tool_calls=(call, call)),
        Message("tool", "r"),
        Message("assistant", "a", other={"reasoning_content": "hm"}),
    )
    for messages in (own, openai):
        example = convert({"messages": messages, "tools": '[{"type": "function"}]'})
        assert example.messages == expected
        assert example.tools == ({"type": "function"},)


def test_loss_of_a_message_is_kept():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]
    assert convert({"messages": messages}).messages[1].loss is False
    messages[1]["loss"] = "no"
    with pytest.raises(RowError, match="'loss' is 'no'"):
        convert({"messages": messages})


def test_a_video_may_be_a_list_of_frames():
    asked = {"query": "<video> or <video>?"}
    example = convert({**asked, "videos": ["v.mp4", ["0.png", {"bytes": b"x", "path": None}]]}, "grpo")
    assert example.videos == ("v.mp4", ("0.png", b"x"))
    example = convert({"query": "<video>?", "videos": [["0.png", "1.png"]]}, "grpo")
    assert example.videos == (("0.png", "1.png"),)
    content = [{"type": "video", "video": ["0.png", "1.png"]}, {"type": "text", "text": "What?"}]
    example = convert({"messages": [{"role": "user", "content": content}]}, "grpo")
    assert example.videos == (("0.png", "1.png"),)
    with pytest.raises(RowError, match="is no path, URL"):
        convert({**asked, "videos": ["v.mp4", []]}, "grpo")


def test_media_come_in_the_order_of_their_tags():
    fields = {
        "query": "<video><image>And <audio><image>?",
        "images": ["a", "b"],
        "videos": ["v"],
        "audios": "s",
    }
    found = in_order(convert(fields, "grpo"))
    assert found == [("video", "v"), ("image", "a"), ("audio", "s"), ("image", "b")]


def test_arguments_of_the_chat_template():
    row = {"query": "q", "response": "a", "chat_template_kwargs": {"enable_thinking": False, "unset": None}}
    example = convert(row)
    assert example.template_kwargs == {"enable_thinking": False}
    assert "chat_template_kwargs" not in example.extra
    assert convert({**row, "chat_template_kwargs": '{"enable_thinking": true}'}).template_kwargs == {
        "enable_thinking": True
    }
    assert convert({**row, "chat_template_kwargs": None}).template_kwargs == {}
    with pytest.raises(RowError, match=r"d.jsonl:3: 'chat_template_kwargs' must be an object"):
        convert({**row, "chat_template_kwargs": [1]})
    with pytest.raises(RowError, match="sets tokenize, which no row may"):
        convert({**row, "chat_template_kwargs": {"tokenize": True}})
