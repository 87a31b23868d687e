"""No setting is only declared: somebody outside of `config/` reads it, or it is known how it acts."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

import raytune_rl
from raytune_rl.algorithms import registry
from raytune_rl.config import (
    AlgorithmsConfig,
    ExportConfig,
    InferConfig,
    PPOConfig,
    PreferenceConfig,
    RewardCheckConfig,
    RLHFConfig,
    SFTConfig,
)
from raytune_rl.config.flags import flags_of
from raytune_rl.config.ppo import TWINS
from raytune_rl.rewards.registry import orms

ROOT = Path(raytune_rl.__file__).parent
RESOLVES = {"resolved.py", "batching.py", "commands.py"}
"""Files of `config/` whose functions the pipelines call."""
OTHERWISE = {
    "use_vllm": "false is refused: the engines are vLLM's",
    "per_device_eval_batch_size": "a notice says that it has no effect",
    "quant_method": "it has one value, which --quant_bits goes with",
    "reward_model_plugin": "default, the only value, is what happens anyway",
}


def read_by_name() -> set[str]:
    """Attributes that are read anywhere but in validators, whatever of."""
    files = [p for p in ROOT.rglob("*.py") if p.parent.name != "config" or p.name in RESOLVES]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def read_in_families() -> set[str]:
    """Settings that are read by names that are put together: group sizes, settings of losses, arguments of
    rewards.
    """
    groups = ("policy", "rollout", "reference", "critic", "reward", "reward_model", "teacher")
    sizes = {n.format(g) for g in groups for n in ("{}_workers", "gpus_per_{}_worker", "cpus_per_{}_worker")}
    losses = {f.name for name in registry.loss_names() for f in fields(registry.get_loss(name).settings_type)}
    rewards = {n for reward in orms.values() for n in inspect.signature(reward.__init__).parameters}
    return sizes | losses | rewards


@pytest.mark.parametrize(
    "config_class",
    [
        SFTConfig,
        PreferenceConfig,
        RLHFConfig,
        PPOConfig,
        RewardCheckConfig,
        AlgorithmsConfig,
        InferConfig,
        ExportConfig,
    ],
    ids=lambda c: c.__name__,
)
def test_every_flag_is_read(config_class: type) -> None:
    read = read_by_name() | read_in_families() | OTHERWISE.keys()
    read |= {ours for theirs, ours in TWINS.items() if theirs in read}
    assert [name for name in flags_of(config_class) if name not in read] == []
