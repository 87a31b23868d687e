"""Sums as preferences: a right answer beside a wrong one, or answers with a label, and a held-out split.

The wrong answer has a digit too many, such as 780 for 41 + 37: what is wrong with it is plain, so a small
model learns in a few steps to prefer the right one, on problems that it has never seen too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from raytune_rl.errors import DataError
from raytune_rl.tiny.arithmetic import Problem, problems, question


@dataclass(frozen=True)
class PreferenceFiles:
    """Where `write_preferences` put its rows (JSONL, UTF-8)."""

    pairs: Path
    held_out_pairs: Path
    labelled: Path
    held_out_labelled: Path


def write_preferences(
    directory: str | Path, *, train: int = 512, held_out: int = 64, seed: int = 0
) -> PreferenceFiles:
    """Writes pairs and the same answers one by one; the same arguments give the same bytes.

    Pairs are `{"messages": [user, assistant], "rejected_response": text}`; labelled
    rows are `{"messages": [user, assistant], "label": bool}`, desirable for every other problem.

    Args:
        directory: Made if missing; files of those names are replaced.
        train: Distinct problems to train on.
        held_out: Distinct problems that the others do not contain.
        seed: Of the split and the order.

    Raises:
        DataError: There are fewer problems than `train + held_out`.
    """
    pool = problems()
    if train + held_out > len(pool):
        raise DataError(f"there are {len(pool)} problems, fewer than train={train} and held_out={held_out}")
    random.Random(seed).shuffle(pool)
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    names = ("pairs", "held_out_pairs", "labelled", "held_out_labelled")
    files = PreferenceFiles(**{name: root / f"{name}.jsonl" for name in names})
    seen, unseen = pool[held_out:][:train], pool[:held_out]
    for path, split in ((files.pairs, seen), (files.held_out_pairs, unseen)):
        _write(path, (pair(problem) for problem in split))
    for path, split in ((files.labelled, seen), (files.held_out_labelled, unseen)):
        _write(path, (labelled(problem, number % 2 == 0) for number, problem in enumerate(split)))
    return files


def pair(problem: Problem) -> dict[str, object]:
    """The right answer and the wrong one."""
    return {**_answered(problem, problem.answer), "rejected_response": problem.completion(_wrong(problem))}


def labelled(problem: Problem, desirable: bool) -> dict[str, object]:
    """One of the two, and which."""
    return {**_answered(problem, problem.answer if desirable else _wrong(problem)), "label": desirable}


def _wrong(problem: Problem) -> int:
    return 10 * problem.answer


def _answered(problem: Problem, answer: int) -> dict[str, object]:
    asked = {"role": "user", "content": question(problem, in_words=False)}
    return {"messages": [asked, {"role": "assistant", "content": problem.completion(answer)}]}


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
