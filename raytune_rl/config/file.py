"""A config file: YAML or JSON, its keys are flags, and a mapping `ENV` sets environment variables."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_rl.errors import ConfigError


@dataclass(frozen=True)
class ConfigFile:
    """The content of a config file: the settings by flag name, and the environment."""

    path: Path
    settings: dict[str, Any]
    environment: dict[str, str]


def read(path: str) -> ConfigFile:
    """Reads a config file.

    Raises:
        ConfigError: it is missing or is not a mapping of names to values.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Config file {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Config file {path}: not text in UTF-8 (byte {error.start}); save it as UTF-8."
        ) from None
    content = _json(text, path) if file.suffix.lower() == ".json" else _yaml(text, path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected flags with their values, found {type(content).__name__}.")
    environment = content.pop("ENV", None) or {}
    if not isinstance(environment, dict):
        raise ConfigError(f"{path}: ENV must map names of environment variables to values.")
    settings = {str(key).removeprefix("--").replace("-", "_"): value for key, value in content.items()}
    return ConfigFile(file, settings, {str(name): _text(value) for name, value in environment.items()})


def _text(value: Any) -> str:
    """As a shell would have it: YAML's true is `true`, not Python's `True`."""
    return value if isinstance(value, str) else json.dumps(value)


def _json(text: str, path: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in items:
            if key in content:
                raise ConfigError(f"{path}: {key!r} is there twice.")
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}.") from None


def _yaml(text: str, path: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice, which YAML forbids and PyYAML lets pass."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(f"{path}, line {key.start_mark.line + 1}: a key must be a name.")
                if key.value in seen:
                    raise ConfigError(
                        f"{path}, line {key.start_mark.line + 1}: {key.value!r} is there twice."
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    # To PyYAML 1:8 is the number 68, in base 60; here, as in YAML 1.2, it is text.
    as_text = ("tag:yaml.org,2002:str", re.compile(r"\d+(:\d+)+$"))
    resolvers = Loader.yaml_implicit_resolvers
    Loader.yaml_implicit_resolvers = resolvers | {d: [as_text, *resolvers.get(d, [])] for d in "0123456789"}

    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{path}{where}: not YAML: {what}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}.") from None
