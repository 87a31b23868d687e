"""TRL's SFTTrainer on a file of chats, one optimizer step at a time: run by `sft_throughput.py` in an
environment of its own.

It speaks JSON, a line at a time. It says {"ready": true} when it could begin with a step; for each line that
it is sent it takes one step, from fetching the batch to the optimizer, and says how many tokens of rows that
was and how many seconds it took. It ends with its input.
"""

import argparse
import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

ANSWERS = sys.stdout
# What the libraries print is no answer.
sys.stdout = sys.stderr


def say(**what: float) -> None:
    print(json.dumps(what), file=ANSWERS, flush=True)


class InTurns(SFTTrainer):
    """Waits for its turn before each step; counts the tokens that are not padding, and the time."""

    tokens = 0
    began = 0.0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if not sys.stdin.readline():
            raise SystemExit
        self.tokens, self.began = 0, time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            say(tokens=self.tokens, seconds=time.perf_counter() - self.began)
        super().log(logs, *args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rows", type=int, help="rows a step; default: TRL's")
    parser.add_argument("--plain", action="store_true", help="float32, without gradient checkpointing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"use_cpu": True, "max_steps": 10**6, "logging_steps": 1, "report_to": "none"}
    settings |= {"save_strategy": "no", "disable_tqdm": True}
    if options.rows:
        settings["per_device_train_batch_size"] = options.rows
    if options.plain:
        settings |= {
            "bf16": False,
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": "float32"},
        }
    with tempfile.TemporaryDirectory() as scratch:
        trainer = InTurns(
            model=options.model,
            args=SFTConfig(output_dir=scratch, **settings),
            train_dataset=load_dataset("json", data_files=options.data, split="train"),
        )
        say(ready=True)
        trainer.train()


if __name__ == "__main__":
    main()
