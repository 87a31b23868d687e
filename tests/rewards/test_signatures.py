"""Reward functions as TRL, verl and ms-swift document them, called through the sandbox as in a run."""

import json

import numpy as np
import pytest

from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import TrainerState
from raytune_rl.rewards.preflight import RewardNeeds
from raytune_rl.rewards.sandbox import Sandbox
from raytune_rl.rewards.signatures import Completion

PLUGIN = """
import asyncio
from swift.rewards import AsyncORM, ORM, orms

# TRL, as its documentation writes them.
def by_length(prompts, completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def ids(completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def chat_format(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if content.startswith("<think>") else 0.0 for content in contents]

def either(prompts, completions, solution, trainer_state=None, **kwargs):
    texts = [c[-1]["content"] if isinstance(c, list) else c for c in completions]
    asked = [prompt[-1]["content"] for prompt in prompts]
    return [None if s is None else float(s in t and "?" in a) + trainer_state.global_step
            for t, s, a in zip(texts, solution, asked)]

async def slow(prompts, completions, log_metric=None, **kwargs):
    await asyncio.sleep(0)
    return [float(len(p)) for p in prompts]

def only_keywords(*, completions, solution):
    return [float(c == s) for c, s in zip(completions, solution)]

def kwargs_only(**kwargs):
    return [float(len(kwargs["prompts"][0]))] * len(kwargs["completions"])

def logs(prompts, completions, log_metric):
    return [0.0] * len(prompts)

def nothing():
    return []

# verl
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "raise":
        raise ValueError("no")
    return {"score": float(ground_truth in solution_str) + extra_info.get("bonus", 0), "acc": 1}

def plain_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float(solution_str == ground_truth and data_source == "")

async def async_score(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0)
    return 1.0 if solution_str == ground_truth else 0.0

def batch_score(data_sources, solution_strs, ground_truths, extra_infos, level):
    return [{"score": float(s == g) + l} for s, g, l in zip(solution_strs, ground_truths, level)]

def no_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"reward": 1.0}

# ms-swift
class Swift(ORM):
    def __call__(self, completions, solution, **kwargs):
        assert {"messages", "trainer_state"} <= set(kwargs)
        return [float(c == s) for c, s in zip(completions, solution)]

def first_by_position(texts, solution):
    return [float(t == s) for t, s in zip(texts, solution)]

def unregistered(completions, **kwargs):
    return [1.0] * len(completions)

for f in (by_length, ids, chat_format, either, slow, only_keywords, kwargs_only, logs, nothing, compute_score,
          plain_score, async_score, batch_score, no_score, first_by_position):
    orms[f.__name__] = f
orms["swift"] = Swift
"""
TEXTS = ["<think>x", "4"]
COLUMNS = {
    "messages": [
        [{"role": "user", "content": q}, {"role": "assistant", "content": t}]
        for q, t in zip(["2+1?", "2+2?"], TEXTS, strict=True)
    ],
    "solution": [None, "4"],
    "response_token_ids": [[1, 2, 3], [1]],
    "trainer_state": TrainerState(10, 20),
    "level": [100, 200],
}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "forms.py"
    path.write_text(PLUGIN)
    return str(path)


def score(plugin, name, texts=TEXTS, columns=COLUMNS):
    sandbox = Sandbox([name], [plugin], {}, timeout_s=20.0)
    try:
        return sandbox.score(texts, columns)
    finally:
        sandbox.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("by_length", [8, 1]),
        ("ids", [3, 1]),
        ("chat_format", [1, 0]),
        ("either", [np.nan, 11]),
        ("slow", [1, 1]),
        ("only_keywords", [0, 1]),
        ("kwargs_only", [1, 1]),
        ("swift", [0, 1]),
        ("first_by_position", [0, 1]),
        ("async_score", [0, 1]),
        ("batch_score", [100, 201]),
        ("plain_score", [0, 1]),
    ],
)
def test_each_form_is_called_as_it_expects(plugin, name, expected):
    scores = score(plugin, name)
    assert scores.failures == ()
    np.testing.assert_array_equal(scores.values[:, 0], expected)


def test_verl_scores_one_completion_a_call(plugin):
    columns = {
        "ground_truth": ["3", "4", "4"],
        "data_source": ["gsm8k"] * 3,
        "extra_info": [None, {"bonus": 2}, {}],
    }
    scores = score(plugin, "compute_score", ["3", "4", "raise"], columns)
    np.testing.assert_array_equal(scores.values[:, 0], [1, 3, np.nan])
    assert [(f.row, f.kind) for f in scores.failures] == [(2, "exception")]
    nested = {"reward_model": [{"ground_truth": "3", "style": "rule"}]}
    assert score(plugin, "compute_score", ["3"], nested).values.tolist() == [[1.0]]
    (failure,) = score(plugin, "no_score", ["3"], nested).failures
    assert failure.message == "returned a dict without 'score': ['reward']"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logs", "Reward `logs` takes `log_metric`, which TRL gives and raytune_rl does not have"),
        ("nothing", r"takes no completions: write f\(completions, \*\*kwargs\)"),
        (
            "unregistered",
            r"forms.py has a `unregistered`, but does not register it\. .*orms\['unregistered'\] =",
        ),
    ],
)
def test_what_cannot_be_called_is_refused_with_advice(plugin, name, message):
    with pytest.raises(RewardError, match=message):
        Sandbox([name], [plugin], {}, 5.0)


def test_a_missing_gold_is_named_with_its_alternatives(plugin):
    sandbox = Sandbox(["compute_score", "by_length", "batch_score"], [plugin], {}, 5.0)
    needs = RewardNeeds(sandbox.names, sandbox.required)
    sandbox.close()
    with pytest.raises(RewardError, match=r'ground_truth or solution or reward_model.*: "ground_truth"}'):
        needs.check(["messages", "answer"])
    with pytest.raises(RewardError, match="`batch_score` needs the column level"):
        needs.check(["messages", "solution"])
    needs.check(["messages", "reward_model", "level"])


def test_a_completion_reads_as_text_and_as_a_conversation():
    text = Completion("abc")
    assert text == "abc"
    assert isinstance(text, str)
    assert len(text) == 3
    assert text[1] == "b"
    assert text[:2] == "ab"
    assert text[:2] == "ab"
    assert (text[0], text[-1], text[0] + text[1]) == ("a", "c", "ab")
    for turn in (text[0], text[-1]):
        assert turn["content"] == "abc"
        assert turn["role"] == "assistant"
        assert turn.get("content") == "abc"
    assert Completion("")[0]["content"] == ""
    assert Completion("")[-1]["content"] == ""
    assert json.dumps([text]) == '["abc"]'
    assert [*text] == ["a", "b", "c"]
    with pytest.raises(TypeError):
        "".join(turn["content"] for turn in text)
