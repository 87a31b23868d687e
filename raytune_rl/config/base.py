"""The base of all config objects: how a setting is declared, and that a bad one is a `ConfigError`.

A config object holds what the user asked for and nothing else. It is frozen; a default that depends on
other settings or on the cluster stays `None` here, and a pure function of `raytune_rl/config/resolved.py`
works it out.
"""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raytune_rl.config.explain import explain
from raytune_rl.config.flags import Flag, flags_of
from raytune_rl.errors import ConfigError


def setting(group: str, default: Any, help: str, **constraints: Any) -> Any:
    """Declares one setting: the group it is listed under in `--help`, its default, and what it does.

    `constraints` are pydantic's (`gt`, `ge`, `lt`, `le`, `exclude`...), and `values`: what a value is, in
    words, where the type does not say it.
    """
    values = constraints.pop("values", None)
    extra: dict[str, Any] = {"group": group} if values is None else {"group": group, "values": values}
    return Field(default, description=help, json_schema_extra=extra, **constraints)


class Options(BaseModel):
    """Base of the topic mixins and so of every config object.

    Raises:
        ConfigError: on construction, naming each flag that cannot be honoured, its value and what is allowed.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        defer_build=True,  # help reads the fields of many classes and validates nothing
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    COMMAND: ClassVar[str] = ""
    """The command of the command line that takes these settings."""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, flags_of(type(self)))) from None

    @model_validator(mode="before")
    @classmethod
    def _shape(cls, values: Any) -> Any:
        """One value stands for a list of one, and a JSON string for the mapping it spells."""
        if not isinstance(values, dict):
            return values
        flags = flags_of(cls)
        return {name: _shaped(flags[name], v) if name in flags else v for name, v in values.items()}

    def args(self) -> dict[str, Any]:
        """All settings as JSON-able values, for args.json. Secrets are left out."""
        return self.model_dump(mode="json")

    def is_set(self, name: str) -> bool:
        """Whether the user gave this setting, be it the default's value."""
        return name in self.model_fields_set


def _shaped(flag: Flag, value: Any) -> Any:
    """Brings the ways in which people write a value to the one that the field's type knows."""
    if flag.kind == "list" and value is not None:
        many = isinstance(value, (list, tuple, set, frozenset))
        return tuple(_plain(flag, item) for item in value) if many else (_plain(flag, value),)
    if flag.kind == "dict" and isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"--{flag.name}: {value!r} is not JSON ({error}). "
                'Write a JSON object, such as \'{"from": "to"}\'.'
            ) from None
    return _plain(flag, value)


def _plain(flag: Flag, value: Any) -> Any:
    """A path becomes text, and the text of a choice that is a number becomes that number."""
    if isinstance(value, PurePath):
        return str(value)
    return flag.choices.get(value, value) if isinstance(value, str) else value
