"""TRL's GRPOTrainer on prompts of a file, one optimizer step at a time: run by `grpo_step.py` in an
environment of its own. It speaks JSON as `trl_sft.py` does.

Each step samples `--generations` completions of `--prompts` prompts with Transformers' `generate`, as TRL
does without a server, and trains on them: float32, no gradient checkpointing, no reference model.
Completions get the lengths that a file says: before its length a row cannot sample the end, at its length
nothing else.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import LogitsProcessor, LogitsProcessorList
from trl import GRPOConfig, GRPOTrainer

ANSWERS = sys.stdout
# What the libraries print is no answer.
sys.stdout = sys.stderr


def say(**what: float) -> None:
    print(json.dumps(what), file=ANSWERS, flush=True)


class Lengths(LogitsProcessor):
    """Ends row i after `lengths[i]` tokens, the end among them."""

    def __init__(self, lengths: list[int], prompt: int, eos: int) -> None:
        self.lengths, self.prompt, self.eos = torch.tensor(lengths), prompt, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = self.lengths <= input_ids.shape[1] - self.prompt + 1
        end = scores[:, self.eos].clone()
        scores = scores.masked_fill(ends[:, None], -torch.inf)
        scores[:, self.eos] = torch.where(ends, end, -torch.inf)
        return scores


class InTurns(GRPOTrainer):
    """Waits for its turn before each step and tells what it took."""

    began = generating = 0.0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if not sys.stdin.readline():
            raise SystemExit
        self.began, self.generating = time.perf_counter(), 0.0
        return super().get_batch_samples(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        found = super()._generate_single_turn(*args, **kwargs)
        self.generating += time.process_time() - began
        self.tokens = sum(len(row) for row in found[0])
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            say(
                seconds=time.perf_counter() - self.began,
                generate_cpu=self.generating,
                tokens=self.tokens,
            )
        super().log(logs, *args, **kwargs)


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Differs within a group, so that there is something to learn; costs nothing."""
    return [float(i % 2) for i in range(len(completions))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--lengths", type=Path, required=True, help="JSON: a list for the rows of a step")
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--generations", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = json.loads(options.lengths.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        trainer = InTurns(
            model=options.model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                model_init_kwargs={"dtype": "float32"},
                per_device_train_batch_size=options.prompts * options.generations,
                num_generations=options.generations,
                max_completion_length=max(lengths),
                beta=0.0,
                learning_rate=1e-6,
                max_steps=10**6,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=load_dataset("json", data_files=options.data, split="train"),
        )
        generate = trainer.model.generate

        def forced(*args: Any, **kwargs: Any) -> Any:
            processor = Lengths(lengths, kwargs["input_ids"].shape[1], trainer.processing_class.eos_token_id)
            return generate(*args, **kwargs, logits_processor=LogitsProcessorList([processor]))

        trainer.model.generate = forced
        say(ready=True)
        trainer.train()


if __name__ == "__main__":
    main()
