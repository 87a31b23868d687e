"""From rlhf_type to a loss, and what a loss is told of its step."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_rl.algorithms.registry import get_loss
from raytune_rl.config import PreferenceConfig, SFTConfig
from raytune_rl.config.preference import READS, WITH_REFERENCE
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines.objective import (
    LABELLED,
    PAIRS,
    PREFERENCES,
    Objective,
    preference,
    supervised,
)
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
        {"loss_type": ["aot", "aot_unpaired", "bco_pair"]},
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
    shape = supervised(SFTConfig(model="m", dataset="d")).shape
    assert shape.rows_of(units, shape.trained).tolist() == [3, 0]


def test_baselines_of_a_step() -> None:
    settings = preference(config(beta=0.5)).settings
    sums = Sums(np.array([-1.0, -4.0, -2.0, -3.0]), np.array([-2.0, -2.0, -2.0, -5.0]))
    row_values = {name: value(sums, settings, 4) for name, value in FROM_POLICY.items()}
    # log ratios 1, -2, 0, 2; margins 3 and 1 of the policy, 0 and 3 of the reference
    assert row_values["aot_reference"].tolist() == [3, 3, 0, 0]
    assert row_values["aot_partner"].tolist() == [2, 0, -2, 1]
    assert row_values["bco_shift"].tolist() == [0.125] * 4
    assert row_values["reference_point"].tolist() == [0.25] * 4
    assert FROM_ORDER["pair"](4).tolist() == [1, -1, 2, -2]


PLUGIN = """
from dataclasses import dataclass
from raytune_rl.algorithms.metrics import MetricSums
from raytune_rl.algorithms.pairs import on_chosen, split_pairs
from raytune_rl.algorithms.preference import preference_metrics
from raytune_rl.algorithms.registry import Loss, LossOutput, register_loss
from raytune_rl.algorithms.rows import sum_rows

@dataclass(frozen=True)
class Settings:
    beta: float = 1.0
    power: int = 1
    asks: tuple = ("pair",)

def compute(inputs):
    gap = inputs.logprobs - inputs.columns["ref_logprobs"]
    ratio = split_pairs(sum_rows(gap, inputs.row_of, inputs.n_rows))
    loss = (1 - inputs.settings.beta * ratio.margin).abs() ** inputs.settings.power
    return LossOutput(None, preference_metrics(ratio, ratio, inputs.settings.beta), on_chosen(loss))

def columns(settings):
    return ("ref_logprobs",)

def rows(settings):
    return tuple(settings.asks)

register_loss(Loss("my_pairs", Settings, compute, columns, required_rows=rows, rows="pairs"))
register_loss(Loss("my_rows", Settings, compute, required_rows=lambda s: ("label",)))
"""


def test_a_loss_of_a_plugin_takes_the_rows_of_an_algorithm(tmp_path: Path) -> None:
    file = tmp_path / "my_pairs.py"
    file.write_text(PLUGIN)

    def mine(**settings: Any) -> Objective:
        return preference(config(**{"loss_type": "my_pairs", "external_plugins": str(file), **settings}))

    made = mine(beta=0.3, loss_args={"power": 2})
    assert (made.title, made.loss.name, made.shape) == ("my_pairs", "my_pairs", PAIRS)
    assert (made.settings.beta, made.settings.power) == (0.3, 2)
    assert made.needs_reference
    assert made.plugin_files == (str(file),)
    assert mine(loss_args={"asks": ("pair", "aot_partner")}).row_values == ("pair", "aot_partner")
    assert mine(loss_type="my_rows", rlhf_type="kto").shape is LABELLED
    assert preference(config(external_plugins=str(file))).loss.name == "dpo", "only where it is named"
    for wrong, message in (
        ({"rlhf_type": "cpo"}, "needs ref_logprobs, which --rlhf_type cpo does not have"),
        ({"rlhf_type": "kto"}, "made for pairs rows and logprobs, but --rlhf_type kto gives single rows"),
        ({"rlhf_type": "rm"}, "but --rlhf_type rm gives pairs rows and scores"),
        ({"loss_type": ["sigmoid", "my_pairs"]}, "stands alone"),
        ({"loss_args": {"powr": 2}}, "powr is no setting of loss 'my_pairs', which has: asks, beta, power"),
        ({"loss_args": {"asks": ("pair", "label")}}, "needs label"),
        ({"loss_args": {"asks": ("pair", "reference_point")}}, "needs reference_point"),
        ({"loss_type": "other"}, "other; choose from"),
    ):
        with pytest.raises(ConfigError, match=message):
            mine(**wrong)
