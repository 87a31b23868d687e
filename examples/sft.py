"""Supervised fine-tuning through the Python API.

Without arguments it trains a tiny model on arithmetic, offline; any flag of `raytune-rl sft` overrides a
default:

    python examples/sft.py --max_steps 100
"""

import sys
import tempfile
from pathlib import Path

from raytune_rl import SFTConfig, guarded, parse, run_sft
from raytune_rl.tiny.arithmetic import write_dataset
from raytune_rl.tiny.model import make_tiny_model


def main() -> int:
    here = Path(tempfile.mkdtemp(prefix="raytune_rl_"))
    embedded = {
        "model": str(make_tiny_model(here / "model")),
        "dataset": str(write_dataset(here / "data").sft),
        "train_type": "full",
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "max_steps": 20,
        "output_dir": "output",
    }
    parsed = parse(sys.argv[1:], SFTConfig, defaults=embedded)
    result = run_sft(parsed.config, notices=parsed.notices)
    print(f"{result.status} after {result.steps} steps; the model is in {result.last_checkpoint}")
    return 0 if result.status == "finished" else 130


if __name__ == "__main__":
    sys.exit(guarded(main))
