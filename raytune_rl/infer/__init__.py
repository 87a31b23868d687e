"""Trying a model, as it is or with a trained adapter: by the engines that online RL samples with.

`run` is what the command line calls.
"""

from raytune_rl.infer.command import InferResult, run

__all__ = ["InferResult", "run"]
