"""The part of a step that each model gets, and how their reports become one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_rl.config import PPOConfig, RLHFConfig
from raytune_rl.data.media_table import ROW_COLUMN
from raytune_rl.groups.learners import Learner, Learners
from raytune_rl.groups.start import learners_of
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import StepReport

GIVEN: dict[str, Any] = {"model": "m", "dataset": "d", "reward_funcs": "accuracy"}


class Model:
    """Keeps what it is trained on, and reports what it is told to; `diary` is everybody's."""

    def __init__(self, name: str, diary: list[str], report: StepReport) -> None:
        self.name, self.diary, self._report = name, diary, report

    def start_step(self, batch: TrainBatch, step: int) -> Model:
        self.batch = batch
        self.diary.append(f"{self.name} begins {step}")
        return self

    def finish(self) -> StepReport:
        self.diary.append(f"{self.name} is done")
        return self._report

    def offload(self, weights: bool, optimizer: bool) -> None:
        self.diary.append(f"{self.name} offloads {weights} {optimizer}")

    def reload(self) -> None:
        self.diary.append(f"{self.name} reloads")

    def save(self, directory: Path, only_model: bool) -> None:
        self.diary.append(f"{self.name} to {directory} {only_model}")

    def load(self, directory: Path) -> None:
        self.diary.append(f"{self.name} from {directory}")


def step(*columns: str) -> TrainBatch:
    """Two rows with everything that PPO knows of them."""
    return TrainBatch(
        [RowPointer("tokens", 0), RowPointer("tokens", 1)],
        np.array([5, 7]),
        {name: [RowPointer(name, 0), RowPointer(name, 1)] for name in columns},
        {
            "weight": np.array([0.5, 0.25]),
            "row_weight": np.array([0.5, 0.5]),
            "advantage": np.array([1.0, -1.0]),
        },
    )


def of_ppo() -> tuple[Learners, Model, Model, list[str]]:
    diary: list[str] = []
    critic = Model(
        "critic",
        diary,
        StepReport({"loss": 0.2, "grad_norm": 3.0, "value": 0.5, "learning_rate": 1e-6}, 10, 4.0),
    )
    policy = Model(
        "policy", diary, StepReport({"loss": 0.1, "grad_norm": 2.0, "learning_rate": 1e-5}, 12, 3.0)
    )
    worlds: list[Any] = [policy, critic]
    return learners_of(worlds[0], worlds[1], PPOConfig(**GIVEN, vf_coef=0.1)), policy, critic, diary


def test_policy_and_critic_get_their_own_columns_scalars_and_weights() -> None:
    learners, policy, critic, _ = of_ppo()
    given = step("advantages", "old_logprobs", "returns", "old_values", ROW_COLUMN)
    learners.train(given, 3)
    assert policy.batch.columns.keys() == {"advantages", "old_logprobs", ROW_COLUMN}
    assert critic.batch.columns.keys() == {"returns", "old_values", ROW_COLUMN}, "both see the media"
    assert policy.batch.scalars.keys() == {"weight", "row_weight", "advantage"}
    assert critic.batch.scalars.keys() == {"weight"}
    assert policy.batch.scalars["weight"].tolist() == [0.5, 0.25]
    assert critic.batch.scalars["weight"].tolist() == [0.05, 0.025]
    for model in (policy, critic):
        assert (model.batch.rows, model.batch.lengths.tolist()) == (given.rows, [5, 7])
    assert given.scalars["weight"].tolist() == [0.5, 0.25]
    assert len(given.columns) == 5, "the step itself is as it was"


def test_both_begin_before_either_is_waited_for_and_report_as_one() -> None:
    learners, _, _, diary = of_ppo()
    report = learners.train(step("returns", "old_values"), 3)
    assert diary == ["critic begins 3", "policy begins 3", "critic is done", "policy is done"]
    assert report.metrics == pytest.approx(
        {
            "loss": 0.1,
            "loss/policy_avg": 0.1,
            "loss/value_avg": 2.0,
            "grad_norm": 2.0,
            "critic/grad_norm": 3.0,
            "critic/value": 0.5,
            "learning_rate": 1e-5,
            "critic/learning_rate": 1e-6,
        }
    ), "the critic's loss without its weight; where both have a name, the policy's counts"
    assert (report.tokens, report.memory_gib) == (22, 4.0)


def test_all_are_moved_saved_and_restored_the_policy_first(tmp_path: Path) -> None:
    learners, _, _, diary = of_ppo()
    learners.offload(True, False)
    learners.reload()
    learners.save(tmp_path, False)
    learners.load(tmp_path)
    assert diary == [
        "critic offloads True False",
        "policy offloads True False",
        "critic reloads",
        "policy reloads",
        f"policy to {tmp_path} False",
        f"critic to {tmp_path / 'critic'} False",
        f"policy from {tmp_path}",
        f"critic from {tmp_path / 'critic'}",
    ]


def test_a_policy_alone_gets_all_and_its_report_is_the_steps() -> None:
    diary: list[str] = []
    told = StepReport({"loss": 0.1}, 12, 3.0)
    policy = Model("policy", diary, told)
    worlds: list[Any] = [policy]
    learners = learners_of(worlds[0], None, RLHFConfig(**GIVEN, num_generations=2))
    given = step("ref_logprobs", "returns")
    assert learners.train(given, 0) == told
    assert policy.batch.columns == given.columns
    assert policy.batch.scalars.keys() == given.scalars.keys()


def test_a_learner_without_a_name_for_itself_reports_as_it_is() -> None:
    half = Learner(Model("m", [], StepReport({}, 0, 0.0)), weight=0.5)
    assert half.batch(step(), frozenset()).scalars["weight"].tolist() == [0.25, 0.125]
    assert half.report(StepReport({"loss": 1.0, "kl": 2.0}, 1, 0.0)).metrics == {"loss": 2.0, "kl": 2.0}
