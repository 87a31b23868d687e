"""The clients of the hubs are replaced by a folder that looks like a download; `datasets` is real."""

import importlib
import json

import pytest

from raytune_rl.data import hubs
from raytune_rl.data.sources import data_set_files, parse_spec, read_rows
from raytune_rl.errors import DataError

# Not an import: the package hides this module behind its function of the same name.
CLIENT = importlib.import_module("modelscope.hub.snapshot_download")
CARD = """---
configs:
- config_name: one
  data_files:
  - split: train
    path: one/train.jsonl
  - split: test
    path: one/test.jsonl
- config_name: two
  data_files:
  - split: train
    path: two/train.jsonl
---
"""


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    folder = tmp_path / "snapshot"
    for name, count in (("one/train", 3), ("one/test", 1), ("two/train", 2)):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"from": name, "n": i}) + "\n" for i in range(count)))
    (folder / "README.md").write_text(CARD)
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked = []

    def download(dataset_id):
        asked.append(dataset_id)
        return str(folder)

    monkeypatch.setattr(CLIENT, "dataset_snapshot_download", download)
    return asked


def read(text):
    return list(read_rows(parse_spec(text)))


def test_a_subset_is_read_without_its_test_split(snapshot):
    rows = read("ms::owner/name:one")
    assert [(row.fields["from"], row.fields["n"]) for row in rows] == [("one/train", i) for i in range(3)]
    assert [(row.source, row.line) for row in rows] == [("ms::owner/name:one[train]", i) for i in (1, 2, 3)]
    assert snapshot == ["owner/name"]


def test_several_and_all_subsets(snapshot):
    rows = read("owner/name:two/one")
    expected = [("two", 1), ("two", 2), ("one", 1), ("one", 2), ("one", 3)]
    assert [(row.source, row.line) for row in rows] == [
        (f"ms::owner/name:{s}[train]", n) for s, n in expected
    ]
    assert len(read("owner/name:all")) == 5


def test_no_subset_where_there_are_several_lists_them(snapshot):
    with pytest.raises(DataError, match="several subsets and none is the default: one, two"):
        read("owner/name")


def test_a_subset_that_is_not_there(snapshot):
    with pytest.raises(DataError, match=r"'owner/name', subset 'three', could not be loaded from ModelScope"):
        read("owner/name:three")


def test_a_client_that_fails_is_a_data_error(monkeypatch):
    def fail(dataset_id):
        raise ConnectionError("no route")

    monkeypatch.setattr(CLIENT, "dataset_snapshot_download", fail)
    with pytest.raises(
        DataError, match=r"'owner/name' could not be loaded from ModelScope \(no route\).*hf::owner/name"
    ):
        read("owner/name")


def test_connection_trouble_is_tried_again_but_a_missing_name_is_not(monkeypatch):
    monkeypatch.setattr(hubs, "_offline", lambda: False)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    spec = parse_spec("hf::owner/name")
    calls = []

    def flaky():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("no route")
        return "there"

    assert hubs._asked(spec, None, flaky) == "there"
    calls.clear()

    def missing():
        calls.append(1)
        raise FileNotFoundError("no such data set")

    with pytest.raises(DataError, match="no such data set"):
        hubs._asked(spec, None, missing)
    assert len(calls) == 1


def test_the_files_of_a_hub_data_set_are_known(snapshot):
    """Encoded rows are kept under the content of these files."""
    (file,) = data_set_files(parse_spec("ms::owner/name:two"))
    assert file.is_file()
    assert file.suffix == ".arrow"
