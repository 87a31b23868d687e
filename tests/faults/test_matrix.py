"""Who is lost, and at what: `make faults` runs all of it, the normal suite none.

A run of GRPO with two policy ranks, a reference and held-out prompts is disturbed in one place, and must come
to the same bits as the undisturbed one: log, completions, weights, moments. Afterwards nothing is left.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.groups.weight_store import WeightStore
from tests.cluster.conftest import Tiny
from tests.faults.cases import GRPO, PPO
from tests.faults.runs import Outcome, assert_same, run_grpo, run_ppo
from tests.faults.strikes import Strike, assert_nothing_left, left, process_of, struck

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("cluster"),
]
SINGLE = {f"{role}: {phase}": strike for role, at in GRPO.items() for phase, strike in at.items()}
CRITIC = {f"{role}: {phase}": strike for role, at in PPO.items() for phase, strike in at.items()}
SETTINGS: dict[str, Any] = {"beta": 0.04, "steps_per_generation": 2, "max_steps": 6, "policy_workers": 2}


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_grpo(tiny, tmp_path_factory.mktemp("undisturbed"), **SETTINGS)


@pytest.fixture(scope="module")
def undisturbed_ppo(cluster: None, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_ppo(tiny, tmp_path_factory.mktemp("undisturbed_ppo"))


def survive(strike: Strike, run: Any, undisturbed: Outcome) -> None:
    before = left()
    with struck(strike):
        disturbed = run()
    assert len(strike.struck) == 1, "it happened"
    assert_same(disturbed, undisturbed)
    assert [line["group"] for line in disturbed.faults] == [strike.group]
    assert_nothing_left(before)


@pytest.mark.parametrize("name", SINGLE)
def test_grpo_survives_the_loss_of(name: str, tiny: Tiny, tmp_path: Path, undisturbed: Outcome) -> None:
    survive(SINGLE[name], lambda: run_grpo(tiny, tmp_path, **SETTINGS), undisturbed)


@pytest.mark.parametrize("name", CRITIC)
def test_ppo_survives_the_loss_of(name: str, tiny: Tiny, tmp_path: Path, undisturbed_ppo: Outcome) -> None:
    survive(CRITIC[name], lambda: run_ppo(tiny, tmp_path), undisturbed_ppo)


def test_a_moving_reference_is_lost_after_it_moved(tiny: Tiny, tmp_path: Path) -> None:
    """Whoever takes its place has moved as far."""
    moving = {**SETTINGS, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    undisturbed = run_grpo(tiny, tmp_path / "undisturbed", **moving)
    strike = Strike("reference", 0, "logprobs", nth=3)
    survive(strike, lambda: run_grpo(tiny, tmp_path / "disturbed", **moving), undisturbed)


def test_fewer_snapshots_than_steps_repeat_more(tiny: Tiny, tmp_path: Path, undisturbed: Outcome) -> None:
    strike = Strike("policy", 1, "train_step", nth=6)
    with struck(strike):
        disturbed = run_grpo(tiny, tmp_path, **SETTINGS, snapshot_steps=4)
    assert_same(disturbed, undisturbed)
    assert [line["repeated"] for line in disturbed.faults] == ["1 optimizer step"]


@pytest.mark.parametrize("at", ["publishing", "generating", "a hang"])
def test_the_weight_store_is_lost(
    at: str, tiny: Tiny, tmp_path: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a publication, and after one while nobody speaks with it."""
    publish = WeightStore.publish

    def struck_at(store: WeightStore, manifest: Any) -> None:
        hit = manifest.version == 2
        if hit and at != "generating":
            os.kill(process_of(store._actor), signal.SIGSTOP if at == "a hang" else signal.SIGKILL)
        publish(store, manifest)
        if hit and at == "generating":
            os.kill(process_of(store._actor), signal.SIGKILL)

    monkeypatch.setattr(WeightStore, "publish", struck_at)
    before = left()
    disturbed = run_grpo(tiny, tmp_path, **SETTINGS)
    assert_same(disturbed, undisturbed)
    assert [line["group"] for line in disturbed.faults] == ["weight_store"]
    assert_nothing_left(before)
