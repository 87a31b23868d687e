"""Learning from preferences through the Python API: DPO, or with --rlhf_type kto, orpo, cpo, simpo, rm.

Without arguments it trains a tiny model on sums with a right and a wrong answer, offline:

    python examples/dpo.py --rlhf_type simpo --max_steps 40

Any flag of `raytune-rl rlhf --rlhf_type dpo` overrides a default. The same on your own data, rows such as
{"messages": [...], "rejected_response": "..."}, by the command:

    raytune-rl rlhf --rlhf_type dpo --model Qwen/Qwen2.5-7B-Instruct --dataset pairs.jsonl --train_type lora \
        --split_dataset_ratio 0.01 --learning_rate 5e-6 --beta 0.1 --rpo_alpha 0.1 --output_dir output
"""

import sys
import tempfile
from pathlib import Path

from raytune_rl import PreferenceConfig, guarded, parse, run_preference
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.tiny.preferences import write_preferences


def main() -> int:
    here = Path(tempfile.mkdtemp(prefix="raytune_rl_"))
    files = write_preferences(here / "data")
    single = "kto" in sys.argv
    embedded = {
        "model": str(make_tiny_model(here / "model")),
        "dataset": str(files.labelled if single else files.pairs),
        "val_dataset": str(files.held_out_labelled if single else files.held_out_pairs),
        "train_type": "full",
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-4,
        "max_steps": 20,
        "output_dir": "output",
    }
    parsed = parse(sys.argv[1:], PreferenceConfig, defaults=embedded)
    result = run_preference(parsed.config, notices=parsed.notices)
    margin = [metrics.get("eval_rewards/margins", float("nan")) for metrics in (result.before, result.after)]
    print(f"{result.status} after {result.steps} steps; held-out margin {margin[0]:.3g} -> {margin[1]:.3g}")
    return 0 if result.status == "finished" else 130


if __name__ == "__main__":
    sys.exit(guarded(main))
