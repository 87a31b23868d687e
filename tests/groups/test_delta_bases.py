"""When a bucket's base is renewed, and what a version says it stands on."""

from __future__ import annotations

from raytune_rl.groups.delta_bases import DeltaBases
from raytune_rl.protocol.weights import DeltaOn, Manifest, TensorEntry

INDEX = ((TensorEntry("a", "uint8", (100,)),), (TensorEntry("b", "uint8", (50,)),))


def test_the_first_version_is_whole_and_later_ones_stand_on_it() -> None:
    bases = DeltaBases()
    assert bases.offered(2) == [None, None]
    assert bases.published(["a0", "b0"], INDEX, [None, None]) == (None, None)
    assert bases.offered(2) == ["a0", "b0"]
    deltas = bases.published(["a1", "b1"], INDEX, [10, 20])
    assert deltas == (DeltaOn("a0", 10), DeltaOn("b0", 20)), "not on one another: one late step is enough"
    manifest = Manifest(1, "full", ("a1", "b1"), INDEX, None, deltas)
    assert (manifest.nbytes, manifest.sent_nbytes, manifest.held_nbytes) == (150, 30, 180)


def test_a_base_is_renewed_once_its_differences_have_cost_as_much() -> None:
    bases = DeltaBases()
    bases.published(["a0", "b0"], INDEX, [None, None])
    for version, due in ((1, "b0"), (2, "b0"), (3, None)):
        bases.published([f"a{version}", f"b{version}"], INDEX, [2, 20])
        assert bases.offered(2) == ["a0", due], "each bucket by itself"
    assert bases.published(["a4", "b4"], INDEX, [2, None]) == (DeltaOn("a0", 2), None)
    assert bases.offered(2) == ["a0", "b4"]


def test_where_a_rank_published_a_bucket_whole_that_is_the_base() -> None:
    """The base was lost, or nearly everything changed."""
    bases = DeltaBases()
    bases.published(["a0", "b0"], INDEX, [None, None])
    assert bases.published(["a1", "b1"], INDEX, [None, 5]) == (None, DeltaOn("b0", 5))
    assert bases.offered(2) == ["a1", "b0"]


def test_versions_without_differences_are_as_large_as_their_tensors() -> None:
    manifest = Manifest(0, "full", ("a0", "b0"), INDEX)
    assert manifest.bases == (None, None)
    assert manifest.nbytes == manifest.sent_nbytes == manifest.held_nbytes == 150
