"""Imports without looking for garbage."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from raytune_rl.runtime.imports import import_once


def test_what_a_module_makes_is_left_out_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_for_test.py").write_text("import gc\non = gc.isenabled()\n")
    (tmp_path / "broken_for_test.py").write_text("raise RuntimeError('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    try:
        import_once("json", "made_for_test")
        assert sys.modules["made_for_test"].on is False
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
        frozen = gc.get_freeze_count()
        import_once("json", "made_for_test")
        assert gc.get_freeze_count() <= frozen, "nothing was imported"
        with pytest.raises(RuntimeError, match="no"):
            import_once("broken_for_test")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        sys.modules.pop("made_for_test", None)
