"""Which copies are made, without Ray: what is wanted under a name takes the place of what was not begun."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from raytune_rl.runtime import copies


def test_of_what_changes_only_the_newest_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    free, first, last = threading.Event(), threading.Event(), threading.Event()

    def wait(refs: list[Any], **_: Any) -> None:
        begun.append(list(refs))
        (last if refs == ["last"] else first).set()
        assert free.wait(10)

    monkeypatch.setattr(copies.ray, "wait", wait)
    made = copies.Copies()
    made.keep(["policy 1"], newest_of="policy")
    assert first.wait(10)
    for refs, name in (
        (["answer 1"], None),
        (["policy 2"], "policy"),
        (["critic 1"], "critic"),
        (["answer 2"], None),
        (["policy 3"], "policy"),
    ):
        made.keep(refs, newest_of=name)
    made.keep(["last"])
    free.set()
    assert last.wait(10)
    made.end()
    assert begun == [["policy 1"], ["answer 1"], ["critic 1"], ["answer 2"], ["policy 3"], ["last"]]
