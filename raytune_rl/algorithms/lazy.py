"""numpy and torch, imported when they are first used.

`--help` lists every loss and credit with its flags, which stand in the files that hold the math; so these
files must be importable without the seconds that torch takes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


class _Later:
    """A module that is imported when something of it is wanted."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np = _Later("numpy")
    torch = _Later("torch")

__all__ = ["np", "torch"]
