"""Items on disk behave as a list does."""

from __future__ import annotations

import numpy as np
import pytest

from raytune_rl.data.spool import Chosen, Spool


def test_a_spool_is_a_list_that_grows() -> None:
    spool = Spool(["a", b"bb"])
    assert spool[1] == b"bb"
    spool.append(None)
    assert (len(spool), spool[-1], list(spool)) == (3, None, ["a", b"bb", None])
    assert list(spool[1:]) == [b"bb", None]
    with pytest.raises(IndexError):
        spool[3]


def test_a_choice_keeps_its_own_order_and_may_repeat() -> None:
    chosen = Chosen(Spool(range(5)), np.array([4, 0, 0, 2]))
    assert list(chosen) == [4, 0, 0, 2]
    assert list(chosen[1:3]) == [0, 0]
    assert list(Chosen(chosen, np.array([3, 0]))) == [2, 4], "of a choice as of a list"
