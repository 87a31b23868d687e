"""`raytune-rl reward-check`: real rewards in real child processes, over rows with solutions of all kinds."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from raytune_rl.config import RewardCheckConfig
from raytune_rl.errors import ConfigError, RewardError
from raytune_rl.pipelines import reward_check
from raytune_rl.rewards.preflight import RewardNeeds, preflight
from raytune_rl.rewards.sandbox import memory_limit_bytes

PLUGIN = """
from swift.rewards import ORM, orms

class Picky(ORM):
    def __call__(self, completions, level, **kwargs):
        if any(value == 3 for value in level):
            raise ValueError("no level 3 here")
        return [None if value == 2 else 0.25 for value in level]

def greedy(completions, level, **kwargs):
    return [float(len(bytearray(3 << 30)) > 0) if value == 2 else 1.0 for value in level]

def pictured(completions, images, **kwargs):
    assert all(one["path"].endswith("a.png") for row in images for one in row)
    return [float(len(row)) for row in images]

def broken(completions, **kwargs):
    raise KeyError("always")

orms.update(pictured=pictured, greedy=greedy, picky=Picky, broken=broken)
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": "6*7=?"}], "solution": solution, "level": level}
        for solution, level in (("$42$", 1), ("42", 2), ("a letter", 1), ("\\boxed{42}", 3))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "plugin.py").write_text(PLUGIN)
    return path


def check(data: Path, *names: str, **settings: object) -> tuple[dict[str, reward_check.Tried], str]:
    output = io.StringIO()
    config = RewardCheckConfig(
        dataset=str(data), reward_funcs=names, external_plugins=str(data.parent / "plugin.py"), **settings
    )
    tried = reward_check.run(config, Console(file=output, width=160))
    return {found.kind: found for found in tried}, output.getvalue()


def test_solutions_as_they_stand_in_tags_and_nothing(data: Path) -> None:
    found, output = check(data, "accuracy", "format", "picky", "soft_overlong", soft_cache_length=500)
    rows = np.asarray([len(t.values) for t in found.values()])
    assert list(found) == ["its own `solution`", "`solution` in <answer>", "empty"]
    assert set(rows) == {4}
    own, tagged, empty = (t.values for t in found.values())
    assert np.nansum(own[:, 0]) == 1, "without a tag only the boxed one counts as an answer"
    assert np.nansum(tagged[:, 0]) == 3
    assert np.nansum(empty[:, 0]) == 0
    assert [np.nansum(v[:, 1]) for v in (own, tagged, empty)] == [0, 4, 0]
    assert [np.isnan(v[:, 0]).sum() for v in (own, tagged, empty)] == [1, 1, 1], "a letter is no mathematics"
    assert sorted(own[:, 2][np.isfinite(own[:, 2])]) == [0.25, 0.25]
    assert {f.kind for f in found["empty"].failures if f.function == "picky"} == {"exception"}
    assert (own[:, 3].max(), tagged[:, 3].max()) == (-0.0, 0.0), "short ones cost nothing"
    assert "4 of 4 rows" in output
    assert "without --model a token is taken for four bytes" in output
    assert "picky, empty: 1 x exception; first" in output
    assert "rows.jsonl:4: ValueError: no level 3 here (plugin.py:7)" in output
    assert "in all" in output


def test_rewards_see_the_pictures(data: Path) -> None:
    data.write_text(
        '{"images": ["a.png"], "messages": [{"role": "user", "content": "<image>?"}], "solution": "1"}\n'
        '{"messages": [{"role": "user", "content": "?"}], "solution": "2"}\n'
    )
    found, _ = check(data, "pictured")
    assert sorted(found["empty"].values[:, 0]) == [0, 1]


def test_a_function_that_never_works_is_an_error(data: Path) -> None:
    with pytest.raises(RewardError, match=r"`broken` scored nothing at all: KeyError: 'always'"):
        check(data, "broken", "format")


def test_memory_is_limited_and_the_limit_can_be_lifted(data: Path) -> None:
    found, output = check(data, "greedy", reward_memory_limit=2)
    assert len(found["empty"].failures) == 1, "one sample costs itself only"
    assert "MemoryError" in output
    assert memory_limit_bytes(0) is None


def test_what_is_missing_is_said(data: Path) -> None:
    with pytest.raises(RewardError, match=r"Unknown reward function `fromat`. Did you mean format"):
        check(data, "fromat")
    with pytest.raises(ConfigError, match="--reward_funcs is required"):
        RewardCheckConfig(dataset="d")
    needs = preflight(["accuracy", "picky"], [str(data.parent / "plugin.py")], {})
    assert needs == RewardNeeds(("accuracy", "picky"), (("solution",), ("level",)))
    needs.check(["solution", "level", "more"])
    with pytest.raises(RewardError, match="`picky` needs the column level; the data has: solution"):
        needs.check(["solution"])
    with pytest.raises(RewardError, match=r"the run's own values: is_truncated\. Rename"):
        needs.check(["solution", "level", "is_truncated"])


def test_it_is_light(data: Path) -> None:
    """No Ray, no torch, no model: as a command, in a process of its own."""
    code = (
        "import sys; from raytune_rl.cli import main; "
        f"status = main(['reward-check', '--dataset', {str(data)!r}, '--reward_funcs', 'format']); "
        "print(status, *sorted({'ray', 'torch', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0", done.stderr
