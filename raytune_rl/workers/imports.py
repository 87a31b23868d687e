"""What the workers of a run import that takes seconds, for `runtime.fork_server`."""

from __future__ import annotations

from typing import Final

from raytune_rl.runtime.fork_server import Stage

TRAINING: Final = Stage("training", ("torch", "transformers", "datasets", "peft", "deepspeed", "math_verify"))
"""Of the workers that train or score, and of the data task."""
SAMPLING: Final = Stage(
    "sampling",
    ("vllm.v1.engine.llm_engine", "vllm.engine.arg_utils", "vllm.v1.worker.cpu_worker"),
    {"VLLM_LOGGING_LEVEL": "WARNING"},
)
"""Of the workers that hold an engine, after the others'."""
