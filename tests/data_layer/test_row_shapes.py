"""Rows as public data sets and other trainers have them: the right turns, media, columns and trained text."""

import pytest

from raytune_rl.data.encode import encode_prompts, encode_sft
from raytune_rl.data.encode_preferences import encode_labelled, encode_pairs
from raytune_rl.data.example import Row, RowError
from raytune_rl.data.files import read_file
from raytune_rl.data.formats import Converter

Q, A = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
BAD = {"role": "assistant", "content": "No."}


def convert(fields, task="sft", **kwargs):
    return Converter(task, **kwargs)(Row(fields, "d.jsonl", 3))


def read(fields, task="sft", **kwargs):
    """The example, and what the user is told of it."""
    converter = Converter(task, **kwargs)
    return converter(Row(fields, "d.jsonl", 3)), list(converter.notices)


def turns(example):
    return [(message.role, message.content) for message in example.messages]


def trained(examples, tokenizer, encode=encode_sft):
    """The text that is trained on, of each row."""
    found = encode(examples, tokenizer)
    return [tokenizer.decode(found.tokens[i][found.loss_mask[i]]) for i in range(len(found.loss_lengths))]


# Prompts and answers as turns (TRL, verl, OpenRLHF, Nemotron)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [Q], "completion": [A]},
        {"prompt": [Q], "completion": "So."},
        {"conversations": {"from": ["human", "gpt"], "value": ["Why?", "So."], "weight": None}},
        {"prompt": "Why?", "completion": [A]},
        {"prompt": "Why?", "completion": A},
        {"input": [Q], "output": "So.", "category": None},
        {"context_messages": [Q], "response": "So."},
        {"prompt": [{"from": "human", "value": "Why?"}], "response": "So."},
        {"prompt": [Q, A], "question": "what stood there before it was made into turns"},
        {"question": "raw", "prompt": [Q], "completion": [A]},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "completion": " So. ".strip()},
    ],
)
def test_prompt_and_answer_may_be_turns(fields, chatml):
    example = convert(fields)
    assert turns(example) == [("user", "Why?"), ("assistant", "So.")]
    assert trained([example], chatml) == ["So.<|im_end|>"]


def test_a_prompt_of_turns_for_a_reward(chatml):
    fields = {"prompt": [{"role": "system", "content": "s"}, Q], "completion": [A], "solution": "x"}
    example = convert(fields, "grpo")
    assert turns(example) == [("system", "s"), ("user", "Why?")]
    assert example.extra == {"completion": [A], "solution": "x"}
    (prompt,) = encode_prompts([example], chatml).prompts
    assert chatml.decode(prompt) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(RowError, match=r"'prompt' ends with a turn of the assistant's.*\"messages\""):
        convert({"prompt": [Q, A]}, "grpo")
    assert turns(convert({"prompt": [Q, A]}, "grpo", columns={"prompt": "messages"})) == [("user", "Why?")]


def test_verls_truth_is_the_solution_unless_there_is_one():
    fields = {
        "data_source": "d",
        "prompt": [Q],
        "reward_model": {"ground_truth": "4", "style": "rule"},
        "extra_info": {"index": 0},
    }
    example, notices = read(fields, "grpo")
    assert turns(example) == [("user", "Why?")]
    assert example.extra == {**{k: v for k, v in fields.items() if k != "prompt"}, "solution": "4"}
    assert notices == ["rows have reward_model.ground_truth; it is the 'solution' of rewards"]
    assert convert({**fields, "solution": "5"}, "grpo").extra["solution"] == "5"
    assert "solution" not in convert({"prompt": [Q], "reward_model": "a/b"}, "grpo").extra
    as_text = {"prompt": [Q], "reward_model": '{"ground_truth": 4}'}
    assert convert(as_text, "grpo").extra["solution"] == 4


def test_a_column_with_a_name_of_the_runs_own_is_left_out_of_rewards():
    fields = {"prompt": "Why?", "prompt_id": "f0e3", "solution": "x"}
    example, notices = read(fields, "grpo")
    assert example.extra == {"solution": "x"}
    (notice,) = notices
    assert notice.startswith("rows have a column 'prompt_id'; rewards receive the run's own value")
    renamed, notices = read(fields, "grpo", columns={"prompt_id": "number"})
    assert (renamed.extra, notices) == ({"number": "f0e3", "solution": "x"}, [])


def test_columns_may_name_what_lies_inside_of_a_column():
    fields = {"extra_info": {"question": "Why?", "answers": ["a", {"b": "c"}]}, "prompt": "raw"}
    columns = {"extra_info.question": "query", "extra_info.answers.1.b": "truth"}
    converter = Converter("grpo", columns={**columns, "extra_info.none": "x"})
    example = converter(Row(fields, "d", 1))
    assert turns(example) == [("user", "Why?")]
    assert example.extra == {"extra_info": fields["extra_info"], "prompt": "raw", "truth": "c"}
    assert converter.unseen_columns() == ["extra_info.none"]
    assert convert({"a.b": "Why?"}, "grpo", columns={"a.b": "query"}).messages[0].content == "Why?"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [Q], "chosen": [A], "rejected": [BAD]},
        {"prompt": [Q], "chosen": "So.", "rejected": "No."},
        {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, BAD]},
        {"prompt": "Why?", "chosen": [A], "rejected": [BAD]},
        {"question": "Why?", "chosen": [A], "rejected": "No."},
        {"chosen": [Q, A], "rejected": [Q, BAD]},
        {"prompt": "Why?", "prompt_id": "1", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, BAD]},
        {"messages": [Q], "chosen": A, "rejected": BAD},
        {"messages": [Q], "chosen": "So.", "rejected": "No."},
        {"conversations": [{"from": "human", "value": "Why?"}],
         "chosen": {"from": "gpt", "value": "So."}, "rejected": {"from": "gpt", "value": "No."}},
        {"conversations": '[{"from": "human", "value": "Why?"}]', "chosen": "So.", "rejected": "No."},
        {"context_messages": [Q], "chosen": "So.", "rejected": "No."},
        {"instruction": "Why?", "chosen_response": "So.", "rejected_response": "No."},
        {"input": {"messages": [Q], "tools": []}, "preferred_output": [A], "non_preferred_output": [BAD]},
        {"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "So.", "rejected": "No."},
    ],
)  # fmt: skip
def test_pairs(fields, chatml):
    example = convert(fields, "pairs")
    assert turns(example) == [("user", "Why?"), ("assistant", "So.")]
    assert trained([example], chatml, encode_pairs) == ["So.<|im_end|>", "No.<|im_end|>"]


def test_llama_factorys_pairs_keep_input_history_and_system():
    fields = {
        "instruction": "Translate:", "input": "hello", "chosen": "good", "rejected": "bad", "system": "s",
        "history": [["a", "b"]],
    }  # fmt: skip
    example, notices = read(fields, "pairs")
    prompt = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "Translate:\nhello")]
    assert turns(example) == [*prompt, ("assistant", "good")]
    assert [(m.role, m.content) for m in example.rejected] == [*prompt, ("assistant", "bad")]
    assert (example.extra, notices) == ({}, [])
    mapped, notices = read(fields, "pairs", columns={"instruction": "query"})
    assert turns(mapped)[-2] == ("user", "Translate:")
    assert mapped.extra == {"input": "hello"}
    assert notices == [
        "rows have 'input' beside 'instruction', which --columns makes the query: it is left out of it"
    ]


def test_transcripts_of_several_rounds(chatml):
    start = "\n\nHuman: Hi\n\nthere\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    example = convert({"chosen": f"{start} So.\n\nAnd so.", "rejected": f"{start} No."}, "pairs")
    assert turns(example) == [
        ("user", "Hi\n\nthere"), ("assistant", "Hello."), ("user", "Why?"), ("assistant", "So.\n\nAnd so."),
    ]  # fmt: skip
    assert trained([example], chatml, encode_pairs) == ["So.\n\nAnd so.<|im_end|>", "No.<|im_end|>"]
    with pytest.raises(RowError, match="'rejected' has another prompt"):
        convert({"chosen": f"{start} a", "rejected": "\n\nHuman: x\n\nAssistant: b"}, "pairs")
    with pytest.raises(RowError, match=r"no 'prompt' column. Cut what both answers begin with"):
        convert({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "pairs")


@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_labelled_rows(label, chatml):
    rows = [
        {"prompt": [Q], "completion": [A], label: True},
        {"instruction": "Day?", "input": "", "output": "Noon.", label: False},
    ]
    examples = [convert(row, "labels") for row in rows]
    assert [example.label for example in examples] == [True, False]
    assert trained(examples, chatml, encode_labelled)[::2] == ["So.<|im_end|>", "Noon.<|im_end|>"]
    assert examples[0].extra == {}


# Media with their place in the content and themselves in a column


def asks(*parts):
    return {"role": "user", "content": [*parts]}


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}


@pytest.mark.parametrize("kind", ["image", "image_url", "input_image"])
def test_places_of_images_are_filled_from_the_column(kind):
    fields = {"prompt": [asks({"type": kind}, TEXT, {"type": kind, "text": None})], "images": ["a", "b"]}
    example = convert(fields, "grpo")
    assert turns(example) == [("user", "<image>What?<image>")]
    assert example.images == ("a", "b")
    assert example.extra == {}
    for images in (["a"], ["a", "b", "c"], []):
        with pytest.raises(RowError, match=f"2 parts .*image.* column 'images' has {len(images)}"):
            convert({**fields, "images": images}, "grpo")
    with pytest.raises(RowError, match="there is no 'images' column"):
        convert({**fields, "images": None}, "grpo")


def test_places_of_videos_and_audio_and_media_beside_them():
    parts = [{"type": "video"}, {"type": "audio", "audio": "own.wav"}, {"type": "input_audio"}, TEXT]
    example = convert({"messages": [asks(*parts), A], "videos": ["v"], "audios": ["s"]})
    assert turns(example)[0] == ("user", "<video><audio><audio>What?")
    assert (example.videos, example.audios) == (("v",), ("own.wav", "s"))


def test_places_may_say_which_image_is_meant():
    parts = [{"index": 1, **IMAGE}, {"index": 0, **IMAGE, "text": None}, {"index": None, **TEXT}]
    fields = {"messages": [asks(*parts), A], "images": ["a", "b"]}
    assert convert(fields).images == ("b", "a")
    parts[0]["index"] = 0
    with pytest.raises(RowError, match="parts name images by index"):
        convert(fields)


def test_an_image_of_a_pair_in_its_column():
    chosen, rejected = ([{"role": "assistant", "content": [{"type": "text", "text": t}]}] for t in "ab")
    fields = {"images": ["a.png"], "prompt": [asks(IMAGE, TEXT)], "chosen": chosen, "rejected": rejected}
    example = convert(fields, "pairs")
    assert turns(example) == [("user", "<image>What?"), ("assistant", "a")]
    assert example.rejected[0].content == "<image>What?"
    assert example.images == ("a.png",)


def test_sound_as_openai_has_it():
    part = {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}}
    assert convert({"messages": [asks(part), A]}).audios == ("data:audio/wav;base64,QUJD",)


def test_keys_of_parts_and_turns_that_nothing_uses_are_told():
    part = {"type": "video", "video": "v.mp4", "fps": 2.0}
    _, notices = read({"messages": [asks(part, TEXT), A]})
    assert notices == ["rows whose parts of content lists have 'fps', which nothing uses"]
    example, notices = read({"images": ["a"], "texts": [{"user": "q", "assistant": "a", "source": "s"}]})
    assert turns(example) == [("user", "<image>q"), ("assistant", "a")]
    assert "rows whose turns have 'source', which nothing uses" in notices


def test_keys_of_turns_that_the_template_does_not_write_are_told(chatml, calling):
    rows = [
        {
            "messages": [Q, {**A, "mood": "calm", "tool_calls": [{"name": "f", "arguments": {}}]}],
            "tools": [{}],
        },
        {"messages": [Q, {**A, "mood": "calm"}]},
    ]
    examples = [convert(row) for row in rows]
    assert encode_sft(examples, chatml).notices == tuple(
        f"{count} rows have {key!r}, which the chat template does not write: the model does not see it"
        for count, key in ((2, "mood"), (1, "tool_calls"), (1, "tools"))
    )
    assert [n.split(",")[0] for n in encode_sft(examples, calling).notices] == ["2 rows have 'mood'"]


# Calls, roles and weights as OpenAI has or had them


def test_older_calls_and_functions(calling):
    called = {**A, "content": "Let me look.", "function_call": {"name": "w", "arguments": '{"city": "Rome"}'}}
    schema = {"name": "w", "parameters": {"type": "object"}}
    example = convert({"messages": [Q, called], "functions": [schema]})
    assert example.tools == ({"type": "function", "function": schema},)
    assert example.extra == {}
    assert trained([example], calling) == ['Let me look.[w {"city": "Rome"}]<|im_end|>']
    silent = {**called, "content": None}
    answer = {"role": "function", "name": "w", "content": "21"}
    example = convert({"messages": [{"role": "developer", "content": "d"}, Q, silent, answer, A]})
    assert [role for role, _ in turns(example)] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[3].other == {"name": "w"}
    assert trained([example], calling) == ['[w {"city": "Rome"}]<|im_end|>So.<|im_end|>']
    with pytest.raises(RowError, match="both 'tool_calls' and 'function_call'"):
        convert({"messages": [Q, {**called, "tool_calls": [{"name": "f", "arguments": {}}]}]})


def test_toolbench_turns():
    spoken = [("user", "do"), ("assistant", "Action: f"), ("function", "{}"), ("assistant", "done")]
    example = convert({"conversations": [{"from": who, "value": text} for who, text in spoken]})
    assert turns(example)[2] == ("tool", "{}")


@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [("weight", 0, 1), ("train", False, True), ("training", False, True), ("loss", False, True)],
)
def test_turns_that_are_not_to_be_learned(key, no, yes, chatml):
    fields = {"messages": [Q, {**BAD, key: no}, {"role": "user", "content": "Sure?"}, {**A, key: yes}]}
    example, notices = read(fields)
    assert trained([example], chatml) == ["So.<|im_end|>"]
    assert notices == []
    with pytest.raises(RowError, match=f"'{key}'"):
        convert({"messages": [Q, {**A, key: 0.5}]})
    with pytest.raises(RowError, match="of a turn say different things"):
        convert({"messages": [Q, {**A, "loss_scale": 1, key: no}]})


def test_openais_weight_of_one_is_what_a_turn_without_it_is(chatml):
    example = convert({"messages": [Q, {**BAD, "weight": 1}, Q, {**A, "weight": 1}]})
    last = encode_sft([example], chatml, loss_scale="last_round")
    assert chatml.decode(last.tokens[0][last.loss_mask[0]]) == "So.<|im_end|>"


# Texts to be learned as they stand


@pytest.mark.parametrize(
    "fields", [{"text": "The sky."}, {"messages": [{"role": "assistant", "content": "The sky."}]}]
)
def test_plain_texts(fields, chatml, llama3):
    example, notices = read(fields, system="Be calm.")
    assert notices == [
        "rows are plain text: learned whole and with an end, without the chat template and --system"
    ]
    found = encode_sft([example], chatml, loss_scale="last_round")
    assert chatml.decode(found.tokens[0]) == "<|im_end|>The sky.<|im_end|>"
    assert chatml.decode(found.tokens[0][found.loss_mask[0]]) == "The sky.<|im_end|>"
    ended = encode_sft([convert({"text": "The sky.<|eot_id|>"})], llama3)
    assert llama3.decode(ended.tokens[0]) == "<|eot_id|>The sky.<|eot_id|>"


def test_plain_texts_begin_as_the_tokenizer_begins_texts(new_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = new_tokenizer(["<s>", "</s>"], "{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.bos_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    found = encode_sft([convert({"text": "The sky."})], tokenizer)
    assert tokenizer.decode(found.tokens[0]) == "<s>The sky.</s>"
    assert found.loss_mask[0].tolist() == [False] + [True] * (len(found.tokens[0]) - 1)


def test_texts_that_are_none_to_be_learned():
    with pytest.raises(RowError, match="'text' is empty"):
        convert({"text": ""})
    with pytest.raises(RowError, match="a text with media must answer something"):
        convert({"text": "A cat.", "image": "a.png"})
    with pytest.raises(RowError, match="the last turn is by user"):
        convert({"messages": [Q]})


def test_a_column_that_is_no_text_says_how_to_name_another():
    with pytest.raises(RowError, match=r"column 'answers' holds dict, not text.*--columns"):
        convert({"question": "q", "answers": [{"answer": "a"}], "multiple_choice_answer": "a"})


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("d.jsonl", '{"query": "a"}\n{"query": "b", "query": "c"}\n{"query": "d"}\n', [1, 2, 3]),
        ("d.json", '[{"query": "a"},\n{"m": [{"query": "b", "query": "c"}]},\n{"query": "d"}]', [1, 2, 3]),
    ],
)
def test_a_key_that_stands_twice_makes_a_bad_row_of_its_own(name, text, lines, tmp_path):
    (tmp_path / name).write_text(text)
    rows = list(read_file(tmp_path / name))
    assert [row.line for row in rows] == lines
    assert [row.fields for row in rows if isinstance(row, Row)] == [{"query": "a"}, {"query": "d"}]
    assert rows[1].reason == "an object has the key 'query' twice"
