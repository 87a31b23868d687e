"""Losses and credits as the command line knows them: their names, and the flags that stand in their own
files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pydantic import create_model

from raytune_rl.algorithms.credit.base import credit_names, get_credit
from raytune_rl.algorithms.options import Option, options_of
from raytune_rl.algorithms.registry import online_losses
from raytune_rl.config.base import Options, setting

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
        yield from ((f"--advantage_estimator {name}", option) for option in options_of(credit.make))  # type: ignore[arg-type]


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
    found: dict[str, list[str]] = {}
    for loss in online_losses():
        for one in fields(loss.settings_type):
            found.setdefault(one.name, []).append(loss.name)
    return found
