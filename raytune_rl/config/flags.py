"""The command line's view of a config class: one `Flag` per pydantic field."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr

Kind = Literal["bool", "scalar", "list", "dict"]


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: As in Python; on the command line with `--` in front.
        kind: What may follow it: `bool` nothing or true/false, `scalar` one value, `list` any number of
            values, `dict` one JSON object.
        choices: The only values allowed, as typed, and what each stands for; or empty.
        optional: Whether "not set" (`None`) is a value.
        values: What a value is, in words: "int", "text", "a|b"...
        default: The default value.
        help: What it does.
        group: The heading it is listed under.
        secret: Whether its value must never be shown.
    """

    name: str
    kind: Kind
    choices: Mapping[str, Any]
    optional: bool
    values: str
    default: Any
    help: str
    group: str
    secret: bool


@cache
def flags_of(config_class: type[BaseModel]) -> dict[str, Flag]:
    """The flags of a config class, by name, in the order of declaration."""
    return {name: _flag(name, info) for name, info in config_class.model_fields.items()}


def _flag(name: str, info: Any) -> Flag:
    alternatives = _alternatives(info.annotation)
    optional = type(None) in alternatives
    kept = [a for a in alternatives if a is not type(None)]
    kind, values, choices = _describe(kept)
    extra = info.json_schema_extra or {}
    return Flag(
        name=name,
        kind=kind,
        choices=choices,
        optional=optional,
        values=extra.get("values", values),
        default=info.default,
        help=info.description or "",
        group=extra.get("group", "Other"),
        secret=SecretStr in kept,
    )


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _describe(kept: list[Any]) -> tuple[Kind, str, Mapping[str, Any]]:
    if len(kept) != 1:
        return "scalar", "|".join(_word(k) for k in kept), {}
    only = kept[0]
    origin = get_origin(only)
    if only is bool:
        return "bool", "true|false", {}
    if origin is Literal:
        allowed = {str(choice): choice for choice in get_args(only)}
        return "scalar", "|".join(allowed), allowed
    if origin is tuple:
        _, item, choices = _describe([get_args(only)[0]])
        return "list", item, choices
    if origin is dict:
        return "dict", "JSON", {}
    return "scalar", _word(only), {}


def _word(type_: Any) -> str:
    if type_ in (str, SecretStr):
        return "text"
    if get_origin(type_) is dict:
        return "JSON"
    return getattr(type_, "__name__", str(type_))
