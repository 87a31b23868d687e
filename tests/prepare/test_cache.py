"""Rows are encoded once: the data task as a run calls it, without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_rl.config import SFTConfig
from raytune_rl.data import encode
from raytune_rl.data.example import RowError
from raytune_rl.data.mapped import MappedColumns, open_columns
from raytune_rl.errors import DataError
from raytune_rl.prepare.cache import UNUSED_DAYS, prune
from raytune_rl.prepare.places import MediaPlaces
from raytune_rl.prepare.sets import quarantined
from raytune_rl.prepare.stream import StreamWorker
from raytune_rl.prepare.task import encode_rows_task
from raytune_rl.protocol.columns import Ragged
from raytune_rl.tiny.model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("cache") / "model", hidden=32, layers=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"query": f"q {n}", "response": "seven " * (90 if n == 3 else n % 5 + 1)} for n in range(20)]
    lines = [json.dumps(row) for row in rows]
    lines[6] = '{"query": '
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


class Task:
    """Calls the data task; counts how often rows were encoded."""

    def __init__(self, tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.quarantine = tmp_path / "cache", tmp_path / "run" / "quarantine.jsonl"
        self.settings: dict[str, Any] = {
            "model": str(model), "dataset": str(data), "strict": False, "max_length": 60,
            "split_dataset_ratio": 0.2, "root_image_dir": str(tmp_path),
        }  # fmt: skip
        self.encoded = 0

        def counting(*args: Any, **options: Any) -> Any:
            self.encoded += 1
            return real(*args, **options)

        real = encode.run_job
        monkeypatch.setattr(encode, "run_job", counting)

    def __call__(self, one_machine: bool = True, **changed: Any) -> list[Any]:
        config = SFTConfig(**{**self.settings, **changed})
        places = MediaPlaces.of(config, one_machine)
        items = encode_rows_task(config, "sft", str(self.quarantine), places, str(self.cache))
        return [item for item in items if not isinstance(item, str)]


@pytest.fixture
def task(tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    return Task(tmp_path, model, data, monkeypatch)


def same(one: list[Any], two: list[Any]) -> bool:
    for a, b in zip(one[1::2], two[1::2], strict=True):
        if a.keys() != b.keys():
            return False
        for name in a:
            x, y = a[name], b[name]
            pairs = [(x.values, y.values), (x.offsets, y.offsets)] if isinstance(x, Ragged) else [(x, y)]
            if not all(np.array_equal(p, q) for p, q in pairs):
                return False
    return all(np.array_equal(a[i], b[i]) for a, b in zip(one[::2], two[::2], strict=True) for i in (0, 1))


def test_a_second_run_takes_what_the_first_has_encoded(task: Task) -> None:
    first = task()
    assert task.encoded == 2, "the rows to train on and the held-out ones"
    bad_rows = task.quarantine.read_text()
    assert sorted(json.loads(line)["line"] for line in bad_rows.splitlines()) == [4, 7]
    task.quarantine.unlink()
    again = task()
    assert task.encoded == 2
    assert same(first, again)
    assert task.quarantine.read_text() == bad_rows, "a run finds its bad rows beside it"
    before, after = first[0][2], again[0][2]
    assert "--load_from_cache_file false" in after.notices[0]
    assert (after.sources, after.dropped) == (before.sources, before.dropped)
    assert quarantined(after, again[2][2]) == len(bad_rows.splitlines())
    assert after.dropped == {"longer than max_length 60": 1}
    assert same(first, task(load_from_cache_file=False))
    assert task.encoded == 4


def test_on_one_machine_columns_are_a_folder_and_elsewhere_arrays(task: Task) -> None:
    mapped, arrays = task(), task(one_machine=False, inline_media=False)
    assert all(isinstance(columns, MappedColumns) for columns in mapped[1::2])
    assert not any(isinstance(columns, MappedColumns) for columns in arrays[1::2])
    assert same(mapped, arrays)


def test_data_that_cannot_be_compared_is_encoded_into_memory(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = task()
    monkeypatch.setattr("raytune_rl.data.fingerprint.fingerprint", lambda *_, **__: None)
    assert same(mapped, task())
    assert task.encoded == 4
    assert len(list(task.cache.iterdir())) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 61},
        {"system": "Be brief."},
        {"loss_scale": "all"},
        {"data_seed": 1},
        {"dataset_shuffle": False},
    ],
)
def test_other_settings_are_other_rows(task: Task, changed: dict[str, Any]) -> None:
    task()
    task(**changed)
    assert task.encoded == 4
    task(dataset_num_proc=2)
    assert task.encoded == 4, "the number of processes makes no difference"


def test_other_content_is_found_out_whatever_the_time_stamp_says(task: Task, data: Path, model: Path) -> None:
    task()
    stamp = data.stat()
    data.write_text(data.read_text().replace("q 5", "p 5"))
    os.utime(data, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    task()
    assert task.encoded == 4
    template = model / "chat_template.jinja"
    before = template.read_text()
    template.write_text("{# changed #}" + before)
    try:
        task()
        assert task.encoded == 6
    finally:
        template.write_text(before)


def test_damage_is_mended(task: Task) -> None:
    task()
    (entry,) = task.cache.iterdir()
    (entry / "train" / "tokens.values.npy").write_bytes(b"")
    open_columns.cache_clear()
    assert len(task()[1]["tokens"]) == 15
    assert task.encoded == 4


def test_a_run_that_stops_leaves_nothing(task: Task) -> None:
    with pytest.raises(RowError, match=r"a\.jsonl:7: broken JSON"):
        task(strict=True)
    assert list(task.cache.iterdir()) == []
    task.cache.rmdir()
    task.cache.write_text("a file")
    with pytest.raises(DataError, match="--dataset_cache_dir"):
        task()


def test_a_stream_sets_a_row_that_is_too_long_aside_once(task: Task, data: Path) -> None:
    changed = {"streaming": True, "max_steps": 4, "shuffle_buffer_size": 20, "split_dataset_ratio": 0}
    config = SFTConfig(**{**task.settings, **changed})
    arguments = (str(data.parent), config, "sft", str(task.quarantine), MediaPlaces.of(config, True))
    with contextlib.chdir(data.parent):  # the worker stays in its folder, this process does not
        worker = StreamWorker(*arguments)
        windows = [worker.window(number) for number in range(3)]
        StreamWorker(*arguments).window(0)
    assert [facts.account.dropped for _, facts in windows] == [{"longer than max_length 60": 1}] * 3
    assert sorted(json.loads(line)["line"] for line in task.quarantine.read_text().splitlines()) == [4, 7]


def test_what_no_run_has_used_for_long_goes_and_nothing_else(tmp_path: Path) -> None:
    old, kept, recent = (tmp_path / (letter * 32) for letter in "abc")
    foreign = tmp_path / "notes"
    for folder in (old, kept, recent, foreign):
        folder.mkdir()
        (folder / "entry.json").write_text("{}")
    long_ago = time.time() - (UNUSED_DAYS + 1) * 24 * 3600
    for folder in (old, kept, foreign):
        os.utime(folder / "entry.json", (long_ago, long_ago))
    notice = prune(tmp_path, kept)
    assert notice is not None
    assert "1 sets of encoded rows, unused for 30 days" in notice
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([kept.name, recent.name, "notes"])
    assert prune(tmp_path, recent) is None, "the entry in use was marked as used"
    assert kept.exists()


def test_a_run_marks_its_entry_and_tells_of_those_that_went(task: Task) -> None:
    task()
    (entry,) = task.cache.iterdir()
    stale = task.cache / ("0" * 32)
    stale.mkdir()
    for folder in (entry, stale):
        (folder / "entry.json").touch()
        os.utime(folder / "entry.json", (0, 0))
    found = task()
    assert task.encoded == 2, "train and held-out rows, once"
    assert any("removed from" in notice for notice in found[0][2].notices)
    assert list(task.cache.iterdir()) == [entry]
    assert (entry / "entry.json").stat().st_mtime > 0


def test_channels_of_rows_are_kept_with_them(task: Task, data: Path) -> None:
    """Each set has its own; a name may be no file's name; another flag is another entry."""
    names = ["math", "code/py", None, "a:b"]
    rows = [{"query": f"q {n}", "response": "yes", "channel": names[n % 4]} for n in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = task()
    assert plain[0].values == {}
    made = task(enable_channel_loss=True)
    assert made[0].values.keys() == {"channel:math", "channel:code/py", "channel:a:b"}
    for facts in made[::2]:
        total = sum(facts.values.values())
        assert set(total.tolist()) == {0.0, 1.0}, "a row is of one channel or of none"
    assert sum(facts.values.get("channel:math", np.zeros(1)).sum() for facts in made[::2]) == 5
    before = task.encoded
    again = task(enable_channel_loss=True)
    assert task.encoded == before, "from the cache"
    for one, other in zip(made[::2], again[::2], strict=True):
        assert one.values.keys() == other.values.keys()
        for name, members in one.values.items():
            np.testing.assert_array_equal(members, other.values[name])


def test_too_many_channels_are_an_error_and_none_a_notice(task: Task, data: Path) -> None:
    rows = [{"query": f"q {n}", "response": "yes", "channel": n} for n in range(200)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"the column 'channel' has 160 different values.*at most 100"):
        task(enable_channel_loss=True)
    data.write_text("".join(json.dumps({"query": f"q {n}", "response": "yes"}) + "\n" for n in range(20)))
    notices = task(enable_channel_loss=True)[0].account.notices
    assert any("no row has the column 'channel'" in notice for notice in notices)
