"""Differences of weights: exact to the bit, and none where they would not be smaller."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.runtime import weight_delta
from raytune_rl.runtime.weight_delta import BLOCK, decode, encode, unit_of
from raytune_rl.runtime.weights import to_arrays

U16 = np.dtype(np.uint16)


def raw(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    data = values.view(np.uint8)
    data.setflags(write=False)  # as the object store gives it
    return data


def changed(old: NDArray[np.uint16], places: NDArray[np.int64], seed: int = 0) -> NDArray[np.uint16]:
    new = old.copy()
    new[places] ^= np.random.default_rng(seed).integers(1, 2**16, places.size).astype(np.uint16)
    return new


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.2])
def test_random_changes_come_back_bit_by_bit(share: float) -> None:
    rng = np.random.default_rng(1)
    old = rng.integers(0, 2**16, 5 * BLOCK + 123).astype(np.uint16)
    new = changed(old, np.flatnonzero(rng.random(old.size) < share))
    delta = encode([raw(old)], [raw(new)], U16, old.nbytes // 2)
    assert delta is not None
    assert sum(a.nbytes for a in delta) == 6 * 4 + 4 * np.count_nonzero(old != new)
    np.testing.assert_array_equal(decode([raw(old)], delta), new.view(np.uint8))


def test_places_at_the_borders_of_blocks() -> None:
    old = np.zeros(3 * BLOCK, np.uint16)
    new = changed(old, np.array([0, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 3 * BLOCK - 1]))
    delta = encode([raw(old)], [raw(new)], U16, 10**6)
    assert delta is not None
    assert delta[0].tolist() == [2, 2, 1]
    np.testing.assert_array_equal(decode([raw(old)], delta).view(U16), new)


def test_arrays_may_be_cut_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the base, in the new version, and by how much is looked at in one go."""
    monkeypatch.setattr(weight_delta, "AT_ONCE", BLOCK)
    rng = np.random.default_rng(2)
    old = rng.integers(0, 2**16, 4 * BLOCK + 10).astype(np.uint16)
    new = changed(old, rng.choice(old.size, 300, replace=False))
    empty = raw(old[:0])
    for cuts, others in (((), (7,)), ((BLOCK + 1,), (3, BLOCK)), ((5, 5, 3 * BLOCK), (2, 2 * BLOCK + 7))):
        base = [empty, *(raw(part) for part in np.split(old, cuts)), empty]
        fresh = [raw(part) for part in np.split(new, others)]
        delta = encode(base, fresh, U16, 10**6)
        assert delta is not None
        np.testing.assert_array_equal(decode(base, delta).view(U16), new)


def test_bits_are_compared_not_numbers() -> None:
    old = torch.tensor([0.0, float("nan"), 1.0, float("nan"), 2.0], dtype=torch.bfloat16)
    new = old.clone()
    new[0] = -0.0
    new.view(torch.int16)[3] += 1  # another NaN
    arrays = to_arrays([old]), to_arrays([new])
    delta = encode(*arrays, unit_of([TensorEntry.of("w", old)]), 100)
    assert delta is not None
    assert delta[1].tolist() == [0, 3], "a NaN equals itself"
    np.testing.assert_array_equal(decode(arrays[0], delta), arrays[1][0])


@pytest.mark.parametrize(
    ("dtypes", "width"),
    [
        (["bfloat16"], 2),
        (["float32"], 4),
        (["float32", "bfloat16"], 2),
        (["float64", "float32"], 4),
        (["float8_e4m3fn", "bfloat16"], 1),
        ([], 1),
    ],
)
def test_the_narrowest_type_is_the_unit(dtypes: list[str], width: int) -> None:
    unit = unit_of([TensorEntry("w", dtype, (3,)) for dtype in dtypes])
    assert unit.itemsize == width
    old = np.arange(48, dtype=np.uint8)
    new = old.copy()
    new[[0, 8, 47]] += 1
    delta = encode([raw(old)], [raw(new)], unit, 100)
    assert delta is not None
    np.testing.assert_array_equal(decode([raw(old)], delta), new)


def test_nothing_is_made_that_would_be_too_large() -> None:
    old = np.zeros(1000, np.uint16)
    new = changed(old, np.arange(250))
    assert encode([raw(old)], [raw(new)], U16, 1004) is not None
    assert encode([raw(old)], [raw(new)], U16, 1003) is None
    assert encode([], [], U16, 0) is not None, "a bucket of nothing"


def test_tensors_that_are_no_views_of_whole_units() -> None:
    """Slices of an array begin anywhere in memory."""
    memory = np.zeros(4001, np.uint8)
    old = memory[1:]
    new = old.copy()
    new[[5, 77, 3999]] = 9
    delta = encode([old], [new], U16, 1000)
    assert delta is not None
    np.testing.assert_array_equal(decode([old], delta), new)
