"""The README claims what the matrix tests, and nothing else."""

from __future__ import annotations

from pathlib import Path

from tests.faults.cases import table

README = Path(__file__).parents[2] / "README.md"


def test_the_table_of_what_a_run_survives_is_the_matrix() -> None:
    assert table() in README.read_text(encoding="utf-8"), "python -m tests.faults.cases prints it anew"
