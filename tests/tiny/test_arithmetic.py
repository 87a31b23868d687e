"""The toy data set: right answers, disjoint splits, the same bytes each time."""

import json
import re
from pathlib import Path

import pytest

from raytune_rl.errors import DataError
from raytune_rl.tiny.arithmetic import number_in_words, problems, question, write_dataset

WORDS = {number_in_words(n): n for n in range(100)}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def solve(text: str) -> tuple[int, int]:
    """Reads a question's two operands back, independently of how it was written."""
    if found := re.fullmatch(r"(\d+)\+(\d+)=\?", text):
        return int(found[1]), int(found[2])
    found = re.fullmatch(r"What is (\S+) plus (\S+)\?", text)
    assert found, text
    return WORDS[found[1]], WORDS[found[2]]


def test_every_row_is_right_and_splits_share_no_problem(tmp_path: Path) -> None:
    files = write_dataset(tmp_path, train=100, held_out=50, sft=300, seed=3, words=0.5, slips=0.0)
    seen: dict[str, set] = {}
    for name, path in {"train": files.train, "held_out": files.held_out}.items():
        split = rows(path)
        asked = [solve(row["messages"][0]["content"]) for row in split]
        assert [row["solution"] for row in split] == [str(sum(problem)) for problem in asked]
        assert all([message["role"] for message in row["messages"]] == ["user"] for row in split)
        seen[name] = set(asked)
        assert len(seen[name]) == len(split)
    warm_up = rows(files.sft)
    assert len(warm_up) == 300
    for row in warm_up:
        user, assistant = row["messages"]
        left, right = solve(user["content"])
        expected = f"<think>{left}+{right}={left + right}</think><answer>{left + right}</answer>"
        assert (user["role"], assistant) == ("user", {"role": "assistant", "content": expected})
    seen["sft"] = {solve(row["messages"][0]["content"]) for row in warm_up}
    assert not seen["held_out"] & seen["train"]
    assert not seen["held_out"] & seen["sft"]
    contents = [row["messages"][0]["content"] for row in warm_up]
    assert any(text.startswith("What") for text in contents)
    assert any(text[0].isdigit() for text in contents)


def test_slips_are_as_many_as_asked_and_change_one_digit(tmp_path: Path) -> None:
    wrong = 0
    for row in rows(write_dataset(tmp_path, sft=2000, slips=0.25).sft):
        right = str(sum(solve(row["messages"][0]["content"])))
        found = re.fullmatch(
            r"<think>.+=(\d\d)</think><answer>(\d\d)</answer>", row["messages"][1]["content"]
        )
        assert found
        assert found[1] == found[2]
        different = sum(a != b for a, b in zip(right, found[1], strict=True))
        assert different <= 1
        wrong += different
    assert 0.2 < wrong / 2000 < 0.3


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    sizes = {"train": 20, "held_out": 10, "sft": 30}
    first = write_dataset(tmp_path / "a", seed=1, **sizes)
    again = write_dataset(tmp_path / "b", seed=1, **sizes)
    other = write_dataset(tmp_path / "c", seed=2, **sizes)
    assert first.train.read_bytes() == again.train.read_bytes()
    assert first.sft.read_bytes() == again.sft.read_bytes()
    assert first.held_out.read_bytes() == again.held_out.read_bytes()
    assert first.train.read_bytes() != other.train.read_bytes()


def test_asking_for_more_problems_than_exist_names_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1980 problems, but train=1980 and held_out=1 ask for 1981"):
        write_dataset(tmp_path, train=1980, held_out=1, sft=1)
    assert list(tmp_path.iterdir()) == []


def test_numbers_in_words() -> None:
    some = {0: "zero", 13: "thirteen", 20: "twenty", 42: "forty-two", 99: "ninety-nine"}
    assert {n: number_in_words(n) for n in some} == some
    assert len(WORDS) == 100
    with pytest.raises(ValueError, match="100"):
        number_in_words(100)


def test_problems_are_distinct_two_digit_sums_without_a_carry() -> None:
    everything = problems()
    assert len(set(everything)) == len(everything) == 1980
    for problem in everything:
        assert 10 <= problem.left <= 99
        assert 10 <= problem.right <= 99
        assert 20 <= problem.answer <= 99
        assert problem.left % 10 + problem.right % 10 == problem.answer % 10
    assert question(everything[0], in_words=False) == "10+10=?"
