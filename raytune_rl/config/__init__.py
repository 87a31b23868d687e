"""What the user asked for: typed, validated, printable. Imports neither torch nor ray."""

from raytune_rl.config.commands import PPOConfig, PreferenceConfig, RLHFConfig, SFTConfig
from raytune_rl.config.export import ExportConfig
from raytune_rl.config.infer import InferConfig
from raytune_rl.config.reward_check import RewardCheckConfig

__all__ = [
    "ExportConfig",
    "InferConfig",
    "PPOConfig",
    "PreferenceConfig",
    "RLHFConfig",
    "RewardCheckConfig",
    "SFTConfig",
]
