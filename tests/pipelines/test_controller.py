"""The controller of online RL against stand-ins of its groups (`fakes`): what it asks of whom, in which
order, and that a resumed run asks the rest of it. Nothing here is a model; the loop, its state, the credits,
the checkpoints and the log are the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_rl.config import PPOConfig, RLHFConfig
from raytune_rl.config.batching import grpo_schedule_of
from raytune_rl.errors import EngineMismatchError
from raytune_rl.pipelines import lifecycle
from raytune_rl.pipelines.experts import Experts
from raytune_rl.pipelines.lifecycle import Run, RunResult
from raytune_rl.pipelines.online import OnlineRun
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.pipelines.online_data import OnlineData
from raytune_rl.pipelines.position import generations_go_on
from raytune_rl.pipelines.resume_point import ResumePoint, open_run
from raytune_rl.pipelines.run_state import RunState
from raytune_rl.protocol.data import Account, TokenSet
from raytune_rl.protocol.rows import ABSENT
from raytune_rl.protocol.trajectory import Trajectory
from tests.pipelines.fakes import Cast, Reward, Stage, cast_of, outside, prompt_set

NAN = float("nan")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes a second, and has tests of its own."""
    monkeypatch.setattr(lifecycle, "write_plots", lambda *args, **kwargs: [])
    monkeypatch.setattr(lifecycle, "write_report", lambda *args: None)


@dataclass
class Played:
    """A run that has ended: what was asked for, and what came of it."""

    calls: list[str]
    cast: Cast
    state: RunState
    result: RunResult
    lines: list[dict[str, Any]]

    def steps(self) -> dict[int, dict[str, Any]]:
        """The line of each optimizer step."""
        return {int(x["global_step/max_steps"].split("/")[0]): x for x in self.lines if "loss" in x}

    def calls_of(self, *starts: str) -> list[str]:
        """Calls that begin so."""
        return [call for call in self.calls if call.startswith(starts)]


def log_of(run_dir: Path) -> list[dict[str, Any]]:
    """logging.jsonl, without what clocks say."""
    lines = [json.loads(line) for line in (run_dir / "logging.jsonl").read_text().splitlines()]
    clocks = ("time", "speed", "tokens_per_second", "profiling/")
    return [{k: v for k, v in line.items() if not any(c in k for c in clocks)} for line in lines]


def first_is_right(trajectory: Trajectory) -> float:
    """1 for the first completion of each prompt."""
    return float(trajectory.episode.sample == 0)


def play(
    config: RLHFConfig,
    *,
    prompts: int = 8,
    held_out: int = 2,
    reward: Reward = first_is_right,
    shared: bool = False,
    before: Callable[[OnlineRun, Stage], None] = lambda online, stage: None,
) -> Played:
    """Plays a whole run, as `pipelines.online.run` does once its groups are there."""
    with open_run(config) as resume_point:
        return _played(config, resume_point, prompts, held_out, reward, shared, before)


def _played(
    config: RLHFConfig,
    resume_point: ResumePoint,
    prompts: int,
    held_out: int,
    reward: Reward,
    shared: bool,
    before: Callable[[OnlineRun, Stage], None],
) -> Played:
    """The same in a directory that is open."""
    algorithm = algorithm_of(config)
    stage = Stage(shared=shared)
    cast = cast_of(config, algorithm.needs, stage, reward)
    schedule = grpo_schedule_of(config, 1, prompts)
    schedule, _ = generations_go_on(schedule, prompts, resume_point, config.max_steps)
    run = Run(config, resume_point, schedule.total_steps, best_by="eval_reward", greater_is_better=True)
    state = RunState.restored(resume_point.state)
    evaluated = prompt_set(held_out, "held out") if held_out else None
    data = OnlineData(prompt_set(prompts), evaluated, schedule, max_model_len=64)
    online = OnlineRun(config, algorithm, data, run, state, cast.groups, outside(stage))
    before(online, stage)
    online.restore(resume_point)
    with run.watched():
        online.train()
        result = run.finish({"prompts": state.account().as_dict()})
    return Played(stage.calls, cast, state, result, log_of(result.run_dir))


def config(output: Path, make: type[RLHFConfig] = RLHFConfig, **settings: Any) -> RLHFConfig:
    """Two prompts of two completions a generation, one optimizer step each; nobody compares log-probs."""
    small: dict[str, Any] = {
        "model": "m",
        "dataset": "d",
        "reward_funcs": "accuracy",
        "train_type": "full",
        "dataset_shuffle": False,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 100,
        "max_logp_gap": 0,
        "output_dir": str(output),
        "report_to": "none",
    }
    if make is PPOConfig:
        small |= {"num_ppo_epochs": 1}
    return make(**{**small, **settings})


SCALARS = "scalars advantage row_weight weight"


def published(version: int) -> list[str]:
    """The calls by which the engines come to serve a version."""
    return [f"policy.publish {version}", f"store.publish {version}", f"rollout.pull {version}"]


def test_grpo_asks_for_this_and_nothing_else(tmp_path: Path) -> None:
    """On GPUs that policy and engines share; the stand-ins refuse calls out of turn."""
    played = play(config(tmp_path, beta=0.04), shared=True)
    assert played.calls == [
        *published(0),
        "rollout.submit_burst evaluation: 0 1",
        "rewards.score 4 of held out, step 0 of 2",
        "rollout.submit_burst 0 1",
        "rewards.score 4 of train, step 0 of 2",
        "reference.logprobs 4",
        f"policy.start_step 0: rows 0 1 10 11; columns ref_logprobs; {SCALARS}",
        "policy.finish",
        *published(1),
        "rollout.submit_burst 2 3",
        "rewards.score 4 of train, step 1 of 2",
        "reference.logprobs 4",
        f"policy.start_step 1: rows 20 21 30 31; columns ref_logprobs; {SCALARS}",
        "policy.finish",
        *published(2),
        "rollout.submit_burst evaluation: 0 1",
        "rewards.score 4 of held out, step 2 of 2",
        "policy.save",
    ]
    half = np.sqrt(0.5)
    for batch in played.cast.policy_model.batches:
        np.testing.assert_allclose(batch.scalars["advantage"], [half, -half, half, -half], rtol=1e-3)
        np.testing.assert_allclose(batch.scalars["weight"], 1 / (4 * np.array([2, 3, 2, 3])))
    assert [line["weight_version"] for line in played.steps().values()] == [0, 1]
    assert [line["epoch"] for line in played.steps().values()] == [0.25, 0.5]
    assert played.steps()[1]["reward"] == 0.5
    assert played.result.before["eval_rewards/Toy/pass@2"] == 1.0
    assert played.result.status == "finished"
    assert played.lines[-1]["prompts"]["dispatched"] == played.lines[-1]["prompts"]["finished"] == 4


def test_the_kl_in_the_reward_is_measured_taken_off_and_not_trained_on_again(tmp_path: Path) -> None:
    played = play(config(tmp_path, beta=1.0, kl_in_reward=True, max_steps=1), held_out=0)
    assert played.calls[len(published(0)) + 2 :] == [
        "reference.logprobs 4",
        "policy.logprobs 4",
        "policy.row_kl 4, k1",
        f"policy.start_step 0: rows 0 1 10 11; columns none; {SCALARS}",
        "policy.finish",
        *published(1),
        "policy.save",
    ]
    assert played.steps()[1]["kl"] == pytest.approx((0.1 + 0.2 + 0.3) / 10), "the stand-in's, by 10 tokens"
    spread = played.steps()[1]["reward_std"]
    assert spread == pytest.approx(1.1 / np.sqrt(2)), "rewards 1 and 0, less 0.0 and 0.1"


def test_ppo_asks_the_critic_once_and_trains_both_side_by_side(tmp_path: Path) -> None:
    settings = {"num_mini_batches": 2, "num_ppo_epochs": 2, "max_steps": 4, "vf_coef": 0.5, "kl_coef": 0.1}
    played = play(config(tmp_path, PPOConfig, **settings), held_out=0)
    rows = ["0 1 10 11", "20 21 30 31"] * 2
    trained = [
        [
            f"critic.start_step {step}: rows {of}; columns old_values returns; scalars weight",
            f"policy.start_step {step}: rows {of}; columns advantages old_logprobs; {SCALARS}",
            "critic.finish",
            "policy.finish",
        ]
        for step, of in enumerate(rows)
    ]
    assert played.calls == [
        *published(0),
        "rollout.submit_burst 0 1 2 3",
        "rewards.score 8 of train, step 0 of 4",
        "reference.logprobs 8",
        "policy.logprobs 8",
        "critic.estimate scores 1 0 1 0 1 0 1 0; columns old_logprobs ref_logprobs",
        *(call for step in trained for call in step),
        *published(1),
        "policy.save",
        "critic.save",
    ]
    policy, critic = played.cast.policy_model.batches[0], played.cast.critic_model.batches[0]
    np.testing.assert_allclose(critic.scalars["weight"], 0.5 * policy.scalars["weight"])
    np.testing.assert_allclose(policy.scalars["advantage"], [1, 0, 1, 0])
    line = played.steps()[1]
    assert line["loss/value_avg"] == pytest.approx(line["loss"]), "logged without --vf_coef"
    assert line["loss/policy_avg"] == line["loss"]
    assert line["critic/returns"] == 0.5
    checkpoint = played.result.run_dir / "checkpoint-4"
    assert (checkpoint / "critic" / "weights.json").is_file()


def test_loss_and_credit_of_plugins_decide_what_is_trained_on(tmp_path: Path) -> None:
    """The loss its normaliser, over the tokens of a step; the credit the advantages."""
    plugins = [str(EXAMPLES / name) for name in ("loss_plugin.py", "credit_plugin.py")]
    chosen = config(
        tmp_path,
        beta=0,
        external_plugins=plugins,
        loss_type="power",
        advantage_estimator="median",
        advantage_args={"median_bound": 0.25},
    )
    played = play(chosen, held_out=0)
    for batch in played.cast.policy_model.batches:
        assert batch.scalars["advantage"].tolist() == [0.25, -0.25, 0.25, -0.25]
        np.testing.assert_allclose(batch.scalars["weight"], 0.1)
    assert [line["median/bounded"] for line in played.steps().values()] == [1.0, 1.0]


def every_third_is_dull(trajectory: Trajectory) -> float:
    """Of prompts 0, 3, 6, ... all completions are right."""
    return float(trajectory.episode.sample == 0 or trajectory.prompt % 3 == 0)


def test_dapo_refills_and_counts(tmp_path: Path) -> None:
    """The stream of prompts goes on where it was; what is cut off is not trained on."""
    dapo = config(tmp_path, rlhf_type="dapo", max_resample_times=2, max_steps=3)
    played = play(dapo, held_out=0, reward=every_third_is_dull)
    assert played.calls_of("rollout.submit_burst", "policy.start_step") == [
        "rollout.submit_burst 0 1",
        "rollout.submit_burst 2",
        f"policy.start_step 0: rows 10 11 20 21; columns none; {SCALARS}",
        "rollout.submit_burst 3 4",
        "rollout.submit_burst 5",
        f"policy.start_step 1: rows 40 41 50 51; columns none; {SCALARS}",
        "rollout.submit_burst 6 7",
        "rollout.submit_burst 0",
        "rollout.submit_burst 1",
        f"policy.start_step 2: rows 70 71 10 11; columns none; {SCALARS}",
    ]
    np.testing.assert_allclose(played.cast.policy_model.batches[1].scalars["weight"], [0, 0, 0.2, 0.2])
    lines = played.steps().values()
    assert [line["dynamic_sample/rounds"] for line in lines] == [2, 2, 3]
    assert [line["dynamic_sample/replaced_prompts"] for line in lines] == [1, 1, 2]
    assert [line["epoch"] for line in lines] == [3 / 8, 6 / 8, 10 / 8]
    account = played.state.account()
    assert (account.dispatched, account.finished, account.filtered) == (10, 6, {"one reward in the group": 4})
    assert account.unaccounted == 0


def test_dapo_trains_on_what_it_has_when_no_prompt_teaches(tmp_path: Path) -> None:
    dapo = config(tmp_path, rlhf_type="dapo", max_resample_times=1, max_steps=2)
    played = play(dapo, held_out=0, reward=lambda trajectory: 1.0)
    assert [x["dynamic_sample/filled_without_signal"] for x in played.steps().values()] == [2, 2]
    assert (played.state.short_generations, played.state.silent_generations) == (2, 2)
    assert played.state.account().unaccounted == 0


def test_completions_without_a_reward_are_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    played = play(
        config(tmp_path, beta=0),
        held_out=0,
        reward=lambda t: NAN if t.prompt < 2 else float(t.episode.sample),
    )
    assert played.state.account().failed == {"no completion has a reward": 2}
    assert played.state.account().finished == 2
    assert played.state.silent_generations == 1
    assert played.lines[-1]["prompts"]["unaccounted"] == 0
    assert played.state.reward_failures == {"toy: timeout": 4}
    first, second = played.cast.policy_model.batches
    assert not first.scalars["advantage"].any()
    assert second.scalars["advantage"].any()


def test_several_steps_of_a_generation_start_from_its_own_log_probs(tmp_path: Path) -> None:
    """Two steps, twice over; the entropy that counts is worked out for each; the last one ends the run."""
    played = play(
        config(
            tmp_path, beta=0, max_steps=3, steps_per_generation=2, num_iterations=2, top_entropy_quantile=0.5
        ),
        held_out=0,
    )
    columns = "columns entropy old_logprobs; scalars advantage entropy_threshold row_weight weight"
    once = ["policy.entropies 4", "policy.entropy_threshold 4, 10 tokens, 0.5"]
    assert played.calls_of("policy.") == [
        "policy.publish 0",
        "policy.logprobs 8",
        *once,
        f"policy.start_step 0: rows 0 1 10 11; {columns}",
        "policy.finish",
        *once,
        f"policy.start_step 1: rows 20 21 30 31; {columns}",
        "policy.finish",
        *once,
        f"policy.start_step 2: rows 0 1 10 11; {columns}",
        "policy.finish",
        "policy.publish 1",
        "policy.save",
    ]
    assert set(played.cast.policy_model.batches[0].scalars["entropy_threshold"]) == {0.125}


def test_a_loss_that_knows_its_whole_step_asks_before_each(tmp_path: Path) -> None:
    """REAL asks how far each completion has moved, which is nowhere where the step follows the sampling;
    KL-Cov which tokens are the first by covariance."""
    settings = {"beta": 0, "max_steps": 2, "steps_per_generation": 2}
    played = play(config(tmp_path / "real", loss_type="real", **settings), held_out=0)
    scalars = "scalars advantage real_loss real_slope row_weight weight"
    assert played.calls_of("policy.")[1:6] == [
        "policy.logprobs 8",
        "policy.logprobs 4",
        "policy.row_kl 4, k1",
        f"policy.start_step 0: rows 0 1 10 11; columns old_logprobs; {scalars}",
        "policy.finish",
    ]
    batch = played.cast.policy_model.batches[0]
    assert (np.sign(batch.scalars["real_slope"]) == -np.sign(batch.scalars["advantage"])).all()
    once = play(config(tmp_path / "once", loss_type="real", beta=0, max_steps=1), held_out=0)
    assert [c for c in once.calls_of("policy.") if "logprobs" in c.split(":")[0] or "row_kl" in c] == []
    cov = play(config(tmp_path / "cov", loss_type="kl_cov", **settings), held_out=0)
    assert "policy.first_tokens 1 of 4 rows, step 1" in cov.calls_of("policy.")
    assert cov.cast.policy_model.batches[0].columns.keys() == {"old_logprobs", "cov_selected"}


def milestones(played: Played) -> list[str]:
    """Steps, evaluations and checkpoints, in order."""
    kinds = {
        "policy.start_step": "step",
        "rollout.submit_burst evaluation": "evaluate",
        "policy.save": "save",
    }
    return [kinds[start] for call in played.calls for start in kinds if call.startswith(start)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_steps": 2, "save_steps": 3, "max_steps": 4}, "e s s e s S s e S"),
        ({"eval_steps": 9, "save_steps": 1, "max_steps": 2}, "e s S s e S"),
        ({"save_strategy": "epoch", "max_steps": 5}, "e s s s s e S s e S"),
        ({"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 3}, "e s s e s e"),
        ({"save_steps": 2, "eval_strategy": "no", "max_steps": 3}, "s s S s S"),
        (
            {"eval_steps": 3, "save_steps": 3, "max_steps": 6, "steps_per_generation": 2},
            "e s s s s e S s s e S",
        ),
    ],
)
def test_evaluations_and_checkpoints_come_when_they_are_due(
    tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    """Before the first step, at intervals, at the end; inside a generation only when it is over."""
    words = {"e": "evaluate", "s": "step", "S": "save"}
    assert milestones(play(config(tmp_path, beta=0, **settings))) == [words[x] for x in expected.split()]


def test_a_stop_is_honoured_after_the_generation_which_is_saved(tmp_path: Path) -> None:
    def stop_in_the_second(online: OnlineRun, stage: Stage) -> None:
        def on_call(call: str) -> None:
            online.run.stop_requested |= call.startswith("rollout.submit_burst 2 3")

        stage.on_call = on_call

    played = play(config(tmp_path, beta=0, max_steps=9), before=stop_in_the_second)
    assert milestones(played) == ["evaluate", "step", "step", "evaluate", "save"]
    assert (played.result.status, played.result.steps) == ("interrupted", 2)
    assert played.result.last_checkpoint == played.result.run_dir / "checkpoint-2"
    assert played.lines[-1]["prompts"]["finished"] == 4


def test_a_stop_that_comes_too_late_to_save_this_step_ends_the_next_one(tmp_path: Path) -> None:
    """Nothing that was trained is lost, whenever the signal comes."""

    def stop_when_all_was_decided(online: OnlineRun, stage: Stage) -> None:
        mark = online.rescue.mark

        def marked(state: Mapping[str, Any]) -> None:
            mark(state)
            online.run.stop_requested = True

        online.can_be_rescued, online.rescue.mark = True, marked  # type: ignore[method-assign]

    played = play(config(tmp_path, beta=0, max_steps=9), before=stop_when_all_was_decided)
    assert milestones(played) == ["evaluate", "step", "step", "evaluate", "save"]
    assert played.result.last_checkpoint == played.result.run_dir / "checkpoint-2"


@pytest.mark.parametrize(
    ("make", "settings", "restored"),
    [
        (RLHFConfig, {"beta": 0.04}, ["policy.load 2"]),
        (RLHFConfig, {"rlhf_type": "dapo", "max_resample_times": 2}, ["policy.load 2"]),
        (
            RLHFConfig,
            {"beta": 0.1, "advantage_estimator": "rloo", "dataset_shuffle": True},
            ["policy.load 2"],
        ),
        (PPOConfig, {"num_generations": 1}, ["policy.load 2", "critic.load 2"]),
        (
            RLHFConfig,
            {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
            ["policy.load 2", "reference.load 2"],
        ),
    ],
    ids=["grpo", "dapo", "rloo shuffled", "ppo", "moving reference"],
)
def test_a_resumed_run_asks_for_the_rest_call_by_call(
    tmp_path: Path, make: type[RLHFConfig], settings: dict[str, Any], restored: list[str]
) -> None:
    def reward(trajectory: Trajectory) -> float:
        return NAN if trajectory.prompt == 5 else every_third_is_dull(trajectory)

    chosen = config(tmp_path, make, max_steps=4, save_steps=2, **settings)
    whole = play(chosen, reward=reward)
    checkpoint = whole.result.run_dir / "checkpoint-2"
    again = play(make(**{**chosen.args(), "resume_from_checkpoint": str(checkpoint)}), reward=reward)
    saves = [number for number, call in enumerate(whole.calls) if ".save" in call]
    rest = saves[len(saves) // 2 - 1] + 1  # both checkpoints are made of as many calls
    assert again.calls == [*restored, *published(2), *whole.calls[rest:]]
    assert again.lines == whole.lines, "the log goes on behind the step it was resumed from"
    assert again.state == whole.state
    account = again.state.account()
    assert account.unaccounted == 0
    sampled = [
        prompt
        for call in whole.calls_of("rollout.submit_burst")
        if "evaluation" not in call
        for prompt in prompts_of(call)
    ]
    assert account.dispatched == len(sampled)
    assert account.failed == {"no completion has a reward": sampled.count(5)}
    assert sampled.count(5) > 0


def prompts_of(call: str) -> list[int]:
    """The prompts that a call of `submit_burst` names."""
    return [int(word) for word in call.split() if word.isdecimal()]


def on_gap(gap: float, *, lost_in: str = "never") -> Callable[[OnlineRun, Stage], None]:
    """Engines that are so far from the policy, nats a token, one of which is started anew at a call."""

    def before(online: OnlineRun, stage: Stage) -> None:
        def on_call(call: str) -> None:
            online.state.lost_workers["rollout"] += call.startswith(lost_in)

        online.actors.policy.half_square = gap**2 * 14 / 8  # type: ignore[attr-defined]  # 4 rows, 14 tokens
        stage.on_call = on_call

    return before


def test_engines_prove_themselves_twice_and_again_after_a_loss(tmp_path: Path) -> None:
    """Before anything is trained on what they sampled."""
    chosen = config(tmp_path, beta=0, max_steps=4, max_logp_gap=None)
    played = play(chosen, held_out=0, shared=True, before=on_gap(1e-3, lost_in="rollout.submit_burst 4 5"))
    starts = ("probe.generate", "rollout.submit_burst", "policy.start_step", "policy.publish")
    asked = [call.split()[0] for call in played.calls_of(*starts)]
    proof, generation = ["probe.generate"], ["rollout.submit_burst", "policy.start_step", "policy.publish"]
    again = ["rollout.submit_burst", *proof, "policy.start_step", "policy.publish"]
    assert asked == ["policy.publish", *proof, *generation, *proof, *generation, *again, *generation]
    assert played.steps()[3]["lost_workers"] == 1


def test_engines_that_are_not_the_policy_end_the_run_before_a_step(tmp_path: Path) -> None:
    chosen = config(tmp_path, beta=0, max_logp_gap=None)
    asked: list[str] = []

    def before(online: OnlineRun, stage: Stage) -> None:
        on_gap(0.1)(online, stage)
        stage.calls = asked

    with pytest.raises(EngineMismatchError, match=r"differ by 0\.1 nats a token .* 0\.00556 is the most"):
        play(chosen, before=before)
    assert [call for call in asked if call.startswith(("policy.start_step", "rollout.submit_burst"))] == []
    assert asked[-1] == "policy.row_kl 4, k2"


def test_remax_asks_for_the_likeliest_answer_of_each_prompt(tmp_path: Path) -> None:
    """One more completion a prompt, scored, and not trained on."""
    played = play(config(tmp_path, advantage_estimator="remax", beta=0.0, max_steps=1), held_out=0)
    (greedy,) = played.calls_of("greedy.generate")
    assert greedy == "greedy.generate batch 0: prompts 0 1, 1 each"
    assert played.calls_of("rewards.score")[-1].startswith("rewards.score 2 of train")
    (batch,) = played.cast.policy_model.batches
    assert [place.row for place in batch.rows] == [0, 1, 10, 11]
    assert batch.scalars["advantage"].tolist() == [0, -1, 0, -1], "the likeliest answers were right"
    assert played.steps()[1]["remax/greedy_reward"] == 1.0
    assert played.state.account().unaccounted == 0


def test_an_experts_rows_come_behind_the_policys(tmp_path: Path) -> None:
    """CHORD: in every step as many, the next ones, weighed by mu; none where mu is 0."""
    rows = TokenSet("expert", np.array([6, 5, 7]), np.array([2, 1, 5]), Account((), {}, None, (), None, ()))
    shares = [0.0, 0.25, 0.5]

    def before(online: OnlineRun, stage: Stage) -> None:
        online.experts = Experts(rows, 2, lambda step: shares[step], seed=0, shuffle=False)

    flags: dict[str, Any] = {"loss_type": "chord", "chord_sft_dataset": "e", "beta": 0.1, "max_steps": 3}
    played = play(config(tmp_path, **flags), held_out=0, before=before)
    first, second, third = played.cast.policy_model.batches
    assert len(first) == 4
    assert first.scalars["expert"].tolist() == [0] * 4
    assert first.scalars["weight"].tolist() == pytest.approx([1 / 8, 1 / 12] * 2)
    assert [(p.ref, p.row) for p in second.rows[4:]] == [("expert", 2), ("expert", 0)]
    assert [(p.ref, p.row) for p in third.rows[4:]] == [("expert", 1), ("expert", 2)]
    assert second.lengths[4:].tolist() == [7, 6]
    assert second.scalars["expert"].tolist() == [0, 0, 0, 0, 1, 1]
    assert second.scalars["weight"].tolist() == pytest.approx([0.75 / 8, 0.75 / 12] * 2 + [0.25 / 7] * 2)
    assert second.scalars["advantage"][4:].tolist() == [0, 0]
    assert second.columns["ref_logprobs"][4:] == [ABSENT, ABSENT]
    assert second.prefixes is not None
    assert len(set(second.prefixes.groups[4:].tolist()) - set(second.prefixes.groups[:4].tolist())) == 2
    weights = third.scalars["weight"]
    lengths = np.array([2, 3, 2, 3, 1, 5])
    assert (weights * lengths)[:4].sum() == pytest.approx(0.5)
    assert (weights * lengths)[4:].sum() == pytest.approx(0.5)
