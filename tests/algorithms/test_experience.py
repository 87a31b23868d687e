"""Groups are taken apart and put together without losing a trajectory, and filled up with such that teach."""

from dataclasses import replace

import numpy as np
import pytest

from raytune_rl.algorithms.advantages import combine_rewards, decoupled_advantages, group_advantages
from raytune_rl.algorithms.credit.gdpo import DecoupledGroups
from raytune_rl.algorithms.credit.group import group_metrics
from raytune_rl.algorithms.experience import Experience, fill_with_signal, join, known_values
from raytune_rl.data.sampler import order, stretch
from raytune_rl.pipelines import run_metrics
from raytune_rl.protocol.rewards import Failure, RewardTable
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.trajectory import EpisodeFacts, Trajectory

NAN = float("nan")


def experience(*groups: list[float], first_prompt: int = 0) -> Experience:
    """Groups of completions with these rewards; a NaN is a failure of the reward function."""
    rewards = [reward for group in groups for reward in group]
    batch = [
        Trajectory(
            first_prompt + g,
            g,
            RowPointer("data", s),
            RowPointer("text", s),
            EpisodeFacts(g, s, s, 3, 5, "stop", 0),
        )
        for g, group in enumerate(groups)
        for s in range(len(group))
    ]
    failures = tuple(
        Failure(i, "f", "invalid", str(batch[i].prompt)) for i in np.flatnonzero(np.isnan(rewards))
    )
    values = np.asarray(rewards)[:, None]
    return Experience(batch, RewardTable(("F",), ("f",), values, failures), np.asarray(rewards))


def test_only_different_rewards_teach() -> None:
    found = experience([1.0, 1.0], [0.0, 1.0], [NAN, NAN], [NAN, 1.0], [0.3, NAN, 0.2])
    assert found.informative() == {1, 4}


def test_rewards_compared_apart_teach_whatever_their_total() -> None:
    """GDPO: functions of different spread whose values add up to the same still tell completions apart."""
    found = experience([1.0, 1.0], [1.0, 1.0], [NAN, 1.0])
    values = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [NAN, 1.0], [NAN, 1.0]])
    two = replace(found, scored=replace(found.scored, values=values))
    assert two.informative() == set()
    assert DecoupledGroups((1.0, 0.5)).informative(two) == {0}
    assert DecoupledGroups((1.0, 1.0)).informative(two) == set(), "what one gives the other takes"
    assert DecoupledGroups((0.0, 0.0)).informative(two) == set(), "functions without weight teach nothing"
    part = two.of_groups({0, 1})
    assert DecoupledGroups((1.0, 0.5)).informative(join([part, part])) == {0, 2}


def of_two(values: list[list[float]], *failed: tuple[int, str]) -> Experience:
    """One group of completions with two reward functions, `f` and `g`, of weight 1, as a run makes it."""
    batch = experience([0.0] * len(values)).batch
    failures = tuple(Failure(row, name, "exception", "") for row, name in failed)
    scored = RewardTable(("F", "G"), ("f", "g"), np.array(values), failures)
    return Experience(batch, scored, combine_rewards(known_values(scored, (1.0, 1.0)), (1.0, 1.0)))


def test_a_failed_reward_makes_the_total_unknown_and_an_abstention_does_not() -> None:
    values = [[1.0, 1.0], [NAN, 1.0], [1.0, 1.0], [1.0, 1.0]]
    failed, abstained = of_two(values, (1, "f")), of_two(values)
    np.testing.assert_array_equal(failed.rewards, [2, NAN, 2, 2])
    np.testing.assert_array_equal(abstained.rewards, [2, 1, 2, 2])
    assert failed.informative() == set(), "what is known is all the same"
    assert abstained.informative() == {0}
    assert DecoupledGroups((1.0, 1.0)).informative(of_two(values, (1, "f"))) == set()
    assert of_two([[NAN, NAN], [1.0, NAN]]).unscored() == set()
    assert of_two([[NAN, NAN], [NAN, 1.0]], (1, "F")).unscored() == {0}, "by its label, too"


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus"])
def test_an_unknown_reward_earns_nothing_and_leaves_the_others_as_if_it_were_not_there(estimator) -> None:
    values = [[1.0, 1.0], [NAN, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    found = group_advantages(of_two(values, (1, "f")).rewards, [0] * 5, estimator=estimator).advantages
    alone = group_advantages([2.0, 1.0, 1.0, 0.0], [0] * 4, estimator=estimator).advantages
    assert found[1] == 0
    np.testing.assert_allclose(np.delete(found, 1), alone)


def test_gdpo_leaves_out_what_a_function_failed_on() -> None:
    values = np.array([[1.0, 1.0], [NAN, 1.0], [0.0, 1.0], [1.0, 0.0], [NAN, 0.0]])
    scored = of_two(values.tolist(), (1, "f")).scored
    found = decoupled_advantages(known_values(scored, (1.0, 1.0)), (1.0, 1.0), [0] * 5)
    alone = decoupled_advantages(np.delete(values, 1, axis=0), (1.0, 1.0), [0] * 4)
    assert found[1] == 0
    np.testing.assert_allclose(np.delete(found, 1), alone)
    assert found[4] != 0, "the last one abstained"
    unweighted = known_values(scored, (0.0, 1.0))
    np.testing.assert_array_equal(unweighted, values, "a function without weight has no part in the total")


def test_parts_keep_rewards_and_failures_with_their_trajectory() -> None:
    found = experience([1.0, NAN], [0.0, 1.0], [NAN, 0.5])
    part = found.of_groups({0, 2})
    assert [t.prompt for t in part.batch] == [0, 0, 2, 2]
    np.testing.assert_array_equal(part.rewards, [1.0, NAN, NAN, 0.5])
    assert [(f.row, f.message) for f in part.scored.failures] == [(1, "0"), (2, "2")]
    whole = join([part, found.of_groups(set()), experience([0.1, NAN], first_prompt=7)])
    assert [t.group for t in whole.batch] == [0, 0, 1, 1, 2, 2]
    assert [t.prompt for t in whole.batch] == [0, 0, 2, 2, 7, 7]
    assert [(f.row, f.message) for f in whole.scored.failures] == [(1, "0"), (2, "2"), (5, "7")]
    np.testing.assert_array_equal(whole.scored.values[:, 0], whole.rewards)


class Source:
    """Endless prompts; those in `teaching` have completions with different rewards."""

    def __init__(self, teaching: set[int]) -> None:
        self.teaching = teaching
        self.drawn: list[int] = []

    def __call__(self, count: int, number: int) -> Experience:
        prompts = range(len(self.drawn), len(self.drawn) + count)
        self.drawn += prompts
        groups = [[0.0, 1.0] if p in self.teaching else [1.0, 1.0] for p in prompts]
        return experience(*groups, first_prompt=prompts.start)


@pytest.mark.parametrize(
    ("teaching", "rounds", "drawn", "without"),
    [
        ({0, 1, 2, 3}, 1, 4, 0),  # all at once
        ({1, 4, 5, 7}, 2, 8, 1),  # 1 of 4, then 2 of 3 more, then none left to draw
        ({1, 4, 5, 7}, 3, 8, 0),  # ... and the third round brings the last one
        (set(range(100)), 9, 4, 0),
        (set(), 3, 12, 4),
    ],
)
def test_a_batch_is_filled_as_far_as_there_is_something_to_learn(
    teaching: set[int], rounds: int, drawn: int, without: int
) -> None:
    source = Source(teaching)
    filled = fill_with_signal(4, rounds, source)
    kept = [t.prompt for t in filled.kept.batch[::2]]
    assert len(source.drawn) <= drawn
    assert filled.without_signal == without == sum(p not in teaching for p in kept)
    assert [t.group for t in filled.kept.batch] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(kept) >= teaching & set(source.drawn)
    replaced = [t.prompt for t in filled.replaced.batch[::2]]
    assert sorted(kept + replaced) == source.drawn, "every prompt drawn is either kept or replaced"


def test_a_stretch_of_the_data_is_the_epochs_end_to_end() -> None:
    whole = np.concatenate([order(5, epoch, 3, True) for epoch in range(4)])
    for start in range(12):
        for count in range(8):
            np.testing.assert_array_equal(stretch(5, start, count, 3, True), whole[start : start + count])


def test_metrics_name_what_cannot_teach() -> None:
    found = experience([1.0, 1.0], [0.0, 1.0], [NAN, NAN], [NAN, 1.0])
    grouped = group_advantages(found.rewards, found.group_ids)
    metrics = {**run_metrics.batch_metrics(found), **group_metrics(grouped)}
    assert metrics["frac_reward_zero_std"] == 0.25
    assert metrics["groups_without_comparison"] == 2
    assert metrics["unscored_completions"] == metrics["reward_failures"] == 3
    assert metrics["reward"] == metrics["rewards/F/mean"] == 0.8


def test_evaluation_counts_prompts_of_which_one_completion_passes() -> None:
    metrics = run_metrics.evaluation_metrics(experience([1.0, 0.0], [0.0, 0.0], [NAN, 1.0], [1.0, 1.0]))
    assert metrics["eval_rewards/F/pass@2"] == pytest.approx(2 / 3), "of the prompts with two known rewards"
    assert (metrics["eval_reward_failures"], metrics["eval_unscored_completions"]) == (1, 1)
    assert metrics["eval_reward"] == pytest.approx(4 / 7)
    four = run_metrics.evaluation_metrics(experience([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, NAN]))
    assert four["eval_rewards/F/pass@2"] == pytest.approx((1 / 2 + 1) / 2), "pairs with a right one"
    assert four["eval_rewards/F/pass@4"] == 1
    graded = run_metrics.evaluation_metrics(experience([0.5, 1.0]))
    assert not [name for name in graded if "pass@" in name], "a grade between 0 and 1 is neither"
