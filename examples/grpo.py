"""GRPO through the Python API: a typed config in, a result object out.

Without arguments it makes a tiny model and arithmetic problems and trains on this machine, offline:

    python examples/grpo.py

Any flag of `raytune-rl rlhf` overrides a default below. On a cluster:

    ray job submit -- python examples/grpo.py --model Qwen/Qwen2.5-7B-Instruct --dataset AI-MO/NuminaMath-TIR
"""

import sys
import tempfile
from pathlib import Path

from raytune_rl import RLHFConfig, guarded, parse, run_rlhf
from raytune_rl.tiny.arithmetic import write_dataset
from raytune_rl.tiny.model import make_tiny_model


def main() -> int:
    here = Path(tempfile.mkdtemp(prefix="raytune_rl_"))
    problems = write_dataset(here / "data")
    embedded = {
        "model": str(make_tiny_model(here / "model")),
        "dataset": str(problems.train),
        "reward_funcs": ["accuracy", "format"],
        "train_type": "full",
        "num_generations": 8,
        "per_device_train_batch_size": 32,
        "max_completion_length": 32,
        "max_steps": 4,
        "logging_steps": 1,
        "output_dir": "output",
    }
    parsed = parse(sys.argv[1:], RLHFConfig, defaults=embedded)
    result = run_rlhf(parsed.config, notices=parsed.notices)
    print(f"{result.status} after {result.steps} steps; the model is in {result.last_checkpoint}")
    return 0 if result.status == "finished" else 130


if __name__ == "__main__":
    sys.exit(guarded(main))
