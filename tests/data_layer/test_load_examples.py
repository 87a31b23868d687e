import json

import pytest

from raytune_rl.data.example import RowError
from raytune_rl.data.load import load_examples, resolve_system, split_examples
from raytune_rl.errors import ConfigError, DataError


@pytest.fixture
def data(tmp_path):
    """Ten rows, of which lines 3 and 7 are bad."""
    lines = [json.dumps({"query": f"q{i}", "solution": str(i)}) for i in range(1, 11)]
    lines[2] = "{broken"
    lines[6] = json.dumps({"query": ""})
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def queries(loaded):
    return [example.messages[-1].content for example in loaded.examples]


def test_strict_stops_at_the_first_bad_row(data):
    with pytest.raises(RowError, match=r"data.jsonl:3: broken JSON"):
        load_examples([str(data)], task="grpo", strict=True)


def test_otherwise_bad_rows_are_set_aside_and_counted(data, tmp_path):
    quarantine = tmp_path / "out" / "bad.jsonl"
    loaded = load_examples([str(data)], task="grpo", shuffle=False, quarantine_path=quarantine)
    assert queries(loaded) == [f"q{i}" for i in range(1, 11) if i not in (3, 7)]
    entries = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(entry["source"], entry["line"]) for entry in entries] == [(str(data), 3), (str(data), 7)]
    assert entries[0]["row"] == "{broken"
    assert entries[1]["row"] == {"query": ""}
    assert entries[1]["reason"] == "'query' is empty"
    (source,) = loaded.report.sources
    assert (source.rows, source.good, source.bad, source.taken) == (10, 8, 2, 8)
    assert loaded.report.bad == 2
    assert sum(loaded.report.reasons.values()) == 2
    assert loaded.report.quarantine_path == quarantine


def test_no_bad_row_no_file(data, tmp_path):
    quarantine = tmp_path / "bad.jsonl"
    load_examples([f"{data}#2"], task="grpo", shuffle=False, quarantine_path=quarantine, strict=True)
    assert not quarantine.exists()


def test_bytes_in_a_bad_row_do_not_break_the_quarantine(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [{"image": {"bytes": b"\x89PNG", "path": None}, "query": q} for q in ("ok", "")]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    load_examples([str(tmp_path / "a.parquet")], task="grpo", quarantine_path=tmp_path / "bad.jsonl")
    (entry,) = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert entry["row"]["image"]["bytes"] == "<4 bytes>"
    assert entry["line"] == 2


def test_a_bad_row_with_half_a_character_can_be_set_aside(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": "\\ud800"}\n{"query": "q"}\n')
    load_examples([str(tmp_path / "a.jsonl")], task="grpo", quarantine_path=tmp_path / "bad.jsonl")
    assert json.loads((tmp_path / "bad.jsonl").read_text())["row"] == {"x": "\ud800"}


def test_a_value_too_deep_to_be_kept_is_its_rows_fault(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "q", "x": ' + "[" * 700 + "]" * 700 + '}\n{"query": "q"}\n')
    loaded = load_examples([str(tmp_path / "a.jsonl")], task="grpo", quarantine_path=tmp_path / "bad.jsonl")
    assert [example.line for example in loaded.examples] == [2]
    assert "nested too deep" in json.loads((tmp_path / "bad.jsonl").read_text())["reason"]


def test_shuffling_depends_on_the_seed_alone(data):
    first, again = (load_examples([str(data)], task="grpo", seed=1) for _ in range(2))
    other = load_examples([str(data)], task="grpo", seed=2)
    assert first.report == again.report
    assert list(first.examples) == list(again.examples)
    assert queries(first) != queries(other)
    assert sorted(queries(first)) == sorted(queries(other))


def test_several_data_sets_each_with_its_sample(data):
    loaded = load_examples([f"{data}#3", f"{data}#12"], task="grpo", seed=1)
    assert [source.taken for source in loaded.report.sources] == [3, 12]
    assert len(loaded.examples) == 15


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    with pytest.raises(DataError, match=r"none of its 2 rows can be used. The first: .*a.jsonl:1: no format"):
        load_examples([str(tmp_path / "a.jsonl")], task="sft")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(DataError, match="has no rows"):
        load_examples([str(tmp_path / "b.jsonl")], task="sft")


def test_misspelt_columns_are_an_error(data):
    with pytest.raises(ConfigError, match="'qestion', which no row has; there are 'query', 'solution'"):
        load_examples([str(data)], task="grpo", columns={"qestion": "query"})


def test_notices_are_given_once_with_a_count(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "q", "image": "a.png"}\n' * 3)
    report = load_examples([str(tmp_path / "a.jsonl")], task="grpo").report
    assert report.notices == ("3 rows had images but no <image> tag; tags were put first",)


def test_system_literal_and_file(tmp_path, data):
    assert resolve_system(None) is None
    assert resolve_system("one\\ntwo") == "one\ntwo"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Think.\nAnswer.\n")
    assert resolve_system(str(prompt)) == "Think.\nAnswer.\n"
    with pytest.raises(ConfigError, match=r"missing.txt: there is no such file"):
        resolve_system("missing.txt")
    loaded = load_examples([str(data)], task="grpo", system=str(prompt))
    assert {example.messages[0].content for example in loaded.examples} == {"Think.\nAnswer.\n"}


def test_split(data):
    examples = load_examples([str(data)], task="grpo", shuffle=False).examples
    train, held_out = split_examples(examples, 0.25, seed=1)
    assert len(held_out) == 2
    assert sorted([*train, *held_out], key=lambda e: e.line) == list(examples)
    assert len(split_examples(examples, 0.01, seed=1)[1]) == 1
    assert split_examples(examples, 0.0, seed=1) == (examples, ())
    for ratio in (1.0, -0.1):
        with pytest.raises(ConfigError):
            split_examples(examples, ratio, seed=1)


def test_the_quarantine_file_holds_no_secret(tmp_path):
    row = {"images": ["https://h/a.png?token=S3cr3tS3cr3t&w=4"], "token": "not a secret: a word of the data"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + '\n{"query": "q"}\n')
    load_examples([str(tmp_path / "a.jsonl")], task="grpo", quarantine_path=tmp_path / "bad.jsonl")
    kept = json.loads((tmp_path / "bad.jsonl").read_text())["row"]
    assert kept == {"images": ["https://h/a.png?token=***&w=4"], "token": row["token"]}


def test_a_bad_rows_message_holds_no_secret():
    error = RowError("https://h/rows.jsonl?token=S3cr3tS3cr3t", 3, "https://me:S3cr3tS3cr3t@h/a.png is gone")
    assert str(error) == "https://h/rows.jsonl?token=***:3: https://h/a.png is gone"
