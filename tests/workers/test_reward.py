import os
import signal

import numpy as np
import pytest

from raytune_rl.data.media_table import Medium, StoredFile
from raytune_rl.errors import RewardError
from raytune_rl.groups.fleet import reward_columns
from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.rewards import RUN_COLUMNS, TrainerState
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.trajectory import EpisodeFacts, Trajectory
from raytune_rl.workers.reward import RewardWorker
from tests.columns import media_columns

PLUGIN = """
import sys
from swift.rewards import orms

def together(completions, value, prompt_id, **kwargs):
    return [100 * len(c) + 10 * v + p for c, v, p in zip(completions, value, prompt_id, strict=True)]

def sampled(completions, response_token_ids, images, rollout_infos, **kwargs):
    assert rollout_infos == [{}] * len(completions)
    named = [sum((i["path"] == "a.png") + 2 * (i["bytes"] == b"png") for i in row) for row in images]
    return [100 * n + sum(ids) for n, ids in zip(named, response_token_ids, strict=True)]

def contract(completions, **kwargs):
    # What ms-swift hands to a reward; each a list with one entry a completion, but for trainer_state.
    wanted = {
        "solution", "problem", "messages", "prompt_id", "request_id", "finish_reason", "is_truncated",
        "rollout_infos", "response_token_ids", "images", "trainer_state",
    }
    assert wanted <= kwargs.keys(), wanted - kwargs.keys()
    state = kwargs["trainer_state"]
    assert (state.global_step, state.max_steps) == (3, 9)
    assert all(len(kwargs[name]) == len(completions) for name in wanted - {"trainer_state"})
    return [10 * len(p) + t for p, t in zip(kwargs["problem"], kwargs["is_truncated"], strict=True)]

def last_turn(completions, messages, **kwargs):
    assert [turns[-1] for turns in messages] == [{"role": "assistant", "content": c} for c in completions]
    return [len(turns) for turns in messages]

def light(completions, **kwargs):
    return [float("ray" not in sys.modules and "torch" not in sys.modules)] * len(completions)

orms.update(contract=contract, sampled=sampled, together=together, last_turn=last_turn, light=light)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "together.py"
    path.write_text(PLUGIN)
    return str(path)


@pytest.fixture(scope="module")
def worker(plugin):
    worker = RewardWorker(["together", "accuracy"], [plugin], {}, 20.0)
    yield worker
    worker.close()


def test_rows_and_columns_are_selected(worker):
    scores = worker.score(
        ["", "a", "bb", "ccc"],
        [3, 1, 1],
        {"value": [7, 8], "solution": ["1", "2"]},
        [1, 0, 1],
        {"prompt_id": [4, 5, 6]},
    )
    assert scores.values[:, 0].tolist() == [300 + 80 + 4, 100 + 70 + 5, 100 + 80 + 6]
    assert scores.labels == worker.labels() == ("together", "MathAccuracy")
    assert worker.ping()


def test_sampled_tokens_and_pictures(plugin):
    worker = RewardWorker(["sampled"], [plugin], {}, 20.0)
    made = {
        "tokens": Ragged.from_rows([[9, 9, 1, 2, 3], [9, 4, 9, 5]], np.int32),
        "loss_mask": Ragged.from_rows([[0, 0, 1, 1, 1], [0, 1, 0, 1]], np.bool_),
    }
    shown = Medium("image", (StoredFile(1, path="a.png"),))
    pictures = media_columns([[shown], [shown, Medium("image", (StoredFile(2, b"png"),))], []])
    try:
        scores = worker.score(["x", "y"], [1, 0, 1], {}, [0, 1, 2], {}, None, made, pictures)
        assert scores.values[:, 0].tolist() == [100 + 9, 300 + 6, 9]
    finally:
        worker.close()


def test_all_that_ms_swift_hands_to_a_reward_arrives(plugin):
    def ended(prompt, reason):
        place = RowPointer(None, 0)
        return Trajectory(prompt, 0, place, place, EpisodeFacts(0, 0, 0, 3, 2, reason, 0))

    worker = RewardWorker(["contract"], [plugin], {}, 20.0)
    turns = [[{"role": "user", "content": "?"}]] * 2
    columns = {"solution": ["1", "2"], "problem": ["a", "bb"], "messages": turns}
    made = {
        "tokens": Ragged.from_rows([[1, 2]] * 2, np.int32),
        "loss_mask": Ragged.from_rows([[0, 1]] * 2, np.bool_),
    }
    shown = Medium("image", (StoredFile(1, path="a.png"),))
    pictures = media_columns([[shown], []])
    extra = reward_columns([ended(0, "length"), ended(1, "stop")], TrainerState(3, 9))
    try:
        scores = worker.score(["x", "y"], [0, 1], columns, [0, 1], extra, None, made, pictures)
        assert scores.failures == ()
        assert scores.values[:, 0].tolist() == [11.0, 20.0]
        assert {*extra, "rollout_infos", "response_token_ids"} == set(RUN_COLUMNS)
    finally:
        worker.close()


def test_messages_end_with_the_completion(plugin):
    worker = RewardWorker(["last_turn"], [plugin], {}, 20.0)
    try:
        prompts = {"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}] * 3]}
        scores = worker.score(["x", "y"], [1, 0, 0], prompts, [0, 1, 0], {})
        assert scores.values[:, 0].tolist() == [2, 4, 2]
        assert len(prompts["messages"][0]) == 1, "what lies in the object store is not changed"
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("rows", "column_rows", "extra", "message"),
    [
        ([0, 1], [0], {"prompt_id": [1, 2]}, "2 completions but 1 column rows"),
        ([0], [0], {"prompt_id": [1, 2]}, "`prompt_id` has 2 entries for 1"),
        ([0], [0], {"prompt_id": [1], "value": [3]}, "names under which reward functions receive.*value"),
        ([0], [0], {}, "`together` needs the column prompt_id"),
    ],
)
def test_what_does_not_fit_is_an_error(worker, rows, column_rows, extra, message):
    with pytest.raises(RewardError, match=message):
        worker.score(["a", "b"], rows, {"value": [7], "solution": ["1"]}, column_rows, extra)


@pytest.mark.cluster
def test_as_an_actor_it_fetches_from_the_object_store(plugin):
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=1, include_dashboard=False)
    try:
        worker = (
            ray.remote(RewardWorker).options(num_cpus=0).remote(["together", "light"], [plugin], {}, 20.0)
        )
        texts, columns = ray.put(["", "a", "bb"]), ray.put({"value": [7, 8]})
        for wrapped in (False, True):
            arguments = ([texts], [columns]) if wrapped else (texts, columns)
            call = worker.score.remote(arguments[0], [2, 1], arguments[1], [0, 1], {"prompt_id": [1, 2]})
            scores = ray.get(call, timeout=120)
            np.testing.assert_array_equal(scores.values, [[271.0, 1.0], [182.0, 1.0]])
            assert scores.failures == ()
        ray.get(worker.close.remote(), timeout=30)
    finally:
        if started:
            ray.shutdown()


@pytest.mark.cluster
def test_one_that_is_stopped_is_replaced_long_before_its_deadline(plugin):
    import ray

    from raytune_rl.runtime.cluster import reserve
    from raytune_rl.runtime.group import WorkerGroup
    from raytune_rl.runtime.placement import GroupSpec

    started, losses = not ray.is_initialized(), []
    if started:
        ray.init(address="local", num_cpus=1, include_dashboard=False)
    try:
        spec = GroupSpec("reward", 1, cpus=0.1)
        made = {"names": ["together"], "plugin_files": [plugin], "config_dict": {}, "timeout_s": 20.0}
        with reserve([spec], 60.0) as slots:
            group = WorkerGroup(spec, slots["reward"], RewardWorker, lambda rank: made, {}, 300.0)
            group.replace_lost(120.0, lambda *loss: losses.append(loss))
            group.call("ping")
            group.replace_hung(4.0)
            pid = ray._private.state.actors(group._actors[0]._actor_id.hex())["Pid"]
            os.kill(pid, signal.SIGSTOP)
            asked = (["", "a", "bb"], [2, 1], {"value": [7, 8]}, [0, 1], {"prompt_id": [1, 2]})
            (scores,) = group.call("score", *asked)
            assert scores.values[:, 0].tolist() == [271.0, 182.0]
            group.shutdown()
        ((who, sentence),) = losses
        assert who == "reward"
        assert "gives no sign of life" in sentence
    finally:
        if started:
            ray.shutdown()
