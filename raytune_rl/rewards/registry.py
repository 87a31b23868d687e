"""Reward functions by name."""

from __future__ import annotations

import difflib
import inspect
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from raytune_rl.errors import RewardError
from raytune_rl.rewards.accuracy import MathAccuracy
from raytune_rl.rewards.cosine import CosineReward
from raytune_rl.rewards.format import Format
from raytune_rl.rewards.overlong import SoftOverlong
from raytune_rl.rewards.repetition import RepetitionPenalty
from raytune_rl.rewards.signatures import Signature, read_signature

# The name, the shape and the way in are ms-swift's: plugin files say `orms['mine'] = Mine`.
orms: dict[str, Any] = {
    "accuracy": MathAccuracy,
    "format": Format,
    "cosine": CosineReward,
    "repetition": RepetitionPenalty,
    "soft_overlong": SoftOverlong,
}

PLUGIN_PREFIX = "raytune_rl_plugin_"
"""The prefix of the names of modules that are plugin files."""


@dataclass(frozen=True)
class RewardFunction:
    """A reward ready to be called.

    Attributes:
        name: Its name in `orms`.
        label: Class name (function name for a plain function), as ms-swift's metric keys have it.
        signature: How it is called, and with what.
    """

    name: str
    label: str
    signature: Signature

    @property
    def is_async(self) -> bool:
        """Whether a call gives a coroutine."""
        return self.signature.is_async

    @property
    def required(self) -> tuple[str, ...]:
        """Columns without which it cannot be called."""
        return self.signature.required

    def __call__(self, completions: list[str], columns: dict[str, Any]) -> Any:
        return self.signature.call(completions, columns)


def build(names: Sequence[str], config: dict[str, Any]) -> list[RewardFunction]:
    """Makes the named rewards, in order.

    A class is constructed with the settings its constructor names: `args` (or `**kwargs`, as `args`) gets all
    of them as attributes, any other parameter the setting of that name. Functions and instances are taken as
    they are.

    Raises:
        RewardError: A name is unknown (the message lists the nearest), a constructor wants something that is
            not a setting or raises, or an entry cannot be called.
    """
    return [_wrap(name, _construct(name, _lookup(name), config)) for name in names]


def _lookup(name: str) -> Any:
    if name in orms:
        return orms[name]
    nearest = difflib.get_close_matches(name, orms, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(nearest)}? " if nearest else ""
    for module in [m for key, m in sys.modules.items() if key.startswith(PLUGIN_PREFIX)]:
        if callable(getattr(module, name, None)):
            hint = f"{module.__file__} has a `{name}`, but does not register it. "
    raise RewardError(
        f"Unknown reward function `{name}`. {hint}Known are: {', '.join(sorted(orms))}. "
        f"Functions of your own come from a file given to --external_plugins, which says orms['{name}'] = ..."
    )


def _construct(name: str, entry: Any, config: dict[str, Any]) -> Any:
    if not inspect.isclass(entry):
        return entry
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(entry).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments["args"] = SimpleNamespace(**config)  # ms-swift 4 passes `args=` to every constructor
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        optional = parameter.default is not parameter.empty
        if parameter.name == "args":
            arguments["args"] = SimpleNamespace(**config)
        elif config.get(parameter.name) is not None or (parameter.name in config and not optional):
            arguments[parameter.name] = config[parameter.name]
        elif not optional:
            raise RewardError(
                f"Reward `{name}`: the constructor of {entry.__name__} requires `{parameter.name}`, which is "
                f"no setting. Give it a default, or take `args`, which holds all settings."
            )
    try:
        return entry(**arguments)
    except RewardError as error:  # says already what is wrong
        raise RewardError(f"Reward `{name}`: {error}") from error
    except Exception as error:
        raise RewardError(f"Reward `{name}`: {entry.__name__}() raised {describe_error(error)}") from error


def _wrap(name: str, call: Any) -> RewardFunction:
    if not callable(call):
        raise RewardError(
            f"Reward `{name}` is a {type(call).__name__}; a class, function or instance with __call__ works."
        )
    named = inspect.isroutine(call)
    label = getattr(call, "__name__", type(call).__name__) if named else type(call).__name__
    return RewardFunction(name, label, read_signature(name, call))


def describe_error(error: BaseException) -> str:
    """An error in one line, with the innermost place: `ValueError: no such thing (mine.py:12)`."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
