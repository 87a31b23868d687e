"""Losses and credits as the command line knows them: their names, and the flags that stand in their own
files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import create_model

from raytune_rl.algorithms.correction import Mode, RolloutCorrection
from raytune_rl.algorithms.credit.base import Credit, CreditKind, credit_names, get_credit
from raytune_rl.algorithms.distillation import TEACHER_COLUMNS, TEACHER_LOGPROBS
from raytune_rl.algorithms.options import Option, options_of
from raytune_rl.algorithms.registry import Loss, online_losses
from raytune_rl.config.asynchrony import staleness_bound
from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

GROUP = "RL algorithm"


def loss_choices() -> str:
    """Every loss with what it does."""
    return "; ".join(f"{loss.name} {loss.summary}" for loss in online_losses() if loss.summary)


def credit_choices() -> str:
    """Every credit with what it does."""
    return "; ".join(f"{name}: {get_credit(name).summary}" for name in credit_names())


def _declared() -> Iterator[tuple[str, Option]]:
    """Every flag that a loss or a credit declares, with the flag and value that it belongs to."""
    for loss in online_losses():
        yield from ((f"--loss_type {loss.name}", option) for option in options_of(loss.settings_type))
    for name in credit_names():
        credit = get_credit(name)
        yield from ((f"--advantage_estimator {name}", option) for option in options_of(credit.make))


def _fields() -> Mapping[str, Any]:
    owners: dict[str, tuple[Option, list[str]]] = {}
    for owner, option in _declared():
        owners.setdefault(option.name, (option, []))[1].append(owner)
    return {
        name: (
            option.kind,
            setting(GROUP, option.default, f"{', '.join(of)}: {option.help}", **option.limits),
        )
        for name, (option, of) in owners.items()
    }


if TYPE_CHECKING:

    class AlgorithmFlags(Options):
        """The flags that losses and credits declare."""
else:
    AlgorithmFlags = create_model("AlgorithmFlags", __base__=Options, **_fields())


def loss_flags() -> dict[str, list[str]]:
    """Every setting of an online loss -> the losses that have it."""
    readers: dict[str, list[str]] = {}
    for loss in online_losses():
        for one in fields(loss.settings_type):
            if one.name not in loss.fixed:
                readers.setdefault(one.name, []).append(loss.name)
    return readers


def credit_flags() -> dict[str, list[str]]:
    """Every flag that a credit declares, and `scale_rewards` -> the credits that have it."""
    readers: dict[str, list[str]] = {}
    for name in credit_names():
        kind = get_credit(name)
        names = [one.name for one in options_of(kind.make)]
        names += [one.name for one in fields(kind.make) if one.name == "scale_rewards"]
        for one in names:
            if one not in kind.fixed:
                readers.setdefault(one, []).append(name)
    return readers


def wants_kl_in_reward(config: Any) -> bool:
    """Whether the KL belongs into the reward: as the user says, else as the credit has it; without a KL it is
    nowhere."""
    if config.beta == 0:
        return False
    if config.kl_in_reward is not None:
        return config.kl_in_reward
    estimator = config.advantage_estimator
    return estimator in credit_names() and get_credit(estimator).kl_in_reward


def kl_estimator(config: Any) -> Literal["k1", "k2", "k3"]:
    """k1 in the reward, k3 in the loss, unless given."""
    return config.kl_estimator or ("k1" if wants_kl_in_reward(config) else "k3")


def rollout_correction(config: Any) -> Mode | None:
    """How tokens are weighed by the ratio of the policy to what sampled them; None: not at all.

    Where completions may be of older weights, that ratio is what makes the surrogate's expectation the one
    under the policy (AReaL's decoupled objective, Fu et al. 2025, section 5.2), cut as its variance wants it.
    """
    mode = config.rollout_importance_sampling_mode
    if mode is None:
        return "token_truncate" if staleness_bound(config) else None
    return None if mode == "none" else mode


def compares(estimator: str) -> bool:
    """Whether a credit needs several completions of a prompt; one that is not known here does."""
    return estimator not in credit_names() or get_credit(estimator).compares


def is_taught(loss: Loss, settings: Any) -> bool:
    """Whether a loss with such settings learns from a teacher itself, not by advantages."""
    return not {*TEACHER_COLUMNS, TEACHER_LOGPROBS}.isdisjoint(loss.required_columns(settings))


def loss_settings(config: Any, loss: Loss, loss_args: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """An online loss's settings, as the flags and `--loss_args` say; see `settings_of`."""
    correction = None
    if (mode := rollout_correction(config)) is not None:
        correction = RolloutCorrection(
            mode,
            config.rollout_importance_sampling_threshold,
            config.rollout_importance_sampling_min,
        )
    in_reward = wants_kl_in_reward(config)
    given = {
        **{name: getattr(config, name) for name in type(config).model_fields},
        "beta": 0.0 if in_reward else config.beta,
        "kl_estimator": "k3" if in_reward or config.beta == 0 else kl_estimator(config),
        "correction": correction,
        "off_policy_delta": config.off_policy_sequence_mask_delta,
        "entropy_filter": config.top_entropy_quantile < 1,
    }
    return settings_of(loss, given, loss_args)


def credit_settings(
    config: Any, kind: CreditKind, reward_weights: tuple[float, ...], advantage_args: Mapping[str, Any]
) -> Credit:
    """A credit set up as the flags and `--advantage_args` say, which has precedence.

    Raises:
        ConfigError: `--advantage_args` names what is no setting of it, or it does not take what it is given.
    """
    given = {
        **{name: getattr(config, name) for name in type(config).model_fields},
        "beta": config.beta if wants_kl_in_reward(config) else 0.0,
        "kl_estimator": kl_estimator(config),
        "reward_weights": reward_weights,
    }
    args = checked_args(advantage_args, "--advantage_args", f"credit '{kind.name}'", kind.make)
    return kind.settings({**given, **args})


def checked_args(args: Mapping[str, Any], flag: str, owner: str, settings_type: type) -> dict[str, Any]:
    """Settings that are given as JSON, checked as flags are: their names, and what an `option` may be.

    Args:
        args: Name -> value.
        flag: It has them.
        owner: Whose settings they are, for messages.
        settings_type: The owner's dataclass.

    Raises:
        ConfigError: One is no setting of the owner, or not what its declaration allows.
    """
    own = {field.name for field in fields(settings_type)}
    if unknown := sorted(args.keys() - own):
        raise ConfigError(
            f"{flag}: {', '.join(unknown)} is no setting of {owner}, which has: "
            f"{', '.join(sorted(own)) or 'none'}."
        )
    declared = [option for option in options_of(settings_type) if option.name in args]
    kinds: dict[str, Any] = {
        o.name: (o.kind, setting(GROUP, o.default, o.help, **o.limits)) for o in declared
    }
    try:
        checked = create_model("Args", __base__=Options, **kinds)(**{name: args[name] for name in kinds})
    except ConfigError as error:
        lines = [f"{flag}: {line.removeprefix('--')}" for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from None
    return {**args, **{name: getattr(checked, name) for name in kinds}}


def settings_of(
    loss: Loss, said: Mapping[str, Any], loss_args: Mapping[str, Any]
) -> tuple[dict[str, Any], Any]:
    """Sets a loss up.

    Args:
        loss: The loss.
        said: What flags say of losses, by name; what this one has no field for is left out.
        loss_args: `--loss_args`, which has precedence.

    Returns:
        The settings by name, and as the loss's own class.

    Raises:
        ConfigError: `--loss_args` names what is no setting of it, or it does not take what it is given.
    """
    own = {field.name for field in fields(loss.settings_type)}
    args = checked_args(loss_args, "--loss_args", f"loss '{loss.name}'", loss.settings_type)
    given = {**{name: value for name, value in said.items() if name in own}, **args, **loss.fixed}
    try:
        return given, loss.settings_type(**given)
    except TypeError as error:
        raise ConfigError(
            f"--loss_args: loss '{loss.name}' cannot be set up with {given}: {error}."
        ) from None
