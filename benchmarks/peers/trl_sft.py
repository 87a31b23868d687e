"""TRL's SFTTrainer on a file of chats: run by `sft_throughput.py` in an environment of its own.

Prints one line of JSON: tokens of rows and seconds of each optimizer step.
"""

import argparse
import json
import tempfile
import time

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer


class Timed(SFTTrainer):
    """Counts the tokens that are not padding, and the time of each step."""

    tokens = 0
    began = 0.0

    def training_step(self, model, inputs, *args, **kwargs):
        if not self.tokens:
            self.began = time.perf_counter()
        self.tokens += (
            int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
        )
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            steps.append((self.tokens, time.perf_counter() - self.began))
            self.tokens = 0
        super().log(logs, *args, **kwargs)


steps: list[tuple[int, float]] = []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rows", type=int, help="rows a step; default: TRL's")
    parser.add_argument("--plain", action="store_true", help="float32, without gradient checkpointing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"use_cpu": True, "max_steps": options.steps, "logging_steps": 1, "report_to": "none"}
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
        trainer = Timed(
            model=options.model,
            args=SFTConfig(output_dir=scratch, **settings),
            train_dataset=load_dataset("json", data_files=options.data, split="train"),
        )
        trainer.train()
    print(json.dumps({"steps": steps}))


if __name__ == "__main__":
    main()
