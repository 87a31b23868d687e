"""Paths and lengths for the workers: they must hold on another machine, and be refused before they
start.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_rl.config import RLHFConfig, SFTConfig
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines.local_paths import made_absolute
from raytune_rl.prepare.sets import check_lengths
from raytune_rl.rewards.plugins import PluginFile

PLUGIN = """
from raytune_rl.rewards.registry import orms

class Long:
    def __call__(self, completions, **kwargs):
        return [float(len(text)) for text in completions]

orms["long"] = Long
"""
WORKER = """
import pickle, sys
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.rewards.sandbox import Sandbox
from raytune_rl.rewards import registry
files = pickle.loads(bytes.fromhex(sys.argv[1]))
load_plugins(files)
print(sorted(name for name in registry.orms if name == "long"))
"""


def test_what_exists_here_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "reward.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    asked = RLHFConfig(
        model="policy",
        adapters=["adapter", "owner/adapter"],
        reward_model=["owner/judge"],
        dataset="rows.jsonl#10",
        reward_funcs=["long"],
        external_plugins=["reward.py", "nowhere.py"],
    )
    absolute = made_absolute(asked)
    assert absolute.model == str(tmp_path / "policy")
    assert absolute.adapters == (str(tmp_path / "adapter"), "owner/adapter")
    assert absolute.reward_model == ("owner/judge",)
    assert absolute.dataset == ("rows.jsonl#10",), "read on this machine, in this folder"
    assert absolute.external_plugins == (str(tmp_path / "reward.py"), str(tmp_path / "nowhere.py"))
    assert absolute.is_set("model")
    assert not absolute.is_set("ref_model"), "what is not given stays so"
    assert asked.model == "policy"
    assert absolute.args()["external_plugins"][0] == str(tmp_path / "reward.py")
    hub = SFTConfig(model="owner/policy", dataset="rows.jsonl")
    assert made_absolute(hub) == hub


@pytest.mark.parametrize("there", [True, False])
def test_a_plugin_loads_where_its_file_is_not(tmp_path: Path, there: bool) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "here" / "reward.py"
    file.write_text(PLUGIN)
    carried = pickle.dumps((PluginFile.read(file),)).hex()
    if not there:
        file.unlink()
    ran = subprocess.run(
        [sys.executable, "-c", WORKER, carried],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)},
    )
    assert ran.stdout == "['long']\n", ran.stderr
    assert not list(tmp_path.glob("raytune_rl-plugins-*")), "nothing is left behind"


def test_an_engine_longer_than_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    assert check_lengths(100, 28, None, 512) == 128
    assert check_lengths(100, 28, 512, 512) == 512
    with pytest.raises(ConfigError, match=r"--vllm_max_model_len 1024 is more than the 512 tokens"):
        check_lengths(100, 28, 1024, 512)
    assert check_lengths(100, 28, 1024, None) == 1024, "the model does not say"
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert check_lengths(100, 28, 1024, 512) == 1024
