"""Ray-native post-training of language models: configs in, results out.

    from raytune_rl import RLHFConfig, run_rlhf

    result = run_rlhf(RLHFConfig(model="...", dataset="...", reward_funcs=["accuracy"]))

Names are looked up on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytune_rl.cli import guarded as guarded
    from raytune_rl.config import ExportConfig as ExportConfig
    from raytune_rl.config import InferConfig as InferConfig
    from raytune_rl.config import PPOConfig as PPOConfig
    from raytune_rl.config import PreferenceConfig as PreferenceConfig
    from raytune_rl.config import RewardCheckConfig as RewardCheckConfig
    from raytune_rl.config import RLHFConfig as RLHFConfig
    from raytune_rl.config import SFTConfig as SFTConfig
    from raytune_rl.config.parser import parse as parse
    from raytune_rl.errors import ConfigError as ConfigError
    from raytune_rl.errors import RaytuneError as RaytuneError

_WHERE = {
    "ExportConfig": ("raytune_rl.config", "ExportConfig"),
    "InferConfig": ("raytune_rl.config", "InferConfig"),
    "PreferenceConfig": ("raytune_rl.config", "PreferenceConfig"),
    "PPOConfig": ("raytune_rl.config", "PPOConfig"),
    "RLHFConfig": ("raytune_rl.config", "RLHFConfig"),
    "RewardCheckConfig": ("raytune_rl.config", "RewardCheckConfig"),
    "SFTConfig": ("raytune_rl.config", "SFTConfig"),
    "guarded": ("raytune_rl.cli", "guarded"),
    "parse": ("raytune_rl.config.parser", "parse"),
    "ConfigError": ("raytune_rl.errors", "ConfigError"),
    "RaytuneError": ("raytune_rl.errors", "RaytuneError"),
    "run_sft": ("raytune_rl.pipelines.sft", "run"),
    "run_preference": ("raytune_rl.pipelines.preference", "run"),
    "run_ppo": ("raytune_rl.pipelines.ppo", "run"),
    "run_rlhf": ("raytune_rl.pipelines.online", "run"),
    "run_reward_check": ("raytune_rl.pipelines.reward_check", "run"),
    "run_infer": ("raytune_rl.infer", "run"),
    "run_plan": ("raytune_rl.pipelines.dry_run", "run"),
    "run_export": ("raytune_rl.export", "run"),
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("raytune-rl")
        except PackageNotFoundError:
            return "0+unknown"
    if name in _WHERE:
        module, attribute = _WHERE[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'raytune_rl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
