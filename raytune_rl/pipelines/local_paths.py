"""Paths before they leave the driver: workers run in folders, and maybe on machines, of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from raytune_rl.config.base import Options
from raytune_rl.rewards.plugins import PluginFile

Config = TypeVar("Config", bound=Options)

_MODELS = (
    "model", "adapters", "ref_model", "ref_adapters", "reward_model", "teacher_model", "teacher_adapters"
)  # fmt: skip
"""Settings that workers load by name: a folder, else a hub id. Data, system prompts and DeepSpeed files are
read on the driver's own machine and in its folder."""


def made_absolute(config: Config) -> Config:
    """The same settings with absolute paths in place of relative ones that exist here, and with plugin files
    that carry their text. Hub ids, and what does not exist here, stay as they are.
    """
    settings = {name: getattr(config, name, None) for name in _MODELS}
    changed: dict[str, Any] = {name: _absolute(value) for name, value in settings.items() if value}
    plugins = getattr(config, "external_plugins", ())
    changed["external_plugins"] = tuple(PluginFile.read(file) for file in plugins)
    kept = {name: value for name, value in changed.items() if value and config.is_set(name)}
    return config.model_copy(update=kept)


def _absolute(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_absolute, value))
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value
