"""The main job on the embedded default, offline: make a tiny model, warm it up with SFT, train it with GRPO.

Everything is real but the size: DeepSpeed ZeRO-2, vLLM, a reference model and reward workers, as Ray actors.
Run it by `make demo`; it leaves checkpoints, logs and plots in `demo_output/`.
"""

import sys
import time
from pathlib import Path

from raytune_rl import RLHFConfig, SFTConfig, guarded, run_rlhf, run_sft
from raytune_rl.runtime.cluster import session
from raytune_rl.tiny.arithmetic import write_dataset
from raytune_rl.tiny.model import make_tiny_model

OUTPUT = Path("demo_output")


def main() -> int:
    started = time.monotonic()
    model = make_tiny_model(OUTPUT / "model")
    problems = write_dataset(OUTPUT / "data")
    with session():
        warm = run_sft(
            SFTConfig(
                model=str(model),
                dataset=str(problems.sft),
                train_type="full",
                max_steps=160,
                per_device_train_batch_size=64,
                gradient_accumulation_steps=1,
                learning_rate=2e-3,
                warmup_steps=10,
                logging_steps=20,
                output_dir=str(OUTPUT / "sft"),
            )
        )
        result = run_rlhf(
            RLHFConfig(
                rlhf_type="grpo",
                model=str(warm.last_checkpoint),
                dataset=str(problems.train),
                val_dataset=str(problems.held_out),
                reward_funcs=["accuracy", "format"],
                train_type="full",
                num_generations=8,
                num_generations_eval=2,
                per_device_train_batch_size=128,
                max_completion_length=32,
                temperature=1.0,
                learning_rate=7e-5,
                lr_scheduler_type="constant",
                beta=0.01,
                max_steps=40,
                eval_steps=20,
                save_steps=20,
                logging_steps=5,
                log_completions=True,
                output_dir=str(OUTPUT / "grpo"),
            )
        )
    before, after = result.before["eval_reward"], result.after["eval_reward"]
    right = [m["eval_rewards/MathAccuracy/mean"] for m in (result.before, result.after)]
    print(
        f"\nDone in {(time.monotonic() - started) / 60:.1f} min. On problems it never saw, the reward went "
        f"from {before:.2f} "
        f"to {after:.2f} (right answers: {right[0]:.0%} -> {right[1]:.0%}).\n"
        f"Reward plot: {result.run_dir / 'images' / 'train_reward.png'}\nModel: {result.last_checkpoint}"
    )
    return 0 if result.status == "finished" and after > before else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
