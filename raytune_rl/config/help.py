"""The text of `--help`, from the same fields that are validated."""

from __future__ import annotations

import argparse
import json

from raytune_rl.config.base import Options
from raytune_rl.config.flags import Flag, flags_of

_ORDER = (
    "Model",
    "Data",
    "RL algorithm",
    "Teachers",
    "Rewards",
    "Sampling",
    "Several turns",
    "Length and batch",
    "Optimizer",
    "Tuner",
    "Output and checkpoints",
    "Rollout engine (vLLM)",
    "Asynchronous rollouts",
    "Cluster",
    "Export",
)

_EPILOG = (
    "A config file holds the same flags as keys, without the dashes; a flag on the command line overrules "
    "it. Its mapping ENV sets environment variables that are not set yet. On the command line lists are "
    "separated by blanks, and mappings are JSON."
)


def help_text(config_class: type[Options]) -> str:
    """All flags of a command, grouped, each with its default."""
    parser = argparse.ArgumentParser(
        prog=f"raytune-rl {config_class.COMMAND}",
        usage=f"raytune-rl {config_class.COMMAND.split()[0]} [config.yaml] [--flag value ...]",
        description=(config_class.__doc__ or "").replace("`", ""),
        epilog=_EPILOG,
        add_help=False,
        allow_abbrev=False,
    )
    flags = list(flags_of(config_class).values())
    for title in _ORDER:
        in_group = [flag for flag in flags if flag.group == title]
        if not in_group:
            continue
        group = parser.add_argument_group(title)
        for flag in in_group:
            group.add_argument(
                f"--{flag.name}",
                nargs="*" if flag.kind == "list" else None,
                metavar=_metavar(flag),
                help=f"{flag.help}{_default(flag)}".replace("%", "%%"),
            )
    return parser.format_help()


def _metavar(flag: Flag) -> str:
    # Long choices would push every line of the group to the right.
    return flag.values if len(flag.values) < 40 else "NAME"


def _default(flag: Flag) -> str:
    choices = f" One of {', '.join(flag.choices)}." if _metavar(flag) == "NAME" else ""
    value = flag.default
    if value is None:
        return choices
    if isinstance(value, bool):
        shown = str(value).lower()
    elif isinstance(value, (tuple, list)):
        shown = " ".join(str(item) for item in value) or "none"
    elif isinstance(value, dict):
        shown = json.dumps(value) if value else "none"
    else:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{choices} [{shown}]"
