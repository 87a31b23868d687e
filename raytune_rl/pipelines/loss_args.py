"""A loss's settings: what the flags say of it, and what `--loss_args` says to a loss of a plugin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from raytune_rl.algorithms.registry import Loss
from raytune_rl.errors import ConfigError


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
    if unknown := sorted(loss_args.keys() - own):
        raise ConfigError(
            f"--loss_args: {', '.join(unknown)} is no setting of loss '{loss.name}', which has: "
            f"{', '.join(sorted(own)) or 'none'}."
        )
    given = {**{name: value for name, value in said.items() if name in own}, **loss_args}
    try:
        return given, loss.settings_type(**given)
    except TypeError as error:
        raise ConfigError(
            f"--loss_args: loss '{loss.name}' cannot be set up with {given}: {error}."
        ) from None
