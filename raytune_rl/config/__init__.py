"""The user's settings: typed, validated, printable. Imports neither torch nor ray.

Classes are looked up on first use: the help of one command builds no other command's class.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytune_rl.config.algorithm_list import AlgorithmsConfig as AlgorithmsConfig
    from raytune_rl.config.commands import PPOConfig as PPOConfig
    from raytune_rl.config.commands import PreferenceConfig as PreferenceConfig
    from raytune_rl.config.commands import RLHFConfig as RLHFConfig
    from raytune_rl.config.commands import SFTConfig as SFTConfig
    from raytune_rl.config.export import ExportConfig as ExportConfig
    from raytune_rl.config.infer import InferConfig as InferConfig
    from raytune_rl.config.reward_check import RewardCheckConfig as RewardCheckConfig

_WHERE = {
    "AlgorithmsConfig": "algorithm_list",
    "ExportConfig": "export",
    "InferConfig": "infer",
    "PPOConfig": "commands",
    "PreferenceConfig": "commands",
    "RLHFConfig": "commands",
    "RewardCheckConfig": "reward_check",
    "SFTConfig": "commands",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"raytune_rl.config.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'raytune_rl.config' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
