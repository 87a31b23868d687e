"""The reports of long work, and that its failures come through."""

from __future__ import annotations

import pytest

from raytune_rl.pipelines import lifecycle
from raytune_rl.pipelines.lifecycle import stage
from raytune_rl.prepare import progress
from raytune_rl.prepare.progress import RowProgress, Tell, stream_progress


def test_sentences_come_before_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", -1.0)

    def work(tell: Tell) -> list[int]:
        counted = RowProgress("tokenized", tell, 1500)
        counted(1000)
        counted(500)
        return [7, 8]

    said = ["tokenized 1,000 of 1,500 rows", "tokenized 1,500 of 1,500 rows"]
    assert list(stream_progress(work)) == [*said, 7, 8]


def test_a_failure_is_raised_where_the_sentences_are_heard() -> None:
    def work(tell: Tell) -> list[int]:
        tell("half")
        raise ValueError("broken")

    heard = stream_progress(work)
    assert next(heard) == "half"
    with pytest.raises(ValueError, match="broken"):
        next(heard)


def test_a_log_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stage("reading") as tell:
        tell("too soon")
        monkeypatch.setattr(lifecycle, "LOGGED_EVERY_S", 0.0)
        tell("read 1,000 rows")
    assert capsys.readouterr().err.splitlines() == ["reading ...", "reading: read 1,000 rows"]
