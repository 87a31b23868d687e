"""The toy preferences: deterministic, disjoint, and readable as what they are."""

import json
from pathlib import Path

import pytest

from raytune_rl.data.load import load_examples
from raytune_rl.errors import DataError
from raytune_rl.tiny.preferences import write_preferences


def problems(path: Path) -> set[str]:
    return {json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()}


def test_the_same_arguments_give_the_same_bytes_and_splits_share_no_problem(tmp_path: Path) -> None:
    one, two = (write_preferences(tmp_path / name, train=20, held_out=6) for name in ("a", "b"))
    for mine, theirs in zip(vars(one).values(), vars(two).values(), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    assert (
        write_preferences(tmp_path / "c", train=20, held_out=6, seed=1).pairs.read_bytes()
        != one.pairs.read_bytes()
    )
    assert (len(problems(one.pairs)), len(problems(one.held_out_pairs))) == (20, 6)
    assert not problems(one.pairs) & problems(one.held_out_pairs)
    assert not problems(one.labelled) & problems(one.held_out_labelled)


def test_rows_are_what_the_loader_understands(tmp_path: Path) -> None:
    files = write_preferences(tmp_path, train=20, held_out=6)
    for example in load_examples([str(files.pairs)], task="pairs").examples:
        right, wrong = example.messages[-1].content, example.rejected[-1].content
        answer = right.partition("<answer>")[2].removesuffix("</answer>")
        left, _, rest = example.messages[0].content.partition("+")
        assert int(answer) == int(left) + int(rest.removesuffix("=?"))
        assert wrong.endswith(f"<answer>{answer}0</answer>")
    labels = [example.label for example in load_examples([str(files.labelled)], task="labels").examples]
    assert sum(bool(label) for label in labels) == 10


def test_more_problems_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1980 problems"):
        write_preferences(tmp_path, train=1980, held_out=1)
