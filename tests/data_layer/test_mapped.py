"""Columns on disk: what is written comes back as it was, mapped, and under its name only when it is whole."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from raytune_rl.data.mapped import ArrayWriter, RaggedWriter, open_columns, written_whole
from raytune_rl.errors import DataError
from raytune_rl.protocol.columns import Ragged

ROWS = [np.array([1, 2, 3], dtype=np.int32), np.empty(0, dtype=np.int32), np.arange(5000, dtype=np.int32)]


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_ragged_column_comes_back(tmp_path: Path, on_disk: bool) -> None:
    folder = tmp_path if on_disk else None
    writer, flags = RaggedWriter("tokens", np.int32, folder), ArrayWriter("flags", np.bool_, folder)
    for row in ROWS:
        writer.append(row)
        flags.extend(np.array([len(row) > 1]))
    column, flag = writer.close(), flags.close()
    assert [column[i].tolist() for i in range(3)] == [row.tolist() for row in ROWS]
    assert flag.tolist() == [True, False, True]
    if not on_disk:
        return
    found = open_columns(str(tmp_path))
    assert found.keys() == {"tokens", "flags"}
    tokens = found["tokens"]
    assert isinstance(tokens, Ragged)
    np.testing.assert_array_equal(tokens.values, column.values)
    assert not tokens.values.flags.writeable
    assert len(pickle.dumps(found)) < 500, "another process opens the folder by its name"
    assert pickle.loads(pickle.dumps(found))["tokens"].values.tolist() == column.values.tolist()


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    home = tmp_path / "entry"
    with pytest.raises(FileNotFoundError), written_whole(home) as folder:
        (folder / "a").rename(folder / "b")
    assert list(tmp_path.iterdir()) == []
    for content in ("one", "two"):
        with written_whole(home) as folder:
            (folder / "a").write_text(content)
            assert not home.exists() or (home / "a").read_text() == "one"
    assert (home / "a").read_text() == "two"
    assert list(tmp_path.iterdir()) == [home]
    young, old = tmp_path / "x.tmp-1", tmp_path / "y.tmp-2"
    for left in (young, old):
        left.mkdir()
    os.utime(old, (0, 0))
    with written_whole(home):
        pass
    assert sorted(tmp_path.iterdir()) == [home, young], "what a killed run left goes, in time"


def test_what_is_gone_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no encoded rows any more"):
        open_columns(str(tmp_path / "gone"))
    (tmp_path / "tokens.values.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot be read"):
        open_columns(str(tmp_path))
