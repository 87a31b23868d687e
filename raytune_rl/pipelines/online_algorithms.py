"""From flags to an algorithm: a loss and a credit, each with its settings, and what both need of the run.

Losses and credits are looked up by name; none is named here. What they share (corrections, filters) is chosen
by flags of its own and combines with any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from raytune_rl.algorithms.aggregation import normaliser_of
from raytune_rl.algorithms.before_step import OnlineStep, StepModels, StepValues
from raytune_rl.algorithms.credit.base import Credit, get_credit, is_built_in_credit
from raytune_rl.algorithms.distillation import TEACHER_COLUMNS, TEACHER_LOGPROBS
from raytune_rl.algorithms.registry import Loss, get_loss, is_built_in_loss
from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.config.algorithms import credit_settings, is_taught, loss_settings
from raytune_rl.errors import ConfigError
from raytune_rl.protocol.train import LossSpec
from raytune_rl.rewards.plugins import load_plugins


@dataclass(frozen=True)
class Algorithm:
    """The algorithm of an online run.

    Attributes:
        loss: As the trainer is told.
        bounds: The loss's constants in words; empty if it says none.
        credit: Who earned what.
        needs: Columns that loss and credit cannot do without; the groups that give them are started.
        before_step: What the loss works out of each optimizer step before it is made, or None.
        expert_share: Optimizer step -> the weight of an expert's answers in it; None: there are none.
    """

    loss: LossSpec
    bounds: str
    credit: Credit
    needs: frozenset[str]
    before_step: Callable[[OnlineStep, StepModels], StepValues] | None = None
    expert_share: Callable[[int], float] | None = None


def algorithm_of(config: RLHFConfig) -> Algorithm:
    """The algorithm that the flags describe.

    Raises:
        ConfigError: There is no such loss or credit, it cannot be used here, or a setting of it is wrong.
        RewardError: A plugin file cannot be loaded.
    """
    if not (is_built_in_loss(config.loss_type) and is_built_in_credit(resolved.credit(config))):
        load_plugins(config.external_plugins)
    loss = get_loss(config.loss_type)
    if not loss.is_online:
        if loss.is_built_in:
            raise ConfigError(
                f"--loss_type {config.loss_type} is a loss of another command, not of this one."
            )
        raise ConfigError(f"loss '{loss.name}' is made for {loss.rows} rows and {loss.forward}, not for RL.")
    given, settings = loss_settings(config, loss, {} if loss.is_built_in else config.loss_args)
    credit = credit_of(config)
    files = () if loss.is_built_in else config.external_plugins
    spec = LossSpec(loss.name, dict(given), normaliser_of(loss.normaliser), files, config.log_entropy)
    needed = frozenset(loss.required_columns(settings))
    _check_columns(config, loss, {*needed, *loss.required_rows(settings)})
    if credit.advice(0) is not None and is_taught(loss, settings):
        raise ConfigError(
            f"--advantage_estimator {config.advantage_estimator} and --loss_type {loss.name} both learn from "
            "the teacher, each in its own way: choose one."
        )
    words = "" if loss.in_words is None else loss.in_words(settings)
    before_step = None if loss.before_step is None else partial(loss.before_step.prepare, settings)
    share = None if loss.expert_share is None else partial(loss.expert_share, settings)
    if share is not None and not config.chord_sft_dataset:
        raise ConfigError(
            f"--loss_type {loss.name} learns from an expert's answers too: --chord_sft_dataset."
        )
    return Algorithm(spec, words, credit, needed | credit.needs, before_step, share)


def credit_of(config: RLHFConfig) -> Credit:
    """The credit that the flags describe.

    Raises:
        ConfigError: There is none of that name, or it needs what this run does not have.
    """
    name = resolved.credit(config)
    args = {} if is_built_in_credit(name) else config.advantage_args
    credit = credit_settings(config, get_credit(name), resolved.reward_weights(config), args)
    if "values" in credit.needs and not config.WITH_CRITIC:
        raise ConfigError(f"--advantage_estimator {name} needs a critic: --rlhf_type ppo has one.")
    if resolved.kl_in_reward(config) and "ref_logprobs" not in credit.needs:
        raise ConfigError(
            f"--kl_in_reward true: --advantage_estimator {name} takes no KL off the reward; leave it out, "
            "and the KL is a term of the loss."
        )
    if "teacher_advantages" in credit.needs and not config.has_teachers:
        raise ConfigError(f"--advantage_estimator {name} needs somebody to learn from: --teacher_model.")
    if credit.wants_greedy and resolved.max_staleness(config):
        raise ConfigError(
            f"--advantage_estimator {name} compares completions with the likeliest answer under the same "
            "weights, which is not asked for ahead of the training: leave out --async_generate."
        )
    if credit.advice(0) is not None and len(config.teacher_model) > 1 and config.teacher_column is None:
        raise ConfigError(
            f"--advantage_estimator {name} takes one teacher a row: name one --teacher_model, or say whose a "
            "row is by --teacher_column."
        )
    if "ref_logprobs" in credit.needs and config.beta == 0:
        raise ConfigError(f"--advantage_estimator {name} needs a reference model: --beta must be over 0.")
    return credit


def _check_columns(config: RLHFConfig, loss: Loss, needed: set[str]) -> None:
    known_columns = {"old_logprobs", "rollout_logprobs"}
    known_columns |= {"ref_logprobs"} if config.beta > 0 else set()
    known_columns |= {*TEACHER_COLUMNS, TEACHER_LOGPROBS} if config.has_teachers else set()
    known_columns |= {"entropy", "entropy_threshold"} if config.top_entropy_quantile < 1 else set()
    known_columns |= set() if loss.before_step is None else loss.before_step.gives
    if missing := needed - known_columns:
        raise ConfigError(
            f"loss '{loss.name}' needs {', '.join(sorted(missing))}, which this run does not have; it has "
            f"{', '.join(sorted(known_columns))}."
        )


def in_words(config: RLHFConfig, algorithm: Algorithm) -> list[tuple[str, str]]:
    """The algorithm for the plan: what is on, each with its numbers."""
    origin = "from a plugin" if algorithm.loss.plugin_files else ""
    level = algorithm.loss.settings.get("importance_sampling_level", config.importance_sampling_level)
    rows = [
        ("loss", ", ".join(part for part in (config.loss_type, origin, algorithm.bounds) if part)),
        ("importance ratio", f"of the {level.replace('_', ', by ')}"),
        ("advantage", algorithm.credit.in_words()),
    ]
    if config.has_teachers:
        rows.append(("teachers", _teachers(config, algorithm)))
    if config.beta > 0:
        where = "off the reward" if resolved.kl_in_reward(config) else "in the loss"
        rows.append(("KL", f"{resolved.kl_estimator(config)} {where}, beta {config.beta:g}"))
        rows.append(("reference", _reference(config)))
    if (mode := resolved.rollout_correction(config)) is not None:
        low, top = config.rollout_importance_sampling_min, config.rollout_importance_sampling_threshold
        within = f"{low or 0:g} to {top:g}"
        chosen = "" if config.rollout_importance_sampling_mode else ", chosen for --async_generate"
        rows.append(("rollout correction", f"{mode}, {within}{chosen}"))
    if config.off_policy_sequence_mask_delta is not None:
        rows.append(("off-policy mask", f"over {config.off_policy_sequence_mask_delta:g} nats a token"))
    if config.top_entropy_quantile < 1:
        rows.append(("entropy filter", f"the top {config.top_entropy_quantile:.0%} of the tokens"))
    if config.overlong_filter:
        rows.append(("overlong filter", "completions that were cut off do not train"))
    if config.dynamic_sample:
        rows.append(("dynamic sampling", f"up to {config.max_resample_times} further draws a generation"))
    return rows


def _teachers(config: RLHFConfig, algorithm: Algorithm) -> str:
    models = " and ".join(config.teacher_model or (f"{config.model} with {config.teacher_adapters[0]}",))
    chosen = f", by the column {config.teacher_column}" if config.teacher_column else ""
    if config.teacher_sync_steps is not None:
        chosen = f", follows the policy every {config.teacher_sync_steps} steps"
    if not algorithm.needs.isdisjoint(TEACHER_COLUMNS):
        own = (
            f", on the policy's own answers with probability {config.lmbda:g}" if config.demonstrates else ""
        )
        return f"{models}{chosen}, its distribution{own}"
    if TEACHER_LOGPROBS in algorithm.needs or algorithm.credit.advice(0) is not None:
        return f"{models}{chosen}, its log-probs"
    return f"{models}{chosen}: reverse KL a token, coefficient {config.teacher_kl_coef:g}"


def _reference(config: RLHFConfig) -> str:
    if not config.own_reference:
        return "the policy with its adapter off, no second copy"
    if config.ref_model or config.ref_adapters:
        return " with ".join((str(config.ref_model or config.model), *config.ref_adapters))
    return "the model before its first step" + (", follows the policy" if config.sync_ref_model else "")
