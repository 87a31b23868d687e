"""Settings of losses and credits that are flags of the command line: declared once, where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Option:
    """A setting as a flag.

    Attributes:
        name: Of the field, and of the flag.
        kind: Its type.
        default: Its default.
        help: What it does.
        limits: Bounds of its values: `gt`, `ge`, `lt`, `le`.
    """

    name: str
    kind: Any
    default: Any
    help: str
    limits: Mapping[str, float]


def option(default: Any, help: str, **limits: float) -> Any:
    """Declares a field of a settings class that is a flag too.

    Args:
        default: Its default.
        help: What it does, for `--help`, where the owner's name is put before it.
        limits: `gt`, `ge`, `lt`, `le`.
    """
    return field(default=default, metadata={"help": help, "limits": limits})


def options_of(settings_type: type) -> list[Option]:
    """The fields of a settings class that are flags."""
    declared: list[Field[Any]] = [one for one in fields(settings_type) if "help" in one.metadata]
    hints = get_type_hints(settings_type) if declared else {}
    return [
        Option(one.name, hints[one.name], one.default, one.metadata["help"], one.metadata["limits"])
        for one in declared
    ]
