"""`raytune-rl algorithms`: the list of losses and credits, and that the README has it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from raytune_rl.algorithms.credit.base import credit_names, is_built_in_credit
from raytune_rl.algorithms.registry import is_built_in_loss, loss_names
from raytune_rl.config import AlgorithmsConfig
from raytune_rl.config.parser import parse
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines import algorithms

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "transformers", "vllm", "deepspeed")


def of_a_fresh_process(*flags: str) -> str:
    """The program's own words: in this process a test may have registered something."""
    code = (
        "import sys; from raytune_rl.cli import main; "
        f"status = main(['algorithms', *{flags!r}]); "
        f"assert not set({HEAVY!r}) & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_has_the_table_of_the_registries() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = readme.partition("<!-- raytune-rl algorithms --format markdown -->\n")
    table, end, _ = rest.partition("<!-- end -->")
    assert end, "the README has the marks"
    assert table == of_a_fresh_process("--format", "markdown"), (
        "run raytune-rl algorithms --format markdown and put what it prints between the marks"
    )


def test_every_loss_and_credit_is_listed_once_with_its_paper_and_real_flags() -> None:
    found = algorithms.rows()
    built_in = {name for name in loss_names() if is_built_in_loss(name)}
    credits = {name for name in credit_names() if is_built_in_credit(name)}
    assert {row.name for row in found if row.kind != "credit"} >= built_in
    assert {row.name for row in found if row.kind == "credit"} >= credits
    asked = [row.asked_for + row.kind for row in found]
    assert len(asked) == len(set(asked))
    assert [row.name for row in found if row.name in built_in | credits and not row.paper] == []
    by_name = {row.asked_for: row for row in found if row.kind != "credit"}
    assert by_name["rlhf --loss_type fipo"].flags[:4] == (
        "epsilon", "epsilon_high", "delta", "fipo_decay_rate",
    ), "inherited settings that rl.py declares are flags of the loss too"  # fmt: skip
    assert "beta" not in by_name["rlhf --loss_type grpo"].flags, "that is a flag of all of them"
    assert by_name["rlhf --rlhf_type simpo"].flags == ("beta", "cpo_alpha", "simpo_gamma", "label_smoothing")


def test_text_fits_a_terminal_and_names_everything() -> None:
    out = io.StringIO()
    found = algorithms.run(AlgorithmsConfig(), Console(file=out, width=100))
    assert max(map(len, out.getvalue().splitlines())) <= 100
    assert all(row.name in out.getvalue() for row in found)


def test_a_wrong_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="--format"):
        parse(["--format", "html"], AlgorithmsConfig)
