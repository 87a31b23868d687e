import json
from collections import Counter

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest

from raytune_rl.data.example import BadRow, Row
from raytune_rl.data.sources import parse_spec, read_rows, sample
from raytune_rl.errors import DataError

ROWS = [{"query": f"q{i}", "n": i} for i in range(5)]


def rows_of(path):
    return list(read_rows(parse_spec(str(path))))


def fields_of(path):
    return [row.fields for row in rows_of(path)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_rows_know_their_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": "\xe4\xbb\x8a"}\r\n{"a": 3}')
    assert rows_of(path) == [
        Row({"a": 1}, str(path), 1),
        Row({"a": "今"}, str(path), 3),
        Row({"a": 3}, str(path), 4),
    ]


def test_broken_jsonl_lines_are_named_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 5}\n')
    first, broken, not_object, not_utf8, last = rows_of(path)
    assert (first.fields, last.fields, last.line) == ({"a": 1}, {"a": 5}, 5)
    assert (broken.line, broken.raw) == (2, '{"a": ')
    assert broken.reason.startswith("broken JSON: Expecting value at column")
    assert not_object == BadRow(str(path), 3, "a row must be a JSON object, this is a list", "[1]")
    assert not_utf8.line == 4
    assert "not UTF-8" in not_utf8.reason


@pytest.mark.parametrize("value", ["[" * 10**5 + "]" * 10**5, "9" * 5000])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_beyond_what_python_reads_is_a_bad_row(tmp_path, value, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(f'{{"a": 1}}\n{{"a": {value}}}\n')
    good, broken = read_rows(parse_spec(str(path)))
    assert (good.fields, broken.line) == ({"a": 1}, 2)
    path.write_text(f'[{{"a": 1}},\n{{"a": {value}}}]')
    *_, broken = read_rows(parse_spec(str(path)))
    assert isinstance(broken, BadRow)


def test_a_byte_in_csv_that_is_no_utf8_is_its_records_fault(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"query,response\nq,a\nq,\xe9\nq,b\n")
    one, broken, two = read_rows(parse_spec(str(path)))
    assert (broken.line, broken.reason) == (3, "not UTF-8")
    assert (one.fields["response"], two.fields["response"]) == ("a", "b")


def test_json_list_elements_know_their_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n  {"a": 1},\n  {\n    "a": 2\n  }, {"a": 3}\n]\n')
    assert [(row.fields["a"], row.line) for row in rows_of(path)] == [(1, 2), (2, 3), (3, 5)]


def test_json_may_hold_one_object_or_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n "a": 1\n}')
    assert fields_of(path) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [(row.fields, row.line) for row in rows_of(path)] == [({"a": 1}, 1), ({"a": 2}, 2)]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n{"a": 1},\n{"a" 2}\n]', 3, "Expecting ':'"),
        ('[\n{"a": 1}\n{"a": 2}\n]', 3, "needs a comma"),
        ('[\n{"a": 1},\n', 3, "never closed"),
    ],
)
def test_broken_json_is_named_with_its_line(tmp_path, text, line, reason):
    path = tmp_path / "a.json"
    path.write_text(text)
    good, bad = rows_of(path)
    assert good.fields == {"a": 1}
    assert bad.line == line
    assert reason in bad.reason


def test_csv_records_know_the_line_they_begin_on(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('query,response\n"two\nlines",1\nx,\ny\nz,"a,b"\n', encoding="utf-8")
    first, second, bad, last = rows_of(path)
    assert first == Row({"query": "two\nlines", "response": "1"}, str(path), 2)
    assert second == Row({"query": "x", "response": ""}, str(path), 4)
    assert (bad.line, bad.reason) == (5, "1 fields, but the header has 2")
    assert last == Row({"query": "z", "response": "a,b"}, str(path), 6)


def test_csv_fields_may_be_long(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("query\n" + "x" * 300_000 + "\n")
    assert len(fields_of(path)[0]["query"]) == 300_000


def test_txt_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert rows_of(path) == [Row({"text": "one"}, str(path), 1), Row({"text": "two"}, str(path), 3)]


def test_parquet_and_both_kinds_of_arrow(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    feather.write_feather(table, str(tmp_path / "file.arrow"))
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        rows = rows_of(tmp_path / name)
        assert [row.fields for row in rows] == ROWS
        assert [row.line for row in rows] == [1, 2, 3, 4, 5]


def test_a_file_that_is_not_what_its_name_says(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_text("no table")
        with pytest.raises(DataError, match=f"{name}: not a readable"):
            rows_of(tmp_path / name)
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(DataError, match=r"cannot read \.xyz"):
        rows_of(tmp_path / "a.xyz")


def test_images_in_parquet_stay_encoded(tmp_path):
    image = {"bytes": b"\x89PNG", "path": "x.png"}
    parquet.write_table(pa.Table.from_pylist([{"image": image}]), tmp_path / "a.parquet")
    assert fields_of(tmp_path / "a.parquet") == [{"image": image}]


def test_folder_reads_its_files_in_order_and_no_metadata(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[2:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "picture.png").write_bytes(b"")
    assert fields_of(tmp_path) == ROWS
    assert (tmp_path / "dataset_infos.json").exists()


def test_folder_leaves_held_out_splits_out_and_says_so(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "test.jsonl", ROWS[2:])
    notices = []
    rows = list(read_rows(parse_spec(str(tmp_path)), announce=notices.append))
    assert [row.fields for row in rows] == ROWS[:2]
    assert len(notices) == 1
    assert "test.jsonl left out" in notices[0]
    assert fields_of(f"{tmp_path}:test") == ROWS[2:]
    assert fields_of(f"{tmp_path}:test/train") == ROWS[2:] + ROWS[:2]


def test_subset_that_is_not_there(tmp_path):
    write_jsonl(tmp_path / "easy.jsonl")
    with pytest.raises(DataError, match="no subset 'hard'; the folder holds easy"):
        rows_of(f"{tmp_path}:hard")
    with pytest.raises(DataError, match="a file has no subsets"):
        rows_of(f"{tmp_path / 'easy.jsonl'}:hard")


def test_folder_saved_by_datasets(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    (tmp_path / "saved" / "cache-123.arrow").write_bytes(b"left over")
    assert fields_of(tmp_path / "saved") == ROWS


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match="no data file"):
        rows_of(tmp_path)


def test_spec_syntax(tmp_path):
    spec = parse_spec("hf::owner/name:one/two#500")
    assert (spec.hub, spec.hub_id, spec.subsets, spec.sample) == ("hf", "owner/name", ("one", "two"), 500)
    assert parse_spec("owner/name").hub == "ms"
    assert parse_spec("owner/name", use_hf=True).hub == "hf"
    assert parse_spec("ms::owner/name", use_hf=True).hub == "ms"
    assert parse_spec("hf::gsm8k:main").hub_id == "gsm8k"
    path = write_jsonl(tmp_path / "a.jsonl")
    assert parse_spec(f"{path}#3").sample == 3
    assert parse_spec(f"{path}#3").path == path
    # A name that exists is a path, whatever is in it.
    odd = write_jsonl(tmp_path / "b:c#4")
    assert parse_spec(str(odd)).path == odd
    assert parse_spec(str(odd)).sample is None
    assert parse_spec(f"{odd}#2").sample == 2


@pytest.mark.parametrize(
    "text", ["data/missing.jsonl", "./owner/name", "/no/such/folder", "gsm8k", "a.csv#5"]
)
def test_a_missing_local_path_is_no_hub_id(text):
    with pytest.raises(DataError, match="no file or folder"):
        parse_spec(text)


@pytest.mark.parametrize("text", ["owner/name#", "owner/name#many", "owner/name#0"])
def test_sample_size_must_be_a_number(text):
    with pytest.raises(DataError, match="after # comes how many rows"):
        parse_spec(text)


def test_sample_less_than_all():
    items = list(range(10))
    assert sample(items, 4, shuffle=False, seed=0) == [0, 1, 2, 3]
    drawn = sample(items, 4, shuffle=True, seed=0)
    assert len(set(drawn)) == 4
    assert drawn == sample(items, 4, shuffle=True, seed=0)
    assert drawn != sample(items, 4, shuffle=True, seed=1)
    assert sample(items, None, shuffle=True, seed=0) == items


def test_sample_more_than_all_repeats_the_set():
    drawn = sample(list(range(10)), 25, shuffle=True, seed=0)
    assert drawn[:20] == list(range(10)) * 2
    assert len(set(drawn[20:])) == 5
    assert set(Counter(drawn).values()) == {2, 3}


def test_offline_hub_says_what_to_do(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'owner/name'.*Hugging Face.*HF_HUB_OFFLINE is set.*give its path"):
        rows_of("hf::owner/name")


def test_a_local_path_imports_no_hub(tmp_path):
    import subprocess
    import sys

    path = write_jsonl(tmp_path / "a.jsonl")
    code = (
        "import sys; from raytune_rl.data.sources import parse_spec, read_rows; "
        f"assert len(list(read_rows(parse_spec({str(path)!r})))) == 5; "
        "heavy = {'datasets', 'modelscope', 'torch', 'ray', 'huggingface_hub'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_json_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    """Whatever the pieces, they may end inside a string, an escape, a number or white space."""
    monkeypatch.setattr("raytune_rl.data.json_text._BLOCK", 1)
    rows = [{"a": 'ü\n"\\' * number, "n": 12.5e3, "b": [True, None]} for number in range(9)]
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent), encoding="utf-8-sig")
        assert [row.fields for row in read_rows(parse_spec(str(path)))] == rows
    lines = [row.line for row in read_rows(parse_spec(str(path)))]
    text = path.read_text(encoding="utf-8-sig").splitlines()
    assert [text[line - 1].strip() for line in lines] == ["{"] * 9
    path.write_text('[{"a": 1}, {"a": "never closed}]')
    good, broken = read_rows(parse_spec(str(path)))
    assert good.fields == {"a": 1}
    assert broken.reason.startswith("broken JSON: Unterminated string")
