"""The plugin examples do what they say."""

import shlex
from pathlib import Path

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.config.batching import grpo_batch_of
from raytune_rl.config.parser import parse
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.rewards.registry import build

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def rewards():
    load_plugins([EXAMPLES / "plugin.py"])
    names = ["external_r1v_acc", "external_gsm8k", "external_code_format"]
    return dict(zip(names, build(names, {}), strict=True))


def test_r1v_accuracy_is_mathematics_or_the_same_text(rewards):
    texts = [r"\boxed{1/2}", r"so \boxed{4}", "<answer>a cat</answer>", "<answer>a dog</answer>"]
    golds = ["0.5", "$4$", "<answer> a cat </answer>", "<answer>a cat</answer>"]
    assert rewards["external_r1v_acc"](texts, {"solution": golds}) == [1.0, 1.0, 1.0, 0.0]


def test_gsm8k_compares_the_last_number(rewards):
    answer = ["9 + 3\n#### 1,200"] * 4 + ["no number"]
    texts = ["It is 1200.", "$1,200.00", "1200 or 3", "", "4"]
    assert rewards["external_gsm8k"](texts, {"answer": answer}) == [1.0, 1.0, 0.0, 0.0, None]


def test_code_format_parses_and_runs_nothing(rewards):
    def shaped(code: str) -> str:
        return f"<think>hm</think>\n<answer>```python\n{code}```</answer>"

    texts = [shaped("x = 1\n"), shaped("x = = 1\n"), shaped(""), "```python\nx = 1\n```", shaped("1 / 0\n")]
    assert rewards["external_code_format"](texts, {}) == [1.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_commands_are_understood(name: str):
    text = (EXAMPLES / "commands" / f"{name}.sh").read_text().replace("\\\n", " ")
    words = shlex.split(text, comments=True)
    assert words[:2] == ["raytune-rl", "rlhf"]
    parsed = parse(words[2:], RLHFConfig, environ={})
    batch = grpo_batch_of(parsed.config, parsed.config.policy_workers or 1)
    assert batch.optimizer_steps_per_generation == 4
    assert not [notice for notice in parsed.notices if "does nothing" in notice]


def test_the_loss_is_chosen_by_name():
    config = RLHFConfig(
        model="m",
        dataset="d",
        reward_funcs="accuracy",
        num_generations=2,
        external_plugins=str(EXAMPLES / "loss_plugin.py"),
        loss_type="power",
        loss_args={"power": 0.25},
        beta=0.1,
    )
    algorithm = algorithm_of(config)
    assert (algorithm.loss, algorithm.loss.normaliser) == ("power", "dapo")
    assert (algorithm.loss.settings["power"], algorithm.loss.settings["beta"]) == (0.25, 0.1)
