"""Small sums as chats: prompts with a solution for RL, worked answers for the SFT warm-up, a held-out split.

A problem is a pair of operands and an operation. The splits are disjoint by *problem*, not only by wording: a
reward which rises on the held-out file cannot be memory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raytune_rl.errors import DataError

# fmt: off
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on


@dataclass(frozen=True)
class Problem:
    """`left + right` or `left - right`, with operands and result in 0..99."""

    left: int
    right: int
    operation: str

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.left + self.right if self.operation == "+" else self.left - self.right

    @property
    def sum(self) -> str:
        """The problem in digits, such as `12+7`."""
        return f"{self.left}{self.operation}{self.right}"

    @property
    def completion(self) -> str:
        """The worked answer that both the `format` and the `accuracy` reward accept; under 40 tokens."""
        return f"<think>{self.sum}={self.answer}</think><answer>{self.answer}</answer>"


@dataclass(frozen=True)
class ArithmeticFiles:
    """Where `write_dataset` put its splits (JSONL, UTF-8)."""

    train: Path
    held_out: Path
    sft: Path


def number_in_words(number: int) -> str:
    """`42` as `forty-two`; defined for 0..99."""
    if not 0 <= number <= 99:
        raise ValueError(f"{number} is not in 0..99")
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def problems(max_operand: int) -> list[Problem]:
    """Every sum and every difference that is not negative, of operands in 0..max_operand, in fixed order."""
    if not 1 <= max_operand <= 49:
        raise ValueError(f"max_operand is {max_operand}; it must lie in 1..49 so that no answer exceeds 99")
    numbers = range(max_operand + 1)
    return [Problem(left, right, "+") for left in numbers for right in numbers] + [
        Problem(left, right, "-") for left in numbers for right in numbers if right <= left
    ]


def question(problem: Problem, *, in_words: bool) -> str:
    """What the user asks: `12+7=?`, or `What is twelve plus seven?`."""
    if not in_words:
        return f"{problem.sum}=?"
    name = "plus" if problem.operation == "+" else "minus"
    return f"What is {number_in_words(problem.left)} {name} {number_in_words(problem.right)}?"


def write_dataset(
    directory: str | Path,
    *,
    train: int = 256,
    held_out: int = 64,
    sft: int = 2048,
    seed: int = 0,
    max_operand: int = 20,
    words: float = 0.25,
) -> ArithmeticFiles:
    """Writes `train.jsonl`, `held_out.jsonl` and `sft.jsonl`; the same arguments give the same bytes.

    RL rows are `{"messages": [user], "solution": "19"}`; SFT rows are `{"messages": [user, assistant]}`.

    Args:
        directory: Made if missing; files of those names are replaced.
        train: Distinct problems to do RL on.
        held_out: Distinct problems that neither `train` nor `sft` contains, in whatever wording.
        sft: Rows of the warm-up, drawn with repetition from all problems that are not held out.
        seed: Of the split, the order and the wording.
        max_operand: Largest operand; 20 gives 441 sums and 231 differences.
        words: Share of questions asked in words instead of digits, 0..1.

    Raises:
        DataError: There are fewer problems than `train + held_out`.
    """
    rng = random.Random(seed)
    pool = problems(max_operand)
    if train + held_out > len(pool):
        raise DataError(
            f"operands up to {max_operand} give {len(pool)} problems, but train={train} and "
            f"held_out={held_out} ask for {train + held_out}. Ask for fewer, or raise max_operand."
        )
    rng.shuffle(pool)
    unseen, seen = pool[:held_out], pool[held_out:]

    def ask(problem: Problem) -> dict[str, str]:
        return {"role": "user", "content": question(problem, in_words=rng.random() < words)}

    def rl_rows(split: Iterable[Problem]) -> Iterator[dict[str, object]]:
        for problem in split:
            yield {"messages": [ask(problem)], "solution": str(problem.answer)}

    def sft_rows() -> Iterator[dict[str, object]]:
        for problem in rng.choices(seen, k=sft):
            yield {"messages": [ask(problem), {"role": "assistant", "content": problem.completion}]}

    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    files = ArithmeticFiles(root / "train.jsonl", root / "held_out.jsonl", root / "sft.jsonl")
    _write_jsonl(files.train, rl_rows(seen[:train]))
    _write_jsonl(files.held_out, rl_rows(unseen))
    _write_jsonl(files.sft, sft_rows())
    return files


def corpus() -> Iterator[str]:
    """What the tiny tokenizer learns its merges from: numbers in words and the questions' wording."""
    for number in range(100):
        yield f"What is {number_in_words(number)} plus {number_in_words(99 - number)}?"
        yield f"What is {number_in_words(number)} minus {number_in_words(99 - number)}?"


def _write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    # Explicit newline: the same bytes on every platform.
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
