"""Flags of the algorithms that learn from preferences in the data."""

from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import PreferenceConfig, RLHFConfig
from raytune_rl.config.flags import flags_of
from raytune_rl.config.parser import Parsed, parse, rlhf_class
from raytune_rl.config.preference import READS, loss_settings
from raytune_rl.errors import ConfigError

GIVEN: dict[str, Any] = {"model": "m", "dataset": ["d"]}


def settings_of(**more: Any) -> dict[str, Any]:
    return loss_settings(PreferenceConfig(**GIVEN, **more))


def parsed(*argv: str) -> Parsed[PreferenceConfig]:
    return parse(["--model", "m", "--dataset", "d", *argv], PreferenceConfig, environ={})


def test_every_flag_is_explained_and_grouped() -> None:
    for flag in flags_of(PreferenceConfig).values():
        assert flag.help.endswith("."), flag.name
        assert flag.group != "Other", flag.name


@pytest.mark.parametrize("kind", [kind for kind in READS if kind != "rm"])
def test_beta_depends_on_the_algorithm(kind: str) -> None:
    beta = 2.0 if kind == "simpo" else 0.1
    assert settings_of(rlhf_type=kind)["beta"] == beta
    assert settings_of(rlhf_type=kind, beta=0.5)["beta"] == 0.5


def test_a_reward_model_has_no_beta() -> None:
    assert settings_of(rlhf_type="rm") == {}
    assert settings_of(rlhf_type="rm", center_rewards_coefficient=0.01) == {
        "center_rewards_coefficient": 0.01
    }


def test_simpo_is_a_loss_type_of_cpo() -> None:
    assert settings_of(rlhf_type="simpo", cpo_alpha=0)["loss_type"] == "simpo"
    assert settings_of(rlhf_type="cpo", loss_type="hinge")["loss_type"] == "hinge"


def test_only_dpo_adds_losses_up() -> None:
    mixed = settings_of(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1])
    assert mixed["loss_type"] == ("sigmoid", "bco_pair", "sft")
    assert mixed["loss_weights"] == (0.8, 0.2, 1.0)
    with pytest.raises(ConfigError, match="cpo takes one"):
        PreferenceConfig(**GIVEN, rlhf_type="cpo", loss_type=["hinge", "ipo"])
    with pytest.raises(ConfigError, match="--loss_weights weighs the values of --loss_type"):
        PreferenceConfig(**GIVEN, loss_weights=[1.0])


def test_the_command_line_chooses_the_class(tmp_path: Path) -> None:
    assert rlhf_class([]) is RLHFConfig
    assert rlhf_class(["-h"]) is RLHFConfig
    assert rlhf_class(["--rlhf_type", "grpo"]) is RLHFConfig
    for kind in READS:
        assert rlhf_class(["--rlhf-type", "grpo", "--beta", "1", f"--rlhf_type={kind}"]) is PreferenceConfig
    file = tmp_path / "run.yaml"
    file.write_text("rlhf_type: kto\n")
    assert rlhf_class([str(file)]) is PreferenceConfig
    assert rlhf_class([str(file), "--rlhf_type", "grpo"]) is RLHFConfig


def test_flags_of_another_algorithm_are_told() -> None:
    notices = parsed("--rlhf_type", "dpo", "--simpo_gamma", "2", "--desirable_weight", "2").notices
    assert notices == ("--desirable_weight, --simpo_gamma do nothing: no part of --rlhf_type dpo.",)
    notices = parsed("--rlhf_type", "orpo", "--ref_model", "r", "--reference_workers", "2").notices
    assert "--ref_model does nothing: no part of --rlhf_type orpo." in notices
    assert any("--reference_workers does nothing" in notice for notice in notices)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--discopop_tau 0.1", "--discopop_tau does nothing: it belongs to --loss_type discopop."),
        ("--bco_shift true", "--bco_shift does nothing: it belongs to --loss_type bco_pair."),
        ("--f_alpha_divergence_coef 0.3", "it belongs to --f_divergence_type alpha_divergence."),
        ("--rlhf_type cpo --simpo_gamma 2", "--simpo_gamma does nothing: it belongs to --loss_type simpo."),
        ("--precompute_ref_log_probs true", "are always taken once, before the first step."),
        ("--loss_type discopop bco_pair --discopop_tau 0.1 --bco_shift true", ""),
        ("--rlhf_type cpo --loss_type simpo --simpo_gamma 2", ""),
        ("--rlhf_type simpo --simpo_gamma 2", ""),
        ('--loss_args {"a":1}', "--loss_args does nothing: it is for a loss of --external_plugins."),
        ("--rlhf_type simpo --loss_type mine --external_plugins mine.py", ""),
    ],
)
def test_constants_of_another_loss_are_told(argv: str, said: str) -> None:
    notices = "\n".join(parsed(*argv.split()).notices)
    assert said in notices
    assert bool(said) == bool(notices)


def test_flags_of_sampling_are_refused_and_named() -> None:
    with pytest.raises(ConfigError) as wrong:
        parsed("--num_generations", "4")
    assert "no flag of raytune-rl rlhf --rlhf_type dpo, but of rlhf" in str(wrong.value)


def test_adapters_train_without_dropout_unless_told() -> None:
    assert PreferenceConfig(**GIVEN).lora_dropout == 0.0
    assert PreferenceConfig(**GIVEN, lora_dropout=0.1).lora_dropout == 0.1


def test_a_reference_of_its_own() -> None:
    assert not PreferenceConfig(**GIVEN).own_reference
    assert PreferenceConfig(**GIVEN, ref_model="r").own_reference
    assert PreferenceConfig(**GIVEN, ref_adapters=["a"]).own_reference
    assert not PreferenceConfig(**GIVEN, rlhf_type="cpo", ref_model="r").own_reference
