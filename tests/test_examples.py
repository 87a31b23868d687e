"""The plugin examples do what they say."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_rl.algorithms.credit.base import get_credit
from raytune_rl.config import RLHFConfig
from raytune_rl.config.batching import grpo_batch_of
from raytune_rl.config.parser import parse
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines.online_algorithms import algorithm_of, in_words
from raytune_rl.protocol.rows import TrainBatch
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.rewards.registry import build
from tests.algorithms.test_experience import NAN, experience

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


def config(**settings: Any) -> RLHFConfig:
    plugins = [str(EXAMPLES / name) for name in ("loss_plugin.py", "credit_plugin.py")]
    given = {"model": "m", "dataset": "d", "reward_funcs": "accuracy", "num_generations": 2}
    return RLHFConfig(**{**given, "external_plugins": plugins, **settings})


def test_loss_and_credit_are_chosen_by_name() -> None:
    chosen = config(
        loss_type="power",
        loss_args={"power": 0.25},
        beta=0.1,
        advantage_estimator="median",
        advantage_args='{"median_bound": 1}',
    )
    algorithm = algorithm_of(chosen)
    loss = algorithm.loss
    assert (loss.name, loss.normaliser, loss.plugin_files) == ("power", "tokens", chosen.external_plugins)
    assert (loss.settings["power"], loss.settings["beta"]) == (0.25, 0.1)
    assert algorithm.credit == get_credit("median").make(median_bound=1.0)
    plan = dict(in_words(chosen, algorithm))
    assert plan["loss"] == "power, from a plugin, ratio to the power of 0.25"
    assert plan["advantage"] == "the reward less the median of its group, at most 1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_args": {"power": -1}}, r"^--loss_args: power: -1 must be greater than 0\.0\.$"),
        ({"loss_args": {"power": "two"}}, r"^--loss_args: power: 'two' is not a number\.$"),
        ({"loss_args": {"powr": 1}}, "--loss_args: powr is no setting of loss 'power', which has: beta"),
        (
            {"advantage_args": {"median_bound": 0}},
            r"^--advantage_args: median_bound: 0 must be greater than 0",
        ),
        (
            {"advantage_args": {"bound": 1}},
            "--advantage_args: bound is no setting of credit 'median', which has",
        ),
        ({"advantage_args": "bound"}, r"--advantage_args: 'bound' is not JSON"),
    ],
)
def test_settings_of_plugins_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        algorithm_of(config(loss_type="power", advantage_estimator="median", **settings))


def test_the_credit_is_the_reward_less_the_median_within_bounds() -> None:
    load_plugins([EXAMPLES / "credit_plugin.py"])
    scored = experience([0.0, 1.0, 5.0], [NAN, 2.0, 3.0], [NAN, NAN, NAN])
    batch = TrainBatch([t.data for t in scored.batch], np.ones(9, dtype=np.int64))
    credited = get_credit("median").make(median_bound=2.0).assign(scored, batch, None)  # type: ignore[arg-type]
    assert credited.advantages.tolist() == [-1.0, 0.0, 2.0, 0.0, -0.5, 0.5, 0.0, 0.0, 0.0]
    assert credited.metrics == {"median/bounded": pytest.approx(1 / 9)}
    assert credited.batch is batch


DROPPED_IN = """
import sys
import raytune_rl.algorithms.credit, raytune_rl.algorithms.losses
raytune_rl.algorithms.losses.__path__.append(sys.argv[1])
raytune_rl.algorithms.credit.__path__.append(sys.argv[2])
from raytune_rl import cli
status = cli.main(["rlhf", "--help"])
assert not {"torch", "numpy", "ray"} & sys.modules.keys()
from raytune_rl.config.parser import parse
from raytune_rl.config import RLHFConfig
from raytune_rl.pipelines.online_algorithms import algorithm_of, in_words
words = "--model m --dataset d --reward_funcs accuracy --num_generations 2"
chosen = " --loss_type power --power 0.25 --advantage_estimator median --median_bound 1"
parsed = parse((words + chosen).split(), RLHFConfig, environ={})
algorithm = algorithm_of(parsed.config)
plan = dict(in_words(parsed.config, algorithm))
print(parsed.notices, algorithm.loss.settings["power"], algorithm.loss.plugin_files, plan["loss"], sep=" | ")
print(algorithm.credit)
print(*parse((words + " --power 0.25 --median_bound 1").split(), RLHFConfig, environ={}).notices, sep="\\n")
"""


def test_the_same_files_dropped_into_the_package_are_built_in(tmp_path: Path) -> None:
    """Names among the choices, flags with help, settings, words in the plan; no other file knows of them."""
    for name in ("loss", "credit"):
        (tmp_path / name).mkdir()
        shutil.copy(EXAMPLES / f"{name}_plugin.py", tmp_path / name / "toy.py")
    ran = subprocess.run(
        [sys.executable, "-c", DROPPED_IN, str(tmp_path / "loss"), str(tmp_path / "credit")],
        capture_output=True,
        text=True,
        check=False,
        cwd=EXAMPLES.parent,
    )
    assert ran.returncode == 0, ran.stderr
    said = " ".join(ran.stdout.split())
    assert "power is dapo with a power of the ratio and no clip;" in said
    assert "median: the reward less the group's median;" in said
    assert "--power float --loss_type power: Exponent of the importance ratio. [0.5]" in said
    assert "--median_bound float --advantage_estimator median: No advantage is farther from 0. [2]" in said
    assert "() | 0.25 | () | power, ratio to the power of 0.25 Median(median_bound=1.0)" in said
    assert "--power does nothing: --loss_type grpo does not read it, as power would." in said
    assert "--median_bound does nothing: it belongs to --advantage_estimator median." in said


def test_the_real_demos_rows_are_right_and_its_held_out_problems_new(tmp_path: Path) -> None:
    demo = runpy.run_path(str(EXAMPLES / "demo_real.py"))
    files = demo["write_data"](tmp_path)
    imitated, train, held_out = ([json.loads(row) for row in file.read_text().splitlines()] for file in files)
    scores = build(["accuracy"], {})[0](
        [row["messages"][-1]["content"] for row in imitated], {"solution": [solved(row) for row in imitated]}
    )
    assert scores == [1.0] * len(imitated)
    assert all(solved(row) == row["solution"] for row in (*train, *held_out))
    seen = {question(row) for row in (*imitated, *train)}
    assert len(held_out) > 20
    assert not seen & {question(row) for row in held_out}


def question(row: dict[str, Any]) -> tuple[str, frozenset[int]]:
    """Operation and numbers of a problem in words, in whatever order."""
    text = row["messages"][1]["content"]
    left, right = map(int, re.findall(r"\d+", text))
    sign = "-" if "gives away" in text else "*" if " bags with " in text else "+"
    return sign, frozenset((right, left - right) if sign == "-" else (left, right))


def solved(row: dict[str, Any]) -> str:
    """The answer to it."""
    left, right = map(int, re.findall(r"\d+", row["messages"][1]["content"]))
    return str({"-": left - right, "*": left * right, "+": left + right}[question(row)[0]])
