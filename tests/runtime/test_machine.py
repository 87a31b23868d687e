"""The needs of a cluster of one's own on a machine: odd TMPDIRs, users without a name or a home, tokens."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from raytune_rl.errors import ConfigError
from raytune_rl.runtime import machine
from raytune_rl.runtime.machine import (
    LONGEST_TMPDIR,
    make_token,
    missing_identity,
    private_folder,
    ray_folder,
)


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "SHORT", tmp_path)
    return tmp_path


def test_a_long_tmpdir_gets_a_short_private_stand_in(short: Path) -> None:
    fits, long = "/" + "t" * (LONGEST_TMPDIR - 1), "/" + "t" * LONGEST_TMPDIR
    assert ray_folder({}) is None
    assert ray_folder({"TMPDIR": fits}) is None
    assert ray_folder({"TMPDIR": long, "RAY_TMPDIR": fits}) is None, "the user's own word counts"
    folder = ray_folder({"TMPDIR": long})
    assert folder is not None
    assert folder == ray_folder({"TMPDIR": long}), "the same for each run"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match=r"RAY_TMPDIR=/t+ is too long"):
        ray_folder({"RAY_TMPDIR": long})


def test_the_stand_in_fits_rays_sockets() -> None:
    session = "session_2026-11-29_23-59-59_999999_4194304"
    for folder in ("/" + "t" * (LONGEST_TMPDIR - 1) + "/ray", f"/tmp/ray-{2**32 - 2}"):
        assert len(f"{folder}/{session}/sockets/plasma_store.99") <= 107


def test_a_folder_that_somebody_else_laid_out_is_not_used(short: Path) -> None:
    (short / "elsewhere").mkdir()
    (short / f"ray-{os.getuid()}").symlink_to(short / "elsewhere")
    (short / f"open-{os.getuid()}").mkdir(mode=0o755)
    for name in ("ray", "open"):
        folder = private_folder(name)
        assert folder.name != f"{name}-{os.getuid()}"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_user_without_name_or_home_gets_both(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    assert missing_identity({"HOME": str(short)}) == {}
    assert missing_identity({"HOME": "/nowhere"}).keys() == {"HOME"}
    monkeypatch.setattr(machine.pwd, "getpwuid", nobody)
    found = missing_identity({})
    assert found["USER"] == f"user{os.getuid()}"
    assert os.access(found["HOME"], os.W_OK)
    assert missing_identity({"HOME": str(short), "LOGNAME": "me"}) == {}


def test_a_token_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    kept = tmp_path / ".ray" / "auth_token"
    for mode in ({}, {"RAY_AUTH_MODE": "token"}):
        assert make_token({"HOME": str(tmp_path), **mode}) == {}
        token = kept.read_text()
        assert len(token) == 64
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert make_token({"HOME": str(tmp_path)}) == {}
    assert kept.read_text() == token, "never another one"


@pytest.mark.parametrize(
    "environ",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "x"}, {"RAY_AUTH_TOKEN_PATH": "/x"}],
)
def test_where_the_user_has_seen_to_it_no_token_is_made(tmp_path: Path, environ: dict[str, str]) -> None:
    assert make_token({"HOME": str(tmp_path), **environ}) == {}
    assert not list(tmp_path.iterdir())


def test_without_a_place_to_keep_it_the_token_is_the_processes_own(tmp_path: Path) -> None:
    (tmp_path / ".ray").touch()  # no folder, whoever we are
    assert len(make_token({"HOME": str(tmp_path)})["RAY_AUTH_TOKEN"]) == 64
