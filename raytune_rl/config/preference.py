"""Algorithms that learn from preferences in the data: their flags, and which algorithm reads which."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_setting = partial(setting, "RL algorithm")
_data = partial(setting, "Data")
_tuner = partial(setting, "Tuner")
_cluster = partial(setting, "Cluster")

READS: Mapping[str, tuple[str, ...]] = {
    "dpo": (
        "loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type",
        "f_alpha_divergence_coef", "rpo_alpha", "ld_alpha", "discopop_tau", "bco_shift",
    ),
    "kto": ("loss_type", "beta", "desirable_weight", "undesirable_weight"),
    "orpo": ("beta",),
    "cpo": ("loss_type", "beta", "cpo_alpha", "simpo_gamma", "label_smoothing"),
    "simpo": ("beta", "cpo_alpha", "simpo_gamma", "label_smoothing"),
    "rm": ("center_rewards_coefficient",),
}  # fmt: skip
"""Which of the flags below each value of `rlhf_type` reads: the names of its loss's settings."""

BETA: Mapping[str, float] = {"simpo": 2.0}
"""`beta` where the user does not say; 0.1 for the others."""

WITH_REFERENCE = ("dpo", "kto")
"""Algorithms that compare the policy with a reference."""


class PreferenceOptions(Options):
    """Constants of DPO and its relatives, with ms-swift's names and defaults."""

    rlhf_type: Literal["dpo", "kto", "orpo", "cpo", "simpo", "rm"] = _setting(
        "dpo",
        "Algorithm: each learns from rows that hold a better and a worse answer, kto from single ones. rm "
        "trains a reward model.",
    )
    beta: float | None = _setting(
        None,
        "dpo, kto: how closely the policy stays with the reference; cpo, simpo: temperature; orpo: weight of "
        "the odds ratio. Not set: 0.1, for simpo 2.",
        ge=0,
    )
    loss_type: tuple[str, ...] = _setting(
        (),
        "dpo: one or more of sigmoid, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, "
        "aot_unpaired, apo_zero, apo_down, discopop, sft, added up. cpo: sigmoid, hinge, ipo or simpo. kto: "
        "kto or apo_zero_unpaired. Not set: sigmoid, for kto kto. Or the name of a loss that a file of "
        "--external_plugins registers, for rows like those of --rlhf_type.",
    )
    loss_args: dict[str, Any] = _setting({}, "Settings of a loss from a plugin, as JSON: '{\"alpha\": 1}'.")
    external_plugins: tuple[str, ...] = _setting(
        (), "Python files to load first, which register losses by register_loss."
    )
    loss_weights: tuple[float, ...] = _setting(
        (), "dpo: one weight per value of --loss_type. Not set: 1 each."
    )
    label_smoothing: float = _setting(
        0.0, "Probability that a preference is the wrong way round.", ge=0, lt=0.5
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = _setting(
        "reverse_kl", "dpo: the divergence that ties the policy to the reference."
    )
    f_alpha_divergence_coef: float = _setting(
        0.5, "dpo: alpha of alpha_divergence; at 0 it is reverse_kl, at 1 forward_kl.", gt=0, lt=1
    )
    rpo_alpha: float | None = _setting(
        None, "dpo: weight of the likelihood of the chosen answer, added to the loss. Not set: 0.", ge=0
    )
    ld_alpha: float | None = _setting(
        None,
        "dpo: weight of the tokens of the longer answer beyond the length of the shorter. Not set: 1.",
        ge=0,
        le=1,
    )
    discopop_tau: float = _setting(0.05, "dpo: temperature of loss_type discopop.", gt=0)
    bco_shift: bool = _setting(
        True,
        "dpo: loss_type bco_pair subtracts the mean reward of the step, as its authors do; it is asked for "
        "before each step. false: not, as TRL 1.x.",
    )
    desirable_weight: float = _setting(1.0, "kto: weight of desirable rows.", ge=0)
    undesirable_weight: float = _setting(1.0, "kto: weight of undesirable rows.", ge=0)
    cpo_alpha: float = _setting(
        1.0, "cpo, simpo: weight of the likelihood of the chosen answer; 0 is SimPO as published.", ge=0
    )
    simpo_gamma: float = _setting(1.0, "simpo: margin by which the chosen answer shall lead.", ge=0)
    center_rewards_coefficient: float | None = _setting(
        None,
        "rm: weight of the square of a pair's summed scores, which keeps scores near 0. Not set: 0.",
        ge=0,
    )

    ref_model: str | None = _setting(
        None, "dpo, kto: the reference model. Not set: the model as it is before the first step."
    )
    ref_adapters: tuple[str, ...] = _setting(
        (), "dpo, kto: LoRA adapters of the reference model. Not set: those of --adapters."
    )
    loss_scale: Literal["last_round", "default"] = _data(
        "last_round",
        "Tokens that an answer consists of: last_round, the assistant's after the last user turn; default, "
        "every assistant turn.",
    )
    lora_dropout: float = _tuner(
        0.0,
        "Share of the adapter's inputs dropped while training. 0 here: log-probs under dropout cannot be "
        "compared with a reference's.",
        ge=0,
        lt=1,
    )
    reference_workers: int | None = _cluster(
        None, "Copies of --ref_model, until its log-probs are known. Not set: one per policy worker.", ge=1
    )
    gpus_per_reference_worker: float | None = _cluster(
        None, "GPUs of one reference worker. Not set: a share of the policy's.", ge=0
    )
    cpus_per_reference_worker: float | None = _cluster(
        None, "CPU cores of one reference worker. Not set: chosen from what the cluster has.", gt=0
    )

    @model_validator(mode="after")
    def _check_preference(self) -> Self:
        if self.rlhf_type == "rm" and getattr(self, "router_aux_loss_coef", False):
            raise ConfigError(
                "--router_aux_loss_coef: a reward model is trained without it; leave it out, or set it to 0."
            )
        several = self.rlhf_type == "dpo"
        if len(self.loss_type) > 1 and not several:
            raise ConfigError(
                f"--loss_type {' '.join(self.loss_type)}: {self.rlhf_type} takes one; only dpo adds losses "
                "up."
            )
        if self.loss_weights and not self.loss_type:
            raise ConfigError(
                "--loss_weights weighs the values of --loss_type: name them, one weight for each."
            )
        return self

    @property
    def own_reference(self) -> bool:
        """Whether the reference is another model than the one that training starts from."""
        return self.rlhf_type in WITH_REFERENCE and bool(self.ref_model or self.ref_adapters)


def loss_settings(config: PreferenceOptions) -> dict[str, Any]:
    """Settings of the loss of `rlhf_type`, by name; unset values are left out."""
    settings: dict[str, Any] = {}
    for name in READS[config.rlhf_type]:
        value = getattr(config, name)
        if value is not None and value != ():
            settings[name] = value
    if "beta" in READS[config.rlhf_type]:
        settings.setdefault("beta", BETA.get(config.rlhf_type, 0.1))
    if config.rlhf_type == "simpo":
        settings["loss_type"] = "simpo"
    elif "loss_type" in settings and config.rlhf_type != "dpo":
        (settings["loss_type"],) = settings["loss_type"]
    return settings


def unread(rlhf_type: str) -> tuple[str, ...]:
    """The flags above that an algorithm does not read."""
    names = {name for names in READS.values() for name in names} - set(READS[rlhf_type])
    return (*sorted(names), *(() if rlhf_type in WITH_REFERENCE else ("ref_model", "ref_adapters")))
