"""From flags to an algorithm: which loss, with which settings and which normaliser.

The only place in the pipelines that knows losses by name. What they share (advantages, corrections, filters)
is chosen by flags of its own and combines with any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_rl.algorithms.advantages import DEFAULT_SCALE
from raytune_rl.algorithms.aggregation import LOSS_TYPES as NORMALISERS
from raytune_rl.algorithms.correction import RolloutCorrection
from raytune_rl.algorithms.registry import Loss, get_loss
from raytune_rl.config import PPOConfig, RLHFConfig, resolved
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines.loss_args import settings_of
from raytune_rl.protocol.train import Algorithm
from raytune_rl.rewards.plugins import load_plugins

# loss_type -> the loss; the normaliser goes by the loss type's own name.
LOSSES: Mapping[str, str] = {
    "grpo": "grpo",
    "bnpo": "grpo",
    "dr_grpo": "grpo",
    "dapo": "grpo",
    "cispo": "cispo",
    "sapo": "sapo",
    "fipo": "fipo",
}


def algorithm_of(config: RLHFConfig) -> Algorithm:
    """The algorithm that the flags describe.

    Raises:
        ConfigError: There is no such loss, it cannot be used here, or a setting of it is wrong.
        RewardError: A plugin file cannot be loaded.
    """
    if config.loss_type in LOSSES:
        loss = get_loss(LOSSES[config.loss_type])
        return _checked(config, loss, {}, config.loss_type, ())
    load_plugins(config.external_plugins)
    loss = get_loss(config.loss_type)
    if loss.compute.__module__.startswith("raytune_rl."):
        raise ConfigError(f"--loss_type {config.loss_type} is a loss of another command, not of this one.")
    return _checked(config, loss, config.loss_args, loss.normaliser, config.external_plugins)


def _said(config: RLHFConfig) -> dict[str, Any]:
    """All that flags say of losses."""
    correction = None
    if config.rollout_importance_sampling_mode is not None:
        correction = RolloutCorrection(
            config.rollout_importance_sampling_mode,
            config.rollout_importance_sampling_threshold,
            config.rollout_importance_sampling_min,
        )
    in_reward = resolved.kl_in_reward(config)
    return {
        "beta": 0.0 if in_reward else config.beta,
        "kl_estimator": "k3" if in_reward or config.beta == 0 else resolved.kl_estimator(config),
        "importance_sampling_level": config.importance_sampling_level,
        "correction": correction,
        "off_policy_delta": config.off_policy_sequence_mask_delta,
        "entropy_filter": config.top_entropy_quantile < 1,
        "epsilon": config.epsilon,
        "epsilon_high": config.epsilon_high,
        "delta": config.delta,
        "tau_pos": config.tau_pos,
        "tau_neg": config.tau_neg,
        "fipo_decay_rate": config.fipo_decay_rate,
        "fipo_clip_range": config.fipo_clip_range,
        "fipo_clip_high_only": config.fipo_clip_high_only,
        "fipo_safety_threshold": config.fipo_safety_threshold,
    }


def _checked(
    config: RLHFConfig,
    loss: Loss,
    loss_args: Mapping[str, Any],
    normaliser: str,
    plugin_files: tuple[str, ...],
) -> Algorithm:
    settings, made = settings_of(loss, _said(config), loss_args)
    if loss.rows != "single" or loss.forward != "logprobs":
        raise ConfigError(f"loss '{loss.name}' is made for {loss.rows} rows and {loss.forward}, not for RL.")
    if normaliser not in NORMALISERS:
        raise ConfigError(
            f"loss '{loss.name}' has the normaliser {normaliser!r}; it must be one of "
            f"{', '.join(NORMALISERS)}."
        )
    there = {"old_logprobs", "rollout_logprobs"}
    there |= {"ref_logprobs"} if config.beta > 0 else set()
    there |= {"entropy", "entropy_threshold"} if config.top_entropy_quantile < 1 else set()
    if missing := {*loss.required_columns(made), *loss.required_rows(made)} - there:
        raise ConfigError(
            f"loss '{loss.name}' needs {', '.join(sorted(missing))}, which this run does not have; it has "
            f"{', '.join(sorted(there))}."
        )
    return Algorithm(loss.name, dict(settings), normaliser, plugin_files, config.log_entropy)


def _advantage(config: RLHFConfig, estimator: str, scale: str) -> str:
    if isinstance(config, PPOConfig):
        return f"against the critic: GAE, gamma {config.gamma:g}, lambda {config.lam:g}"
    return f"{estimator}, scaled by {scale}" if scale != "none" else f"{estimator}, not scaled"


def in_words(config: RLHFConfig) -> list[tuple[str, str]]:
    """The algorithm for the plan: what is on, each with its numbers."""
    high = resolved.epsilon_high(config)
    bounds = {
        "cispo": f"weight up to {high:g}",
        "sapo": f"gate {config.tau_pos:g} / {config.tau_neg:g}",
    }.get(config.loss_type, f"clip {1 - config.epsilon:g} to {1 + high:g}")
    own = config.loss_type not in LOSSES
    estimator = config.advantage_estimator
    scale = config.scale_rewards or DEFAULT_SCALE[estimator]
    rows = [
        ("loss", f"{config.loss_type}, {'from a plugin' if own else bounds}"),
        ("importance ratio", f"of the {config.importance_sampling_level.replace('_', ', by ')}"),
        ("advantage", _advantage(config, estimator, scale)),
    ]
    if config.beta > 0:
        where = "off the reward" if resolved.kl_in_reward(config) else "in the loss"
        rows.append(("KL", f"{resolved.kl_estimator(config)} {where}, beta {config.beta:g}"))
        rows.append(("reference", _reference(config)))
    if config.rollout_importance_sampling_mode is not None:
        low, top = config.rollout_importance_sampling_min, config.rollout_importance_sampling_threshold
        within = f"{low or 0:g} to {top:g}"
        rows.append(("rollout correction", f"{config.rollout_importance_sampling_mode}, {within}"))
    if config.off_policy_sequence_mask_delta is not None:
        rows.append(("off-policy mask", f"over {config.off_policy_sequence_mask_delta:g} nats a token"))
    if config.top_entropy_quantile < 1:
        rows.append(("entropy filter", f"the top {config.top_entropy_quantile:.0%} of the tokens"))
    if config.overlong_filter:
        rows.append(("overlong filter", "completions that were cut off do not train"))
    if config.dynamic_sample:
        rows.append(("dynamic sampling", f"up to {config.max_resample_times} further draws a generation"))
    return rows


def _reference(config: RLHFConfig) -> str:
    if not config.own_reference:
        return "the policy with its adapter off, no second copy"
    if config.ref_model or config.ref_adapters:
        return " with ".join((str(config.ref_model or config.model), *config.ref_adapters))
    return "the model before its first step" + (", follows the policy" if config.sync_ref_model else "")
