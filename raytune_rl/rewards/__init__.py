"""Reward functions, the registry that names them, and the child processes they run in."""

from raytune_rl.rewards.base import ORM, AsyncORM
from raytune_rl.rewards.registry import orms

__all__ = ["ORM", "AsyncORM", "orms"]
