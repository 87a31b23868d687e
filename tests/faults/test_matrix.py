"""Who is lost, and at what: `make faults` runs all of it, the normal suite none.

A run with everybody in it is disturbed, once for each case of a chain (`cases.CHAINS`), and must come to the
same bits as the undisturbed one: log, completions, weights, moments. Afterwards nothing is left. An
asynchronous run, in which nothing is the same twice, must come to its end and account for every prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.groups import restarts
from tests.cluster.conftest import Tiny
from tests.faults.cases import CHAINS, FIRST_RANKS, OTHERS, Case
from tests.faults.runs import Outcome, assert_complete, assert_same, run_all, run_ppo
from tests.faults.strikes import Strike, assert_nothing_left, left, struck

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.faults,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("cluster", "no_pauses"),
]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that loses somebody in every step would wait a minute before each restart."""
    monkeypatch.setattr(restarts, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    outcome = run_all(tiny, tmp_path_factory.mktemp("undisturbed"))
    assert outcome.faults == []
    return outcome


def disturbed_by(cases: Mapping[Case, Strike], tiny: Tiny, output: Path, **settings: Any) -> Outcome:
    """What a run comes to in which all of this happens."""
    strikes = {case: replace(strike, struck=[]) for case, strike in cases.items()}
    before = left()
    with struck(*strikes.values()):
        outcome = run_all(tiny, output, **settings)
    assert [case for case, strike in strikes.items() if not strike.struck] == [], "it did not happen"
    assert_nothing_left(before)
    told = Counter(line["group"] for line in outcome.faults)
    assert told == Counter(strike.group for strike in strikes.values())
    return outcome


@pytest.mark.parametrize("chain", CHAINS)
def test_it_comes_to_the_same_bits_after_the_loss_of(
    chain: str, tiny: Tiny, tmp_path: Path, undisturbed: Outcome
) -> None:
    assert_same(disturbed_by(CHAINS[chain], tiny, tmp_path), undisturbed)


@pytest.mark.parametrize("chain", CHAINS)
def test_an_asynchronous_run_goes_on_after_the_loss_of(chain: str, tiny: Tiny, tmp_path: Path) -> None:
    assert_complete(disturbed_by(CHAINS[chain], tiny, tmp_path, async_generate=True))


def test_differences_of_weights_are_whole_weights_whoever_is_lost(tiny: Tiny, tmp_path: Path) -> None:
    """Undisturbed and whole against disturbed and as differences: who comes anew takes a base and one of
    them."""
    settings = {"torch_dtype": "bfloat16", "learning_rate": 2e-6}
    whole = run_all(tiny, tmp_path / "whole", **settings)
    cases = {
        case: strike
        for case, strike in {**FIRST_RANKS, **OTHERS}.items()
        if case[0].startswith(("policy", "rollout", "weight store")) and case[1] != "starting"
    }
    deltas = disturbed_by(cases, tiny, tmp_path / "deltas", weight_delta=True, **settings)
    shares = [line.pop("weight_delta/published_share") for line in deltas.log if "loss" in line]
    print("published", shares)
    assert 0 < min(shares) < 0.5
    for line in (*whole.log, *deltas.log):
        line.pop("weight_store(GiB)", None)
    assert_same(deltas, whole)


def test_fewer_snapshots_than_steps_repeat_more(tiny: Tiny, tmp_path: Path) -> None:
    undisturbed = run_ppo(tiny, tmp_path / "undisturbed")
    strike = Strike("policy", 1, "train_step", version=3)
    with struck(strike):
        disturbed = run_ppo(tiny, tmp_path / "disturbed", snapshot_steps=2)
    assert_same(disturbed, undisturbed)
    assert [line["repeated"] for line in disturbed.faults] == ["1 optimizer step"]
