"""One row trains the same tokens whatever file it comes in: JSON Lines, Parquet and Arrow as pyarrow and as
`datasets` write them, `save_to_disk`, a hub."""

import importlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as parquet
import pytest

from raytune_rl.data.encode import encode_prompts, encode_sft
from raytune_rl.data.encode_preferences import encode_labelled, encode_pairs
from raytune_rl.data.load import load_examples
from raytune_rl.data.tables import TableRows

# Not an import: the package hides this module behind its function of the same name.
CLIENT = importlib.import_module("modelscope.hub.snapshot_download")


def user(content="Why?"):
    return {"role": "user", "content": content}


def says(content="So.", **more):
    return {"role": "assistant", "content": content, **more}


def calls(*asked):
    return says("", tool_calls=[*asked])


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, **properties):
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def part(text):
    return {"type": "text", "text": text}


IMAGE = {"type": "image"}
CITY = {"city": {"type": "string"}}
SUM = {"a": {"type": "integer"}, "b": {"type": "integer", "enum": [1, 2]}}

#: Name to the task and two or more rows, each with another shape.
SHAPES = {
    "messages": ("sft", [{"messages": [user(), says()]}, {"messages": [user("q"), says("a", name="x")]}]),
    "system": ("sft", [{"messages": [{"role": "system", "content": "s"}, user(), says()]}]),
    "parts": ("sft", [{"messages": [user([part("Name a "), part("colour.")]), says("Blue.")]}]),
    "parts in all turns": ("sft", [{"messages": [user([part("a"), part("b")]), says([part("c")])]}]),
    "answers that read as JSON": ("sft", [
        {"messages": [user([part("1+1?")]), says(text)]}
        for text in ("2", "2.50", "true", '{"a": 1}', "[1, 2]", '{"role": 1', "null and void")
    ]),
    "one turn of all": ("sft", [{"messages": [says("Once upon a time.")]}]),
    "calls": ("sft", [
        {"messages": [user(), calls(call("weather", city="Rome"))], "tools": [tool("w", **CITY)]},
        {"messages": [user(), calls(call("add", a=1, b=2))], "tools": [tool("add", **SUM)]},
    ]),
    "nulls that were written": ("sft", [
        {"messages": [user(), calls(call("f", a=None, b=[None, {"c": None}]))]},
        {"messages": [user(), calls({"function": {"name": "g", "arguments": "{}"}})]},
    ]),
    "arguments as text": ("sft", [
        {"messages": [user(), calls({"function": {"name": "f", "arguments": '{"a": null, "b": 1}'}})]},
    ]),
    "calls that hold lists of objects": ("sft", [
        {"messages": [user(), calls(call("f", rows=[{"a": 1}, {"b": 2}], deep={"x": {"y": 1}}))]},
        {"messages": [user(), calls(call("f", rows=[{"c": []}], deep={"x": {"z": 2}}))]},
    ]),
    "a call and its answer": ("sft", [
        {"messages": [user(), calls(call("f", a=1)), {"role": "tool", "content": "2"}, says("2")]},
        {"messages": [user(), says("3")]},
    ]),
    "older calls": ("sft", [
        {"messages": [user(), says("I look.", function_call={"name": "f", "arguments": '{"a": 1}'})],
         "functions": [{"name": "f", "parameters": {"type": "object", "properties": CITY}}]},
        {"messages": [user(), says("Nothing to do.")], "functions": [{"name": "g", "parameters": {}}]},
    ]),
    "weights": ("sft", [
        {"messages": [user(), says("bad", weight=0), user("sure?"), says("good", weight=1)]},
        {"messages": [user(), says("good")]},
    ]),
    "sharegpt": ("sft", [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ]),
    "alpaca": ("sft", [
        {"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "output": "Hi."},
    ]),
    "history": ("sft", [
        {"query": "q", "response": "a", "history": [["b", "c"]]}, {"query": "q", "response": "a"},
    ]),
    "text": ("sft", [{"text": "Once.", "meta": {"a": 1}}, {"text": "Twice.", "meta": {"b": [1]}}]),
    "prompt and completion": ("sft", [
        {"prompt": [user()], "completion": [says()]},
        {"prompt": [{"role": "system", "content": "s"}, user()], "completion": [calls(call("f", a=1))]},
    ]),
    "prompt as text or turns": ("sft", [
        {"prompt": "Why?", "completion": "So."}, {"prompt": [user()], "completion": [says()]},
    ]),
    "chat_template_kwargs": ("sft", [
        {"messages": [user(), says()], "chat_template_kwargs": {"think": "a"}},
        {"messages": [user(), says()], "chat_template_kwargs": {"other": 1}},
        {"messages": [user(), says()]},
    ]),
    "verl": ("grpo", [
        {"prompt": [user("1+1?")], "reward_model": {"ground_truth": "2"}, "data_source": "d"},
        {"prompt": [user("1+2?")], "reward_model": {"ground_truth": "3", "style": "rule"}},
    ]),
    "prompts with tools": ("grpo", [
        {"prompt": [user()], "tools": [tool("f", **CITY)], "solution": "x"},
        {"prompt": [user([part("a")])], "tools": [tool("g", **SUM), tool("h")], "solution": "y"},
    ]),
    "pairs": ("pairs", [
        {"prompt": [user()], "chosen": [says("good")], "rejected": [says("bad")]},
        {"prompt": [user()], "chosen": [calls(call("f", a=1))], "rejected": [says("bad")]},
    ]),
    "pairs without a prompt": ("pairs", [{"chosen": [user(), says("1")], "rejected": [user(), says("2")]}]),
    "pairs of one turn each": ("pairs", [
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "1"},
         "rejected": {"from": "gpt", "value": "2"}},
    ]),
    "pairs of texts": ("pairs", [{"instruction": "a", "input": "b", "chosen": "1", "rejected": "2"}]),
    "labels": ("labels", [
        {"prompt": [user("a")], "completion": [says("1")], "label": True},
        {"prompt": [user("b")], "completion": [says([part("2")])], "label": False},
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    """Folders that ModelScope's client gives out, by id."""
    import datasets.config

    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIENT, "dataset_snapshot_download", lambda name: str(folders[name]))
        yield lambda name, folder: (
            folders.update({name: folder}),
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "hub_cache"),
        )


def encoded(spec, task, tokenizer):
    """Everything that is trained on, as plain lists; rewards' columns for a prompt task."""
    examples = load_examples([spec], task=task, strict=True, shuffle=False).examples
    if task == "grpo":
        found = encode_prompts(examples, tokenizer)
        return [row.tolist() for row in found.prompts], found.extra["solution"]
    encode = {"sft": encode_sft, "pairs": encode_pairs, "labels": encode_labelled}[task]
    found = encode(examples, tokenizer)
    rows = range(len(found.loss_lengths))
    return [(found.tokens[i].tolist(), found.loss_mask[i].tolist()) for i in rows], found.values.keys()


def test_there_are_shapes_enough():
    assert len(SHAPES) >= 25


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_trains_the_same_tokens_from_every_kind_of_file(name, tmp_path, calling, hub):
    import datasets

    task, rows = SHAPES[name]
    folder = tmp_path / "repository"
    folder.mkdir()
    source = folder / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = encoded(str(source), task, calling)
    hub("me/rows", folder)
    table = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(tmp_path / "cache")
    )
    table.save_to_disk(str(tmp_path / "disk"))
    table.to_parquet(str(tmp_path / "datasets.parquet"))
    specs = {"hub": "me/rows", "save_to_disk": tmp_path / "disk", "parquet": tmp_path / "datasets.parquet"}
    try:
        plain = pa.Table.from_pylist(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # shapes that Arrow has no type for
        plain = None
    if plain is not None and "written" not in name:  # Arrow alone cannot tell what was written as null
        parquet.write_table(plain, tmp_path / "arrow.parquet")
        pa.feather.write_feather(plain, tmp_path / "file.arrow", compression="uncompressed")
        specs |= {"pyarrow's parquet": tmp_path / "arrow.parquet", "arrow": tmp_path / "file.arrow"}
    for how, spec in specs.items():
        assert encoded(str(spec), task, calling) == wanted, how


def test_what_is_trained_on_has_no_null_of_the_table(tmp_path, calling):
    _, rows = SHAPES["calls"]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    found = encode_sft(
        load_examples([str(tmp_path / "r.parquet")], task="sft", strict=True, shuffle=False).examples,
        calling,
    )
    texts = [calling.decode(tokens) for tokens in found.tokens]
    trained = [
        calling.decode(np.asarray(tokens)[mask])
        for tokens, mask in zip(found.tokens, found.loss_mask, strict=True)
    ]
    assert trained == ['[weather {"city": "Rome"}]<|im_end|>', '[add {"a": 1, "b": 2}]<|im_end|>']
    assert texts[0].startswith(
        '{"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": '
        '{"city": {"type": "string"}}}}}\n'
    )
    assert "null" not in "".join(texts)


def test_a_null_that_was_written_stays(tmp_path, calling):
    _, rows = SHAPES["nulls that were written"]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_examples([str(tmp_path / "r.jsonl")], task="sft", strict=True, shuffle=False)
    found = encode_sft(loaded.examples, calling)
    assert '[f {"a": null, "b": [null, {"c": null}]}]' in calling.decode(found.tokens[0])


def test_columns_of_rewards_are_as_in_the_table(tmp_path):
    rows = [{"query": "q", "info": {"a": 1}}, {"query": "q", "info": {"b": [{"c": None}]}}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    found = load_examples([str(tmp_path / "r.parquet")], task="grpo", strict=True, shuffle=False).examples
    assert [example.extra["info"] for example in found] == [
        {"a": 1, "b": None},
        {"a": None, "b": [{"c": None}]},
    ]


def test_json_columns_are_known_by_their_features_alone_and_maps_are_objects():
    features = {"info": {"features": {"x": {"feature": {"_type": "Json"}, "_type": "List"}}}}
    kinds = pa.schema([("x", pa.list_(pa.string())), ("m", pa.map_(pa.string(), pa.int64()))])
    kinds = kinds.with_metadata({"huggingface": json.dumps(features)})
    batch = pa.RecordBatch.from_pylist(
        [{"x": ['{"a": null}', None, "broken"], "m": [("k", 1)]}, {"x": None, "m": None}], kinds
    )
    first, second = TableRows(kinds, "t").of(batch)
    assert first.fields == {"x": [{"a": None}, None, "broken"], "m": {"k": 1}}
    assert first.written() == first.fields
    assert (second.fields, second.line) == ({"x": None, "m": None}, 2)
