"""Sampling ahead of the training, by a scripted clock: engines take the time that a script says, a step of
the policy takes its own, and all else is the real controller.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_rl.config import PPOConfig, RLHFConfig
from raytune_rl.config.batching import grpo_schedule_of
from raytune_rl.errors import CheckpointError, DeadlineExceededError
from raytune_rl.pipelines import lifecycle
from raytune_rl.pipelines.ahead import AheadCollector
from raytune_rl.pipelines.collect import Collector
from raytune_rl.pipelines.online import OnlineRun
from raytune_rl.pipelines.scoring import Scoring
from raytune_rl.protocol.trajectory import Trajectory
from tests.pipelines.fakes import FakeFleet, Script, Stage, outside
from tests.pipelines.test_controller import (
    NAN,
    Played,
    config,
    every_third_is_dull,
    milestones,
    on_gap,
    play,
)

CLOCKS = ("staleness/", "idle/", "in_flight/")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "write_plots", lambda *args, **kwargs: [])
    monkeypatch.setattr(lifecycle, "write_report", lambda *args: None)


def ahead(output: Path, make: type[RLHFConfig] = RLHFConfig, **settings: Any) -> RLHFConfig:
    return config(
        output, make, **{"async_generate": True, "rollout_importance_sampling_mode": "none", **settings}
    )


def fleet(online: OnlineRun) -> FakeFleet:
    rollout: Any = online.actors.rollout
    assert isinstance(rollout, FakeFleet)
    return rollout


def scripted(
    script: Script, training_s: float = 3.0, seen: list[OnlineRun] | None = None, also: Any = None
) -> Any:
    """Sets the times of a run."""

    def before(online: OnlineRun, stage: Stage) -> None:
        stage.training_s = training_s
        fleet(online).script = script
        if seen is not None:
            seen.append(online)
        if also is not None:
            also(online, stage)

    return before


def by_luck(seed: int, failing: Sequence[int] = ()) -> Script:
    """Long tails: most are done in a second, some take the time of several steps."""

    def seconds(row: int, seeds: Sequence[int]) -> float:
        took = float(np.random.default_rng([seed, row, *seeds]).pareto(1.2) + 0.1)
        return -took if row in failing else took

    return seconds


def trained(played: Played) -> list[list[int]]:
    """The rows of each step."""
    return [[place.row for place in batch.rows] for batch in played.cast.policy_model.batches]


def without_clocks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nor what names the folder."""
    places = ("last_model_checkpoint", "best_model_checkpoint")
    return [{k: v for k, v in line.items() if not k.startswith((*CLOCKS, *places))} for line in lines]


def test_engines_go_on_while_the_policy_trains(tmp_path: Path) -> None:
    """Two generations are asked before the first is trained on, then one at each version."""
    played = play(ahead(tmp_path, beta=0, max_steps=4), before=scripted(lambda row, seeds: 1.0), held_out=0)
    assert played.calls_of("rollout.", "policy.start_step", "policy.publish") == [
        "policy.publish 0",
        "rollout.serve 0",
        "rollout.submit_burst 0 1 2 3",
        "policy.start_step 0: rows 0 1 10 11; columns none; scalars advantage row_weight weight",
        "policy.publish 1",
        "rollout.serve 1",
        "rollout.submit_burst 4 5",
        "policy.start_step 1: rows 20 21 30 31; columns none; scalars advantage row_weight weight",
        "policy.publish 2",
        "rollout.serve 2",
        "rollout.submit 6",
        "rollout.submit 7",
        "policy.start_step 2: rows 40 41 50 51; columns none; scalars advantage row_weight weight",
        "policy.publish 3",
        "rollout.serve 3",
        "policy.start_step 3: rows 60 61 70 71; columns none; scalars advantage row_weight weight",
        "policy.publish 4",
        "rollout.serve 4",
    ]
    steps = played.steps().values()
    assert [line["staleness/max"] for line in steps] == [0, 1, 1, 1]
    assert [line["staleness/mean"] for line in steps] == [0, 1, 1, 1]
    assert [line["idle/trainer_s"] for line in steps] == [1, 0, 0, 0], "it waits for the first alone"
    assert played.state.account().dispatched == played.state.account().finished == 8


@pytest.mark.parametrize(
    "settings",
    [{"beta": 0.04}, {"dataset_shuffle": True, "beta": 0, "num_iterations": 2}, {"steps_per_generation": 2}],
)
def test_without_staleness_it_is_the_synchronous_loop(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Its collector, made to allow none, asks, trains and logs what the synchronous one does."""
    chosen = ahead(tmp_path / "a", max_staleness=0, max_steps=6, **settings)

    def put_in(online: OnlineRun, stage: Stage) -> None:
        assert isinstance(online.collector, Collector), "nothing may be older: the synchronous loop itself"
        scoring = Scoring(chosen, online.actors, online.state, online.run.say, lambda *_: None)
        made = AheadCollector(
            chosen, online.actors, online.prompts, online.schedule, online.state, online.credit, scoring,
            online.run.say, outside(stage),
        )  # fmt: skip
        online.collector = made

    def reward(trajectory: Trajectory) -> float:
        return float(trajectory.episode.sample) + trajectory.prompt / 10

    seen: list[OnlineRun] = []
    mine = play(chosen, before=scripted(by_luck(1), 3.0, seen, put_in), reward=reward)
    synchronous = config(tmp_path / "b", max_steps=6, **settings)
    other = play(synchronous, reward=reward)
    assert trained(mine) == trained(other)
    assert without_clocks(mine.lines) == without_clocks(other.lines)
    assert mine.state == other.state
    for a, b in zip(mine.cast.policy_model.batches, other.cast.policy_model.batches, strict=True):
        assert a.scalars.keys() == b.scalars.keys()
        for name, values in a.scalars.items():
            np.testing.assert_array_equal(values, b.scalars[name])
    assert {line["staleness/max"] for line in mine.steps().values()} == {0.0}


@pytest.mark.parametrize("in_flight", ["keep", "recompute", "abort", "drain"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_bound_holds_and_all_is_trained_on_once(tmp_path: Path, k: int, in_flight: str) -> None:
    for seed in range(3):
        chosen = ahead(
            tmp_path / str(seed), beta=0, max_steps=8, max_staleness=k, rollout_in_flight=in_flight
        )
        seen: list[OnlineRun] = []
        played = play(chosen, prompts=16, held_out=0, before=scripted(by_luck(seed), 1.0, seen))
        assert trained(played) == [
            [10 * row + sample for row in (2 * step, 2 * step + 1) for sample in (0, 1)] for step in range(8)
        ]
        worst = [line["staleness/max"] for line in played.steps().values()]
        assert max(worst) <= k
        assert worst[0] == 0
        account = played.state.account()
        assert (account.dispatched, account.finished, account.unaccounted, account.ahead) == (16, 16, 0, 0)
        asked = fleet(seen[0]).asked
        assert len(asked) == len(set(asked)) == 16


def test_prompts_that_nobody_can_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    said: list[str] = []
    aside: list[tuple[str, int]] = []
    also = lambda online, stage: _listen(online, said, aside)  # noqa: E731
    before = scripted(by_luck(0, failing=(1, 4)), 1.0, also=also)
    played = play(ahead(tmp_path, beta=0, max_steps=4), prompts=12, held_out=0, before=before)
    assert [rows[::2] for rows in trained(played)] == [[0, 20], [30, 50], [60, 70], [80, 90]]
    account = played.state.account()
    assert account.failed == {"no engine could answer it": 2}
    assert (account.dispatched, account.finished, account.unaccounted) == (10, 8, 0)
    assert any("prompt 4 is left out, and another takes its place" in sentence for sentence in said)
    assert sorted(aside) == [("train", 1), ("train", 4)]


def test_in_the_synchronous_loop_too_another_takes_the_place(tmp_path: Path) -> None:
    said: list[str] = []
    aside: list[tuple[str, int]] = []

    def before(online: OnlineRun, stage: Stage) -> None:
        fleet(online).script = by_luck(0, failing=(1, 4))
        _listen(online, said, aside)

    played = play(config(tmp_path, beta=0, max_steps=3), prompts=12, held_out=5, before=before)
    rows = [batch[::2] for batch in trained(played)]
    assert [batch[0] for batch in rows] == [0, 20, rows[2][0]]
    assert all(len(batch) == 2 and not {10, 40} & set(batch) for batch in rows)
    account = played.state.account()
    assert account.failed["no engine could answer it"] >= 2
    assert (account.finished, account.unaccounted) == (6, 0)
    assert any("a held-out prompt is left out" in sentence for sentence in said)
    assert set(aside) == {("train", 1), ("train", 4), ("held out", 1), ("held out", 4)}


def _listen(online: OnlineRun, said: list[str], aside: list[tuple[str, int]]) -> None:
    collector: Any = online.collector
    collector._scoring._say = said.append
    collector._scoring._set_aside = lambda name, prompts, row, reason: aside.append((name, row))


def test_dynamic_sampling_replaces_groups_as_they_finish(tmp_path: Path) -> None:
    chosen = ahead(tmp_path, rlhf_type="dapo", max_resample_times=2, max_steps=4)
    played = play(
        chosen, prompts=16, held_out=0, reward=every_third_is_dull, before=scripted(by_luck(3), 1.0)
    )
    assert [rows[::2] for rows in trained(played)] == [[10, 20], [40, 50], [70, 80], [100, 110]]
    account = played.state.account()
    assert account.unaccounted == account.ahead == 0
    assert account.finished == 8
    assert account.filtered["one reward in the group"] == account.dispatched - 8 >= 4
    replaced = [line["dynamic_sample/replaced_prompts"] for line in played.steps().values()]
    assert sum(replaced) == account.filtered["one reward in the group"]


def test_dynamic_sampling_ends_where_no_prompt_teaches(tmp_path: Path) -> None:
    chosen = ahead(tmp_path, rlhf_type="dapo", max_resample_times=1, max_steps=3)
    played = play(chosen, held_out=0, reward=lambda t: 1.0, before=scripted(by_luck(3), 1.0))
    assert [line["dynamic_sample/filled_without_signal"] for line in played.steps().values()] == [2, 2, 2]
    assert played.state.short_generations == 3
    assert played.state.account().unaccounted == 0


def test_rewards_that_fail_are_counted(tmp_path: Path) -> None:
    played = play(
        ahead(tmp_path, beta=0, max_steps=3),
        held_out=0,
        reward=lambda t: NAN if t.prompt == 3 else float(t.episode.sample),
        before=scripted(by_luck(3)),
    )
    assert played.state.account().failed == {"no completion has a reward": 1}
    assert played.state.reward_failures == {"toy: timeout": 2}
    assert played.state.account().unaccounted == 0


def test_ppo_and_a_moving_reference_train_on_stale_groups(tmp_path: Path) -> None:
    ppo = play(
        ahead(tmp_path / "p", PPOConfig, max_steps=3, num_generations=1),
        held_out=0,
        before=scripted(by_luck(1)),
    )
    assert [line["staleness/max"] for line in ppo.steps().values()] == [0, 1, 1]
    columns = {"advantages", "old_logprobs"}
    assert all(columns >= batch.columns.keys() for batch in ppo.cast.policy_model.batches)
    moving = ahead(tmp_path / "m", beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, max_steps=3)
    assert play(moving, held_out=0, before=scripted(by_luck(1))).calls_of("reference.mix")


def test_evaluation_goes_on_beside_what_is_in_flight(tmp_path: Path) -> None:
    chosen = ahead(tmp_path, beta=0, max_steps=4, eval_steps=1)
    played = play(chosen, before=scripted(by_luck(5), 1.0))
    assert milestones_of(played) == ["e", "s", "e", "s", "e", "s", "e", "s", "e"]
    assert [line["eval_rewards/Toy/pass@2"] for line in played.lines if "eval_reward" in line] == [1.0] * 5
    assert played.state.account().finished == 8


def milestones_of(played: Played) -> list[str]:
    words = {"policy.start_step": "s", "rollout.submit_burst evaluation": "e"}
    return [words[start] for call in played.calls for start in words if call.startswith(start)]


def test_on_shared_gpus_a_burst_samples_all_that_may_be_ahead(tmp_path: Path) -> None:
    """And the engines are not woken for the generations after it; the stand-ins refuse calls out of turn."""
    chosen = ahead(tmp_path, beta=0, max_steps=4)
    played = play(chosen, held_out=0, shared=True, before=scripted(by_luck(2)))
    assert played.calls_of("rollout.", "policy.start_step", "policy.publish") == [
        "policy.publish 0",
        "rollout.serve 0",
        "rollout.submit_burst 0 1 2 3",
        "policy.start_step 0: rows 0 1 10 11; columns none; scalars advantage row_weight weight",
        "policy.publish 1",
        "policy.start_step 1: rows 20 21 30 31; columns none; scalars advantage row_weight weight",
        "policy.publish 2",
        "rollout.serve 2",
        "rollout.submit_burst 4 5 6 7",
        "policy.start_step 2: rows 40 41 50 51; columns none; scalars advantage row_weight weight",
        "policy.publish 3",
        "policy.start_step 3: rows 60 61 70 71; columns none; scalars advantage row_weight weight",
        "policy.publish 4",
    ]
    assert [line["staleness/max"] for line in played.steps().values()] == [0, 1, 0, 1]
    evaluated = ahead(tmp_path / "e", rlhf_type="dapo", max_steps=4, eval_steps=1)
    played = play(evaluated, shared=True, reward=every_third_is_dull, before=scripted(by_luck(2)))
    assert played.state.account().unaccounted == 0
    assert len(played.steps()) == 4


def test_engines_prove_themselves_beside_what_is_in_flight(tmp_path: Path) -> None:
    """At the first two publications; a step of older completions is not held against them."""
    flying: list[int] = []

    def also(online: OnlineRun, stage: Stage) -> None:
        on_gap(1e-3)(online, stage)
        rollout = fleet(online)
        stage.on_call = lambda call: (
            flying.append(rollout.load().running) if call.startswith("probe") else None
        )

    chosen = ahead(tmp_path, beta=0, max_steps=4, max_logp_gap=None)
    played = play(chosen, held_out=0, before=scripted(lambda row, seeds: 1.0 + 9 * row, also=also))
    starts = ("probe.generate", "policy.start_step", "policy.publish")
    asked = [call.split()[0].split(".")[1] for call in played.calls_of(*starts)]
    assert asked == [
        "publish",
        "generate",
        "start_step",
        "publish",
        "generate",
        *["start_step", "publish"] * 3,
    ]
    assert flying == [0, 2], "nobody waits for them"


def test_an_engine_that_was_started_anew_proves_itself_once_it_serves(tmp_path: Path) -> None:
    """At its loss nothing is proven, and nobody waits for it."""
    calls: list[str] = []

    def also(online: OnlineRun, stage: Stage) -> None:
        on_gap(1e-3)(online, stage)
        rollout = fleet(online)

        def seen(call: str) -> None:
            calls.append(call)
            if call.startswith("policy.start_step 2"):
                online.state.lost_workers["rollout"] += 1
            if call.startswith("policy.start_step 4"):
                rollout.admitted += 1

        stage.on_call = seen

    chosen = ahead(tmp_path, beta=0, max_steps=6, max_logp_gap=None)
    play(chosen, held_out=0, before=scripted(by_luck(2), also=also))
    trained_at = [i for i, call in enumerate(calls) if call.startswith("policy.start_step")]
    proven_at = [i for i, call in enumerate(calls) if call.startswith("probe.generate")]
    assert len(proven_at) == 3
    assert trained_at[4] < proven_at[2] < trained_at[5]


def test_a_stop_asks_for_nothing_more_and_keeps_what_was_asked(tmp_path: Path) -> None:
    def also(online: OnlineRun, stage: Stage) -> None:
        def on_call(call: str) -> None:
            online.run.stop_requested |= call.startswith("policy.start_step 1")

        stage.on_call = on_call

    chosen = ahead(tmp_path, beta=0, max_steps=9)
    played = play(chosen, prompts=20, before=scripted(by_luck(2), also=also))
    assert (played.result.status, played.result.steps) == ("interrupted", 2)
    account = played.lines[-1]["prompts"]
    assert (account["dispatched"], account["finished"], account["ahead"], account["unaccounted"]) == (
        6,
        4,
        2,
        0,
    )
    assert milestones(played)[-1] == "save"


def resumed(played: Played, step: int, chosen: RLHFConfig, **how: Any) -> Played:
    checkpoint = played.result.run_dir / f"checkpoint-{step}"
    return play(type(chosen)(**{**chosen.args(), "resume_from_checkpoint": str(checkpoint)}), **how)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (RLHFConfig, {"beta": 0.04}),
        (RLHFConfig, {"beta": 0, "dataset_shuffle": True, "max_staleness": 3}),
        (RLHFConfig, {"rlhf_type": "dapo", "max_resample_times": 2, "max_staleness": 2}),
        (PPOConfig, {"num_generations": 1}),
    ],
    ids=["grpo", "shuffled, 3", "dapo, 2", "ppo"],
)
@pytest.mark.parametrize("in_flight", ["keep", "abort", "drain"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, make: type[RLHFConfig], settings: dict[str, Any], in_flight: str, step: int
) -> None:
    """Every log line and every batch; but for the versions of completions that were half written under keep:
    they are asked anew, of newer weights.
    """

    def reward(trajectory: Trajectory) -> float:
        return NAN if trajectory.prompt == 5 else every_third_is_dull(trajectory)

    chosen = ahead(
        tmp_path, make, max_steps=6, save_steps=1, rollout_in_flight=in_flight, step_timeout=1e9, **settings
    )
    how: dict[str, Any] = {"reward": reward, "prompts": 24}
    asked: list[OnlineRun] = []
    whole = play(chosen, **how, before=scripted(by_luck(4), 2.0, asked))
    again = resumed(whole, step, chosen, **how, before=scripted(by_luck(4), 2.0, asked))
    assert trained(again) == trained(whole)[step:]
    scripted_only = CLOCKS if in_flight == "keep" else ("idle/",)
    assert [_without(line, scripted_only) for line in again.lines] == [
        _without(line, scripted_only) for line in whole.lines
    ]
    assert again.state == whole.state
    account = again.state.account()
    assert account.unaccounted == account.ahead == 0
    for a, b in zip(again.cast.policy_model.batches, whole.cast.policy_model.batches[step:], strict=True):
        for name, values in a.scalars.items():
            np.testing.assert_array_equal(values, b.scalars[name])
    first, second = (fleet(online).asked for online in asked)
    assert set(second) <= set(first), "the same prompts with the same seeds"
    assert len(set(second)) == len(second)


def _without(line: dict[str, Any], starts: tuple[str, ...]) -> dict[str, Any]:
    versions = ("weight_version",) if "staleness/" in starts else ()
    return {k: v for k, v in line.items() if not k.startswith((*starts, *versions))}


def test_a_killed_run_and_the_one_after_it_train_on_each_prompt_once(tmp_path: Path) -> None:
    """Killed at any call: the last checkpoint and the run from it have all prompts of the epoch."""
    chosen = ahead(tmp_path / "whole", beta=0, max_steps=8, save_steps=2, max_staleness=2)
    whole = play(chosen, prompts=16, held_out=0, before=scripted(by_luck(6), 1.0))
    calls = len(whole.calls)
    for at in range(20, calls, 5):
        output = tmp_path / str(at)
        killed = chosen.model_copy(update={"output_dir": str(output)})
        batches: list[list[int]] = []
        count = 0

        def also(online: OnlineRun, stage: Stage, at: int = at) -> None:
            def on_call(call: str) -> None:
                nonlocal count
                count += 1
                if count == at:
                    raise SystemError("killed")

            stage.on_call = on_call

        with pytest.raises(SystemError):
            play(killed, prompts=16, held_out=0, before=scripted(by_luck(6), 1.0, also=also))
        found = sorted(output.rglob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        found = [path for path in found if path.is_dir()]
        if not found:
            continue
        saved = json.loads((found[-1] / "trainer_state.json").read_text())
        on = RLHFConfig(**{**killed.args(), "resume_from_checkpoint": "auto"})
        rest = play(on, prompts=16, held_out=0, before=scripted(by_luck(6), 1.0))
        batches = trained(whole)[: saved["global_step"]] + trained(rest)
        assert sorted(row for rows in batches for row in rows) == sorted(
            10 * r + s for r in range(16) for s in (0, 1)
        )
        account = rest.state.account()
        assert (account.dispatched, account.finished, account.unaccounted) == (16, 16, 0)


def test_a_synchronous_run_does_not_take_up_what_was_asked_ahead(tmp_path: Path) -> None:
    chosen = ahead(tmp_path, beta=0, max_steps=4, save_steps=2)
    whole = play(chosen, held_out=0, before=scripted(by_luck(6)))
    synchronous = chosen.model_copy(update={"async_generate": False})
    with pytest.raises(CheckpointError, match="holds 4 prompts that were asked ahead"):
        resumed(whole, 2, synchronous, held_out=0)


def test_an_asynchronous_run_goes_on_from_a_synchronous_checkpoint(tmp_path: Path) -> None:
    plain = config(tmp_path, beta=0, max_steps=4, save_steps=2)
    whole = play(plain, held_out=0)
    chosen = ahead(tmp_path, beta=0, max_steps=4, save_steps=2)
    again = resumed(whole, 2, chosen, held_out=0, before=scripted(by_luck(6)))
    assert trained(again) == trained(whole)[2:]
    assert again.state.account() == whole.state.account()


def test_a_resumed_run_with_other_sizes_trains_on_each_prompt_once(tmp_path: Path) -> None:
    chosen = ahead(tmp_path, beta=0, num_train_epochs=1, save_steps=1, max_steps=-1)
    whole = play(chosen, prompts=24, held_out=0, before=scripted(by_luck(6)))
    larger = chosen.model_copy(update={"per_device_train_batch_size": 8})
    rest = resumed(whole, 2, larger, prompts=24, held_out=0, before=scripted(by_luck(6)))
    rows = [row for batch in trained(whole)[:2] + trained(rest) for row in batch]
    assert sorted(rows) == [10 * row + sample for row in range(24) for sample in (0, 1)]
    assert [len(batch) for batch in trained(rest)] == [8] * 5


def test_a_wait_without_end_has_a_name(tmp_path: Path) -> None:
    class Silent(FakeFleet):
        def completed(self, timeout_s: float) -> Any:
            self._stage.now += 1.0
            return iter(())

    def also(online: OnlineRun, stage: Stage) -> None:
        collector: Any = online.collector
        silent = Silent(stage)
        collector._rollout = collector._flow._rollout = silent

    chosen = ahead(tmp_path, beta=0, step_timeout=30)
    with pytest.raises(DeadlineExceededError, match="No completion of the 4 prompts in flight came"):
        play(chosen, held_out=0, before=scripted(by_luck(1), also=also))


def test_no_more_is_in_flight_than_the_bound_allows(tmp_path: Path) -> None:
    """And as much as it allows, whatever the times."""
    for seed in range(5):
        chosen = ahead(tmp_path / str(seed), beta=0, max_steps=6, max_staleness=2)
        sizes: list[int] = []

        def also(online: OnlineRun, stage: Stage, sizes: list[int] = sizes) -> None:
            collector: Any = online.collector
            stage.on_call = lambda call: sizes.append(len(collector._buffer))

        play(chosen, prompts=12, held_out=0, before=scripted(by_luck(seed), 1.0, also=also))
        schedule = grpo_schedule_of(chosen, 1, 12)
        assert max(sizes) == 3 * schedule.batch.prompts_per_generation
