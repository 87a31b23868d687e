from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_rl.export.directory import whole_directory
from raytune_rl.export.errors import ExportError

WRITER = """
import sys, time
from pathlib import Path
from raytune_rl.export.directory import whole_directory
with whole_directory(Path(sys.argv[1]), overwrite=True) as path:
    (path / "config.json").write_text("new")
    print("writing", flush=True)
    time.sleep(60)
"""


def write(target: Path, text: str = "new", overwrite: bool = False) -> None:
    with whole_directory(target, overwrite=overwrite) as path:
        (path / "sub").mkdir()
        (path / "sub" / "file").write_text(text)
        (path / "config.json").write_text(text)
        assert not (target / "sub").exists() or (target / "config.json").read_text() != text


def write_and_fail(target: Path, error: type[BaseException]) -> None:
    with whole_directory(target, overwrite=True) as path:
        (path / "config.json").write_text("new")
        raise error


def write_too_late(target: Path) -> None:
    with whole_directory(target, overwrite=False) as path:
        (path / "config.json").write_text("mine")
        target.mkdir()
        (target / "config.json").write_text("theirs")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def writer(tmp_path: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing `tmp_path/model`."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "model")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_it_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    write(target)
    assert (target / "sub" / "file").read_text() == "new"
    assert names(target.parent) == ["model"]


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path / "model")
    assert names(tmp_path) == ["model"]


def test_nothing_remains_of_a_failure(tmp_path: Path) -> None:
    write(tmp_path / "model", "old")
    for error in (ValueError, KeyboardInterrupt, FileNotFoundError):
        with pytest.raises(error):
            write_and_fail(tmp_path / "model", error)
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_a_file_system_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        write(tmp_path / "file" / "model")


def test_somebody_else_was_faster(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exists"):
        write_too_late(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "theirs"
    assert names(tmp_path) == ["model"]


def test_sigterm_leaves_nothing(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    writer.send_signal(signal.SIGTERM)
    assert writer.wait(timeout=30) == 128 + signal.SIGTERM
    assert names(tmp_path) == []


def test_sigkill_leaves_no_target_and_the_next_export_cleans_up(
    tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    write(tmp_path / "other")
    assert len(names(tmp_path)) == 2
    write(tmp_path / "model", "ours")
    assert len(names(tmp_path)) == 3, "what a living process writes is left alone"
    writer.kill()
    writer.wait()
    write(tmp_path / "model", "again", overwrite=True)
    assert names(tmp_path) == ["model", "other"]


def test_an_old_target_whose_replacement_was_killed_is_put_back(tmp_path: Path) -> None:
    write(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / ".model.old-0123abcd")
    with pytest.raises(ExportError, match="exists"):
        write(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]
