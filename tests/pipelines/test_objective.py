"""From rlhf_type to a loss, and what a loss is told of its step."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from raytune_rl.algorithms.registry import get_loss
from raytune_rl.config import PreferenceConfig
from raytune_rl.config.preference import READS, WITH_REFERENCE
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines.objective import LABELLED, PAIRS, PREFERENCES, preference, supervised
from raytune_rl.pipelines.step_values import FROM_ORDER, FROM_POLICY, Sums


def config(**settings: Any) -> PreferenceConfig:
    return PreferenceConfig(model="m", dataset=["d"], **settings)


def test_flags_are_the_settings_of_the_loss() -> None:
    assert READS.keys() == PREFERENCES.keys()
    for kind, (_, name, _) in PREFERENCES.items():
        settings = {field.name for field in fields(get_loss(name).settings_type)}
        # SimPO is a loss_type of CPO's.
        assert set(READS[kind]) == settings - ({"loss_type"} if kind == "simpo" else set())


@pytest.mark.parametrize("kind", READS)
def test_defaults_are_those_of_the_loss(kind: str) -> None:
    made = preference(config(rlhf_type=kind))
    assert made.needs_reference == (kind in WITH_REFERENCE)
    if kind != "simpo":
        assert made.settings == made.loss.settings_type()
    assert made.shape is (LABELLED if kind == "kto" else PAIRS)


def test_what_the_loss_refuses_is_a_config_error() -> None:
    for wrong, message in (
        ({"loss_type": ["sigmoyd"]}, "sigmoyd"),
        ({"loss_type": ["exo_pair"]}, "label_smoothing"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "loss_weights"),
        ({"loss_type": ["aot"], "ld_alpha": 0.5}, "ld_alpha"),
        ({"rlhf_type": "cpo", "loss_type": ["exo_pair"]}, "loss_type"),
        ({"rlhf_type": "kto", "loss_type": ["bco"]}, "loss_type"),
    ):
        with pytest.raises(ConfigError, match=message):
            preference(config(**wrong))


def test_every_value_that_a_loss_may_ask_for_has_a_source() -> None:
    asked = set()
    for kinds in (
        {"loss_type": ["aot", "aot_unpaired", "bco_pair"], "bco_shift": True},
        {"rlhf_type": "kto"},
    ):
        asked |= set(preference(config(**kinds)).row_values)
    for kind in READS:
        asked |= set(preference(config(rlhf_type=kind)).row_values)
    from_data = {"label"}
    assert asked == FROM_POLICY.keys() | FROM_ORDER.keys() | from_data


def test_rows_of_a_unit() -> None:
    units = np.array([3, 0])
    assert PAIRS.rows_of(units, PAIRS.trained).tolist() == [6, 7, 0, 1]
    assert LABELLED.rows_of(units, LABELLED.trained).tolist() == [6, 0]
    assert LABELLED.rows_of(units, LABELLED.scored).tolist() == [7, 1]
    shape = supervised().shape
    assert shape.rows_of(units, shape.trained).tolist() == [3, 0]


def test_baselines_of_a_step() -> None:
    settings = preference(config(beta=0.5)).settings
    sums = Sums(np.array([-1.0, -4.0, -2.0, -3.0]), np.array([-2.0, -2.0, -2.0, -5.0]))
    told = {name: value(sums, settings, 4) for name, value in FROM_POLICY.items()}
    # log ratios 1, -2, 0, 2; margins 3 and 1 of the policy, 0 and 3 of the reference
    assert told["aot_reference"].tolist() == [3, 3, 0, 0]
    assert told["aot_partner"].tolist() == [2, 0, -2, 1]
    assert told["bco_shift"].tolist() == [0.125] * 4
    assert told["reference_point"].tolist() == [0.25] * 4
    assert FROM_ORDER["pair"](4).tolist() == [1, -1, 2, -2]
