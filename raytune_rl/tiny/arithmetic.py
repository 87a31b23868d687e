"""Sums as chats: prompts with a solution for RL, answers to imitate for the SFT warm-up, a held-out split.

The problems are such as `41+37`: two digits each, nothing to carry. So a small model learns them in a minute,
digit by digit, and gets right what it has never seen; the splits are disjoint by *problem*, not only by
wording, and a reward which rises on the held-out file is not memory. The warm-up's teacher errs on purpose
in a share of its rows: a model that imitates it errs as often when sampled, and leaves RL something to mend.
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
    """`left + right`; operands and answer have two digits, and no column carries."""

    left: int
    right: int

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.left + self.right

    @property
    def sum(self) -> str:
        """The problem in digits, such as `12+37`."""
        return f"{self.left}+{self.right}"

    def completion(self, answer: int) -> str:
        """The words of an assistant who arrives at `answer`: 15 tokens, in the `format` reward's form."""
        return f"<think>{self.sum}={answer}</think><answer>{answer}</answer>"


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


def problems() -> list[Problem]:
    """All 1980 of them, in a fixed order."""
    numbers = range(10, 100)
    return [
        Problem(left, right)
        for left in numbers
        for right in numbers
        if left // 10 + right // 10 <= 9 and left % 10 + right % 10 <= 9
    ]


def question(problem: Problem, *, in_words: bool) -> str:
    """The user's question: `12+37=?`, or `What is twelve plus thirty-seven?`."""
    if not in_words:
        return f"{problem.sum}=?"
    return f"What is {number_in_words(problem.left)} plus {number_in_words(problem.right)}?"


def write_dataset(
    directory: str | Path,
    *,
    train: int = 512,
    held_out: int = 64,
    sft: int = 8192,
    seed: int = 0,
    words: float = 0.0,
    slips: float = 0.25,
) -> ArithmeticFiles:
    """Writes `train.jsonl`, `held_out.jsonl` and `sft.jsonl`; the same arguments give the same bytes.

    RL rows are `{"messages": [user], "solution": "49"}`; SFT rows are `{"messages": [user, assistant]}`.

    Args:
        directory: Made if missing; files of those names are replaced.
        train: Distinct problems to do RL on.
        held_out: Distinct problems that neither `train` nor `sft` contains, in whatever wording.
        sft: Rows of the warm-up, drawn with repetition from all problems that are not held out.
        seed: Of the split, the order, the wording and the slips.
        words: Share of questions asked in words instead of digits, 0..1. Words take longer to learn.
        slips: Share of SFT rows whose answer has one wrong digit, 0..1.

    Raises:
        DataError: There are fewer problems than `train + held_out`.
    """
    rng = random.Random(seed)
    pool = problems()
    if train + held_out > len(pool) or held_out == len(pool):
        raise DataError(
            f"there are {len(pool)} problems, but train={train} and held_out={held_out} ask for "
            f"{train + held_out}, and the warm-up needs at least one. Ask for fewer."
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
            answer = _slip(problem.answer, rng) if rng.random() < slips else problem.answer
            yield {"messages": [ask(problem), {"role": "assistant", "content": problem.completion(answer)}]}

    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    files = ArithmeticFiles(root / "train.jsonl", root / "held_out.jsonl", root / "sft.jsonl")
    _write_jsonl(files.train, rl_rows(seen[:train]))
    _write_jsonl(files.held_out, rl_rows(unseen))
    _write_jsonl(files.sft, sft_rows())
    return files


def corpus() -> Iterator[str]:
    """The text that the tiny tokenizer learns its merges from: numbers in words and the questions'
    wording.
    """
    for number in range(100):
        yield f"What is {number_in_words(number)} plus {number_in_words(99 - number)}?"
        yield f"What is {number_in_words(number)} minus {number_in_words(99 - number)}?"


def _slip(answer: int, rng: random.Random) -> int:
    """`answer` with one of its two digits changed; the result still has two digits."""
    tens, ones = divmod(answer, 10)
    if rng.random() < 0.5:
        tens = rng.choice([digit for digit in range(1, 10) if digit != tens])
    else:
        ones = rng.choice([digit for digit in range(10) if digit != ones])
    return 10 * tens + ones


def _write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    # Explicit newline: the same bytes on every platform.
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
