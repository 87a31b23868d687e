import math
import pickle

import pytest

from raytune_rl.tracking.metrics import MetricSums

PARTS = [
    MetricSums(mean={"kl": (1.0, 2)}, max={"high": -3.0}, min={"low": 4.0}, sum={"failed": 1.0}),
    MetricSums(mean={"kl": (8.0, 1), "loss": (6.0, 3)}, max={"high": -1.0}, min={"low": 5.0}),
    MetricSums(max={"high": -2.0}, min={"low": 3.0}, sum={"failed": 2.0}),
]


def test_the_mean_is_of_all_tokens_not_of_the_parts() -> None:
    result = MetricSums.merge_all(PARTS).finalize()
    assert result == {"kl": 3.0, "loss": 2.0, "high": -1.0, "low": 3.0, "failed": 3.0}


def test_order_and_grouping_do_not_matter() -> None:
    a, b, c = PARTS
    expected = a.merge(b).merge(c).finalize()
    assert c.merge(a.merge(b)).finalize() == expected
    assert b.merge(c).merge(a).finalize() == expected
    assert a.finalize()["kl"] == 0.5, "merging must not change its parts"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nan_is_never_lost(order: tuple[int, int]) -> None:
    nan = {"x": math.nan}
    parts = [
        MetricSums(mean={"m": (math.nan, 1)}, max=nan),
        MetricSums(mean={"m": (1.0, 1)}, max={"x": 1.0}),
    ]
    result = parts[order[0]].merge(parts[order[1]]).finalize()
    assert math.isnan(result["m"])
    assert math.isnan(result["x"])


def test_a_mean_of_nothing_is_absent() -> None:
    assert MetricSums(mean={"x": (0.0, 0)}).finalize() == {}


def test_one_name_for_two_kinds_is_refused() -> None:
    with pytest.raises(ValueError, match="x"):
        MetricSums(mean={"x": (1.0, 1)}, max={"x": 1.0}).finalize()


def test_it_travels_between_processes() -> None:
    assert pickle.loads(pickle.dumps(PARTS[0])) == PARTS[0]
