"""Command line, config file and environment to a config object and notices.

What is given later goes first: defaults of the caller, config file, command line. The environment only fills
in what none of them says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from raytune_rl import config as config_classes
from raytune_rl.config import environment, legacy
from raytune_rl.config import file as config_file
from raytune_rl.config.base import Options
from raytune_rl.config.commandline import Written, split, values_of
from raytune_rl.config.explain import did_you_mean
from raytune_rl.config.flags import Flag, flags_of
from raytune_rl.config.help import help_text
from raytune_rl.config.not_offered import instead_of
from raytune_rl.config.preference import READS
from raytune_rl.errors import ConfigError

Config = TypeVar("Config", bound=Options)


@dataclass(frozen=True)
class Parsed(Generic[Config]):
    """A validated config, what the user should know about it (one line each), and the file it came from."""

    config: Config
    notices: tuple[str, ...]
    config_file: Path | None = None


def parse(
    argv: Sequence[str],
    config_class: type[Config],
    *,
    defaults: Mapping[str, Any] | None = None,
    environ: MutableMapping[str, str] | None = None,
) -> Parsed[Config]:
    """Reads a command line.

    Args:
        argv: The words after the command's name: optionally a config file first, then flags.
        config_class: `SFTConfig`, `RLHFConfig`, `PPOConfig`, `PreferenceConfig`, ....
        defaults: Settings that file and flags may override, for a program that has its own.
        environ: The environment, `os.environ` unless given; `ENV` of the config file is written to it.

    Raises:
        ConfigError: something cannot be honoured; the message names the flag and what to do.
        SystemExit: with code 0, after printing the help that `--help` or `-h` asks for.
    """
    if any(word in ("--help", "-h") for word in argv):
        print(help_text(config_class), end="", flush=True)
        raise SystemExit(0)
    environ = os.environ if environ is None else environ
    flags = flags_of(config_class)
    notices: list[str] = []

    path, written = split(argv)
    words = _last_of_each(written, flags, notices)
    _refuse_unknown(words, flags, config_class, "")
    from_flags = values_of(words, flags)

    from_file: dict[str, Any] = {}
    if path is not None:
        file = config_file.read(path)
        _set_environment(file, environ, notices)
        from_file = _renamed(file.settings, flags, notices)
        _refuse_unknown(from_file, flags, config_class, f"{path}: ")

    settings = {**(defaults or {}), **from_file, **from_flags}
    settings, said = legacy.translate(settings, environ)
    notices += said
    settings, said = environment.apply(settings, flags, environ)
    notices += said
    try:
        config = config_class(**settings)
    except ConfigError as error:
        raise _located(error, set(from_file) - set(from_flags), path) from None
    from raytune_rl.config.notices import notices_for  # needs every command's class, and help does not

    notices += notices_for(config)
    return Parsed(config, tuple(notices), None if path is None else Path(path))


def rlhf_class(argv: Sequence[str]) -> type[Options]:
    """The config class of an `rlhf` command line: PPO, and what learns from preferences in the data, have
    flags of their own.

    Raises:
        ConfigError: The command line or its config file cannot be read.
    """
    path, written = split([word for word in argv if word != "-h"])
    named = [flag.words[-1] for flag in written if flag.name == "rlhf_type" and flag.words]
    if not named and path is not None:
        named = [str(config_file.read(path).settings.get("rlhf_type"))]
    if named and named[-1] == "ppo":
        return config_classes.PPOConfig
    learns_from_pairs = named and named[-1] in READS
    return config_classes.PreferenceConfig if learns_from_pairs else config_classes.RLHFConfig


def _last_of_each(
    written: Iterable[Written], flags: Mapping[str, Flag], notices: list[str]
) -> dict[str, tuple[str, ...]]:
    words: dict[str, tuple[str, ...]] = {}
    twice: dict[str, None] = {}
    for flag in written:
        name, notice = legacy.rename(flag.name, flags)
        if notice is not None and notice not in notices:
            notices.append(notice)
        if name in words:
            twice[name] = None
        words[name] = flag.words
    for name in twice:
        secret = name in flags and flags[name].secret
        value = "the last one" if secret else f"the last one, {' '.join(words[name]) or 'true'},"
        notices.append(f"--{name} is given more than once: {value} counts.")
    return words


def _renamed(settings: Mapping[str, Any], flags: Mapping[str, Flag], notices: list[str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for old, value in settings.items():
        name, notice = legacy.rename(old, flags)
        if notice is not None and notice not in notices:
            notices.append(notice)
        if name in renamed:
            notices.append(f"--{name} is given more than once: the last one, {value}, counts.")
        renamed[name] = value
    return renamed


def _set_environment(
    file: config_file.ConfigFile, environ: MutableMapping[str, str], notices: list[str]
) -> None:
    for name, value in file.environment.items():
        if name not in environ:
            environ[name] = value
        elif environ[name] != value:
            notices.append(f"{file.path}: ENV.{name} does nothing: {name} is set in the environment.")


def _refuse_unknown(
    names: Iterable[str], flags: Mapping[str, Flag], config_class: type[Options], where: str
) -> None:
    unknown = [name for name in names if name not in flags and not legacy.known(name, flags)]
    if unknown:
        raise ConfigError("\n".join(where + _unknown(name, flags, config_class) for name in unknown))


def _unknown(name: str, flags: Mapping[str, Flag], config_class: type[Options]) -> str:
    if name in legacy.EXTERNAL_SERVER:
        return (
            f"--{name}: this command starts its own rollout workers and contacts no server. For GPUs of "
            "their own "
            "use --colocate false, with --rollout_workers for how many."
        )
    commands: tuple[type[Options], ...] = (
        config_classes.SFTConfig,
        config_classes.RLHFConfig,
        config_classes.PPOConfig,
        config_classes.PreferenceConfig,
        config_classes.RewardCheckConfig,
        config_classes.AlgorithmsConfig,
        config_classes.InferConfig,
        config_classes.ExportConfig,
    )
    names = {name, legacy.RENAMED.get(name, name)}
    elsewhere = [c.COMMAND for c in commands if names & set(flags_of(c)) or legacy.known(name, flags_of(c))]
    if elsewhere:
        return f"--{name} is no flag of raytune-rl {config_class.COMMAND}, but of {' and '.join(elsewhere)}."
    instead = instead_of(name)
    if instead is not None:
        return f"--{name} is a flag of ms-swift that is not built yet{f': {instead}' if instead else ''}."
    also = [old for old, new in legacy.RENAMED.items() if new in flags]
    near = did_you_mean(name, [*flags, *also], prefix="--")
    return f"Unknown flag --{name}.{near or f' raytune-rl {config_class.COMMAND} --help lists all of them.'}"


def _located(error: ConfigError, from_file: set[str], path: str | None) -> ConfigError:
    """Says which of the flags named in an error stand in the config file."""
    named = [name for name in re.findall(r"--(\w+)", str(error)) if name in from_file]
    if not named:
        return error
    return ConfigError(f"{error}\n{path} sets {', '.join(dict.fromkeys(named))}.")
