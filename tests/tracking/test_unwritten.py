"""A disk that is full costs lines, which are counted, and no training."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_rl.tracking.line_file import LineFile
from raytune_rl.tracking.logger import RunLogger
from raytune_rl.tracking.run_dir import RunDir
from raytune_rl.tracking.unwritten import missing
from tests.disks import small_disk

KIB = 1024


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    with small_disk(tmp_path, 64):
        yield tmp_path


def test_lines_are_whole_or_counted_and_later_ones_are_tried(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = LineFile(small / "log.jsonl")
    rest = small / "rest"
    rest.write_bytes(b"x" * 48 * KIB)
    file.append([json.dumps({"row": 0}) + "\n"])
    for row in (1, 2):
        file.append([json.dumps({"row": row, "text": "y" * 32 * KIB}) + "\n"] * 2)
    rest.unlink()
    file.append([json.dumps({"row": 3}) + "\n"])
    file.close()
    assert [json.loads(line)["row"] for line in (small / "log.jsonl").read_text().splitlines()] == [0, 3]
    assert missing(small) == {"log.jsonl": 4}
    assert capsys.readouterr().err.count("No space left on device. Training goes on") == 1


def test_a_full_disk_ends_no_log(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.create(small)
    with RunLogger(run, ["tensorboard"], 9) as log:
        (small / "rest").write_bytes(b"x" * (os.statvfs(small).f_bavail * os.statvfs(small).f_frsize))
        for step in range(1, 400):
            log.log(step, {"loss": 1.0, "text": "z" * KIB})
        log.close({"status": "finished"})
    lost = missing(run.path)
    assert lost["logging.jsonl"] > 300
    err = capsys.readouterr().err
    assert err.count("logging.jsonl cannot be written") == 1


def test_a_disk_that_fails_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        def __init__(self, file: object) -> None:
            self.file = file

        def fileno(self) -> int:
            return self.file.fileno()  # type: ignore[attr-defined,no-any-return]

        def write(self, data: memoryview) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def close(self) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = LineFile(tmp_path / "log.jsonl")
    file._file = Failing(file._file)  # type: ignore[assignment]
    for _ in range(3):
        file.append(["{}\n"])
    file.close()
    assert missing(tmp_path) == {"log.jsonl": 4}
    assert capsys.readouterr().err.count("Input/output error") == 1
