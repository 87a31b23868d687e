"""Splits and subsets by name, in folders and on hubs; nothing is mixed or left out without a word."""

import gzip
import importlib
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from raytune_rl.data.load import load_examples
from raytune_rl.data.sources import data_set_files, parse_spec, read_rows
from raytune_rl.errors import DataError

CLIENT = importlib.import_module("modelscope.hub.snapshot_download")


def put(folder, *files):
    """Files of one row each, which says where it is from."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"from": name}
        if path.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist([row]), path)
        elif path.suffix == ".gz":
            path.write_bytes(gzip.compress(json.dumps(row).encode()))
        else:
            path.write_text(json.dumps(row) + "\n")
    return folder


def read(text):
    notices = []
    rows = list(read_rows(parse_spec(str(text)), announce=notices.append))
    return [row.fields["from"] for row in rows], notices


def card(folder, configs):
    lines = ["---", "license: mit", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, pattern in splits.items():
            lines += [f"  - split: {split}", f"    path: {pattern}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# A data set"]) + "\n")


HUB_LAYOUT = [
    f"data/{split}-00000-of-00001.parquet" for split in ("test_sft", "train_gen", "train_prefs", "train_sft")
]


@pytest.mark.parametrize("with_card", [True, False])
def test_training_splits_of_a_folder_are_not_mixed_without_a_word(tmp_path, with_card):
    put(tmp_path, *HUB_LAYOUT)
    if with_card:
        card(
            tmp_path,
            {"default": {s: f"data/{s}-*" for s in ("train_gen", "train_prefs", "train_sft", "test_sft")}},
        )
    rows, notices = read(tmp_path)
    assert rows == HUB_LAYOUT[1:]
    assert len(notices) == 2
    assert "test_sft-00000-of-00001.parquet left out as held-out splits; to use one write" in notices[0]
    assert notices[1].endswith(
        f"the splits train_gen, train_prefs, train_sft are read together; "
        f"for one of them write `{tmp_path}[train_gen]`"
    )


@pytest.mark.parametrize(
    "written", ["{}:train_prefs", "{}[train_prefs]", "{}[train_prefs]#1", "{}:data[train_prefs]"]
)
def test_a_split_of_a_folder_by_name(tmp_path, written):
    assert read(written.format(put(tmp_path, *HUB_LAYOUT))) == (
        ["data/train_prefs-00000-of-00001.parquet"],
        [],
    )


def test_several_splits_and_one_that_is_not_there(tmp_path):
    put(tmp_path, *HUB_LAYOUT)
    assert len(read(f"{tmp_path}[train_sft/test_sft]")[0]) == 2
    with pytest.raises(
        DataError, match="no split 'valid'; there are test_sft, train_gen, train_prefs, train_sft"
    ):
        read(f"{tmp_path}[valid]")
    with pytest.raises(DataError, match="no subset 'valid'; the folder holds test_sft, train_gen"):
        read(f"{tmp_path}:valid")
    with pytest.raises(DataError, match="a file has no splits"):
        read(f"{tmp_path / HUB_LAYOUT[0]}[test_sft]")


@pytest.mark.parametrize(
    "text", ["owner/name[]", "owner/name:one[a//b]", "owner/name[train[:10]]", "owner/name[:10]"]
)
def test_brackets_hold_names(text):
    with pytest.raises(DataError, match=r"names of splits|a part of a split|no file or folder"):
        parse_spec(text)


def test_the_syntax_of_splits(tmp_path):
    spec = parse_spec("hf::owner/name:one/two[train_sft/test]#5")
    assert (spec.hub_id, spec.subsets, spec.splits, spec.sample) == (
        "owner/name",
        ("one", "two"),
        ("train_sft", "test"),
        5,
    )
    odd = put(tmp_path, "a[1].jsonl") / "a[1].jsonl"
    assert parse_spec(f"{odd}#2").path == odd
    assert parse_spec(f"{tmp_path}[train]").splits == ("train",)


def test_shards_are_one_split_and_a_sub_folder_keeps_its_test_split_out(tmp_path):
    put(tmp_path, "train-1.jsonl", "train-2.jsonl.gz", "train_3.ndjson")
    assert read(tmp_path) == (["train-1.jsonl", "train-2.jsonl.gz", "train_3.ndjson"], [])
    put(tmp_path / "more", "main/train.jsonl", "main/test.jsonl")
    rows, notices = read(f"{tmp_path / 'more'}:main")
    assert rows == ["main/train.jsonl"]
    assert "main/test.jsonl left out" in notices[0]
    assert read(f"{tmp_path / 'more'}:main[test]")[0] == ["main/test.jsonl"]


def test_subsets_of_a_card(tmp_path):
    put(tmp_path, "m/a.jsonl", "s/a.jsonl", "s/b.jsonl")
    card(tmp_path, {"main": {"train": "m/*"}, "socratic": {"train": "s/a.jsonl", "test": "s/b.jsonl"}})
    assert read(f"{tmp_path}:main") == (["m/a.jsonl"], [])
    rows, notices = read(f"{tmp_path}:socratic")
    assert rows == ["s/a.jsonl"]
    assert read(f"{tmp_path}:socratic[test]")[0] == ["s/b.jsonl"]
    rows, notices = read(tmp_path)
    assert rows == ["m/a.jsonl", "s/a.jsonl"]
    assert "the subsets main, socratic are read together; for one of them write" in notices[0]
    card(tmp_path, {"default": {"train": "m/*"}, "socratic": {"train": "s/*"}})
    rows, notices = read(tmp_path)
    assert rows == ["m/a.jsonl"]
    assert "its default subset 'default' is read; there are also socratic" in notices[0]


@pytest.mark.parametrize(
    "text",
    [
        "no header",
        "---\n: [\n---\n",
        "---\nconfigs: 3\n---\n",
        "---\nconfigs:\n- config_name: x\n---\n",
        "---\nconfigs:\n- data_files: ../*\n- data_files: '**x'\n- data_files: ''\n---\n",
    ],
)
def test_a_card_that_says_nothing_of_the_files(tmp_path, text):
    put(tmp_path, "train.jsonl")
    (tmp_path / "README.md").write_text(text)
    assert read(tmp_path) == (["train.jsonl"], [])


def test_all_is_a_subset_where_there_is_one(tmp_path):
    put(tmp_path, "all/a.jsonl", "en/a.jsonl")
    assert read(f"{tmp_path}:all")[0] == ["all/a.jsonl"]
    put(tmp_path / "x", "cn/a.jsonl", "en/a.jsonl")
    rows, notices = read(f"{tmp_path / 'x'}:all")
    assert (rows, notices) == (["cn/a.jsonl", "en/a.jsonl"], [])


def test_a_folder_of_parquet_files_as_spark_writes_it(tmp_path):
    put(
        tmp_path,
        "t.parquet/part-00000-0a1b-c000.snappy.parquet",
        "t.parquet/part-00001-0a1b-c000.snappy.parquet",
    )
    (tmp_path / "t.parquet" / "_SUCCESS").write_text("")
    rows, notices = read(tmp_path / "t.parquet")
    assert (len(rows), notices) == (2, [])
    assert len(read(f"{tmp_path}:t")[0] if (tmp_path / "t").exists() else read(tmp_path)[0]) == 2


def test_a_file_beside_its_compressed_twin_is_told(tmp_path):
    rows, notices = read(put(tmp_path, "a.jsonl", "a.jsonl.gz", "b.jsonl"))
    assert len(rows) == 3
    assert notices == [
        f"{tmp_path}: a.jsonl and a.jsonl.gz are all read; if they hold the same rows, keep one"
    ]


def test_a_note_beside_rows_is_no_data_and_texts_alone_are(tmp_path):
    put(tmp_path / "rows", "train.jsonl")
    (tmp_path / "rows" / "how.txt").write_text("made by hand")
    rows, (notice,) = read(tmp_path / "rows")
    assert rows == ["train.jsonl"]
    assert "1 files are not read (1 .txt): how.txt" in notice
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text("Once upon a time.")
    assert len(load_examples([str(tmp_path / "texts")], task="sft").examples) == 1


def test_files_that_are_not_read_are_named_in_one_line(tmp_path):
    put(tmp_path, "train.jsonl")
    for name in (
        "more.jsonl.lz4",
        "b.pkl",
        "c.pkl",
        "picture.png",
        "LICENSE",
        "README.md",
        ".hidden",
        "notes",
    ):
        (tmp_path / name).write_text("x")
    rows, notices = read(tmp_path)
    assert rows == ["train.jsonl"]
    (notice,) = notices
    assert (
        "4 files are not read (2 .pkl, 1 .lz4, 1 without a suffix): b.pkl, c.pkl, more.jsonl.lz4, notes"
        in notice
    )
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"no data file in this folder; known are .*4 files are not read"):
        read(tmp_path)


def test_data_set_dict_saved_by_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({s: Dataset.from_list([{"from": s}]) for s in ("train", "test")}).save_to_disk(
        str(tmp_path / "s")
    )
    rows, notices = read(tmp_path / "s")
    assert rows == ["train"]
    assert "left out as held-out" in notices[0]
    assert read(f"{tmp_path / 's'}[test]")[0] == ["test"]
    assert read(f"{tmp_path / 's'}:test")[0] == ["test"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`(configs) -> None`: a data set of ModelScope's with these subsets and splits, a row each."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "snapshot"
    monkeypatch.setattr(CLIENT, "dataset_snapshot_download", lambda _: str(folder))

    def make(configs):
        for name, splits in configs.items():
            put(folder, *(f"{name}/{split}.jsonl" for split in splits))
        card(folder, {name: {s: f"{name}/{s}.jsonl" for s in splits} for name, splits in configs.items()})

    return make


def test_splits_of_a_hub(hub):
    hub({"default": ["train_prefs", "train_sft", "test_prefs"]})
    with pytest.raises(
        DataError, match=r"has no split 'train', but .*Say which: `owner/name:default\[train_prefs\]`"
    ):
        read("owner/name")
    assert read("owner/name[test_prefs]") == (["default/test_prefs.jsonl"], [])
    assert read("owner/name:default[train_sft/train_prefs]")[0] == [
        "default/train_sft.jsonl",
        "default/train_prefs.jsonl",
    ]
    with pytest.raises(
        DataError, match=r"'owner/name:default' has no split 'valid'; there are train_prefs, train_sft"
    ):
        read("owner/name[valid]")
    (file,) = data_set_files(parse_spec("owner/name[train_sft]"))
    assert file.suffix == ".arrow"


def test_a_split_of_a_hub_in_the_place_of_a_subset(hub):
    hub({"default": ["train_sft", "test_sft"]})
    assert read("owner/name:test_sft") == (["default/test_sft.jsonl"], [])
    with pytest.raises(DataError, match="'owner/name', subset 'other', could not be loaded"):
        read("owner/name:other")


def test_model_scopes_own_description_of_a_data_set_is_not_read(hub, tmp_path):
    """https://github.com/huggingface/datasets/issues/7334"""
    hub({"default": ["train"]})
    infos = {"default": {"features": {"from": {"_type": "Value"}}, "splits": {"train": {"name": "train"}}}}
    (tmp_path / "snapshot" / "dataset_infos.json").write_text(json.dumps(infos))
    assert read("owner/name") == (["default/train.jsonl"], [])
    (tmp_path / "snapshot" / "README.md").unlink()
    assert read("owner/name") == (["default/train.jsonl"], [])


def test_the_only_split_of_a_hub_is_read_with_a_word(hub):
    hub({"default": ["test"]})
    assert read("owner/name") == (
        ["default/test.jsonl"],
        ["owner/name: it has no split `train`; 'test' is read"],
    )


def test_ultrachat_is_read_as_ms_swift_reads_it(hub):
    hub({"default": ["train_sft", "train_gen", "test_sft"]})
    for name in ("swift/ultrachat_200k", "ms::HuggingFaceH4/ultrachat_200k"):
        rows, notices = read(name)
        assert rows == ["default/train_sft.jsonl"]
        assert any("the splits train_sft are read" in notice for notice in notices)
    assert read("swift/ultrachat_200k[test_sft]")[0] == ["default/test_sft.jsonl"]


def test_a_subset_of_a_hub_that_is_called_all(hub):
    hub({"all": ["train"], "cn": ["train"], "en": ["train"]})
    assert read("owner/name:all")[0] == ["all/train.jsonl"]
    assert read("open-r1/DAPO-Math-17k-Processed")[0] == ["all/train.jsonl"]
    assert read("owner/name:cn/en")[0] == ["cn/train.jsonl", "en/train.jsonl"]


def test_registered_subsets_of_a_hub(hub):
    hub({"v0": ["train"], "v1": ["train"]})
    with pytest.raises(DataError, match="several subsets and none is the default: v0, v1"):
        read("ServiceNow-AI/R1-Distill-SFT")
    assert read("ServiceNow-AI/R1-Distill-SFT:all")[0] == ["v0/train.jsonl", "v1/train.jsonl"]
    hub({"main": ["train"], "socratic": ["train"]})
    assert read("modelscope/gsm8k")[0] == ["main/train.jsonl"]
