"""PPO through the Python API: a policy, and a critic that learns what its tokens are worth.

Without arguments it makes a tiny model and arithmetic problems and trains on this machine, offline:

    python examples/ppo.py

Any flag of `raytune-rl rlhf --rlhf_type ppo` overrides a default below. With a reward model, by the command:

    raytune-rl rlhf --rlhf_type ppo --model Qwen/Qwen2.5-7B-Instruct --dataset prompts.jsonl \
        --reward_model output/v0-20260101-120000/checkpoint-500 --kl_coef 0.05 --missing_eos_penalty 1
"""

import sys
import tempfile
from pathlib import Path

from raytune_rl import PPOConfig, guarded, parse, run_ppo
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
        "per_device_train_batch_size": 32,
        "max_completion_length": 32,
        "max_steps": 8,
        "logging_steps": 1,
        "output_dir": "output",
    }
    parsed = parse(sys.argv[1:], PPOConfig, defaults=embedded)
    result = run_ppo(parsed.config, notices=parsed.notices)
    print(f"{result.status} after {result.steps} steps; the model is in {result.last_checkpoint}")
    return 0 if result.status == "finished" else 130


if __name__ == "__main__":
    sys.exit(guarded(main))
