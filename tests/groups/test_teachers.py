"""What teachers add to the advantages of a generation, whoever is asked about which row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from raytune_rl.algorithms.credit.base import Credited
from raytune_rl.algorithms.distillation import ReverseKL, advantages
from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.groups import logprobs
from raytune_rl.groups.start import teacher_coefficients
from raytune_rl.groups.teachers import Teacher, Teachers
from raytune_rl.prepare.judges import teacher_of_rows
from raytune_rl.protocol.model import Settled
from raytune_rl.protocol.rows import RowBatch, RowPointer, TrainBatch
from raytune_rl.runtime.wait import Pending

LENGTHS = np.array([3, 5, 2, 4])
GIVEN: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy"}


@dataclass
class Copies:
    """Workers of a teacher: to every token they add their own number, times the coefficient."""

    number: float
    workers: int
    asked: list[tuple[int, RowBatch]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.workers

    def submit(
        self, rank: int, method: str, batch: RowBatch, advice: ReverseKL, *, what: str, returns: int
    ) -> Pending:
        assert (method, returns) == ("advise", 2)
        coefficient = advice.coefficient
        self.asked.append((rank, batch))
        name = f"teacher {self.number:g}, call {len(self.asked)}"
        answer = np.array([[self.number, coefficient * self.number, 1.0]] * len(batch))
        return Pending([answer, name], "teacher", what, 1.0)


@pytest.fixture(autouse=True)
def _answers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "settle", lambda calls: (list(calls), [call.ref[0] for call in calls]))


def advised(whose: list[int] | None, *numbers: float) -> tuple[Credited, list[Copies]]:
    rows = [RowPointer("tokens", row) for row in range(4)]
    batch = TrainBatch(rows, LENGTHS).with_columns(old_logprobs=rows)
    copies = [Copies(number, 2) for number in numbers]
    made = Teachers([Teacher(one, 0.5, Settled("padded")) for one in copies], max_tokens=64)  # type: ignore[arg-type]
    earned = Credited(batch, np.zeros(4, dtype=np.float32), {"reward_std": 0.25})
    return made.advise(batch, earned, None if whose is None else np.array(whose)), copies


def test_a_token_earns_what_the_teacher_thinks_more_likely() -> None:
    generator = np.random.default_rng(0)
    earned, teacher, old = (generator.normal(size=7).astype(np.float32) for _ in range(3))
    wanted = earned.astype(np.float64) + 0.3 * (teacher.astype(np.float64) - old)
    assert advantages(earned, teacher, old, 0.3) == pytest.approx(wanted, abs=1e-7)
    assert (advantages(earned, old, old, 0.3) == earned).all(), "of a teacher that is the policy"


def test_each_row_is_asked_once_of_its_own_teacher() -> None:
    credited, copies = advised([0, 1, 1, 0], 2.0, 4.0)
    for one, count in zip(copies, (2, 2), strict=True):
        assert sum(len(batch) for _, batch in one.asked) == count
    refs = [pointer.ref for pointer in credited.batch.columns["advantages"]]
    assert [ref.split(",")[0] for ref in refs] == ["teacher 2", "teacher 4", "teacher 4", "teacher 2"]
    assert credited.advantages.tolist() == [1.0, 2.0, 2.0, 1.0]
    assert credited.metrics == {"reward_std": 0.25, "teacher_kl": 3.0}


def test_all_teachers_judge_every_row_one_after_the_other() -> None:
    credited, copies = advised(None, 2.0, 4.0)
    assert all("advantages" not in batch.places for _, batch in copies[0].asked)
    assert all("advantages" in batch.places for _, batch in copies[1].asked), "what the first one said"
    assert {pointer.ref.split(",")[0] for pointer in credited.batch.columns["advantages"]} == {"teacher 4"}
    assert credited.metrics["teacher_kl"] == 3.0


def test_weights_share_the_coefficient_out() -> None:
    config = RLHFConfig(**GIVEN, teacher_model=["a", "b"], teacher_weights=[3, 1], teacher_kl_coef=2)
    assert teacher_coefficients(config) == [1.5, 0.5]
    by_row = RLHFConfig(**GIVEN, teacher_model=["a", "b"], teacher_column="whose", teacher_kl_coef=2)
    assert teacher_coefficients(by_row) == [2, 2]


def test_a_row_names_its_teacher_by_number_or_by_name() -> None:
    assert teacher_of_rows({"whose": [0, "1", "b"]}, "whose", ["a", "b"]).tolist() == [0, 1, 1]
    with pytest.raises(ConfigError, match="row 2 of the prompts has None"):
        teacher_of_rows({"whose": [0, None]}, "whose", ["a", "b"])
    with pytest.raises(ConfigError, match="no such column, only solution"):
        teacher_of_rows({"solution": ["4"]}, "whose", ["a", "b"])
