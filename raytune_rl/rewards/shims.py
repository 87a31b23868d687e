"""Stand-ins for the modules that ms-swift plugin files import, while such a file is being imported.

    3.x  from swift.plugin import ORM, orms          from swift.utils import get_logger
    4.x  from swift.rewards import ORM, AsyncORM, orms

Plugin files often import much besides (engines, templates, schedulers) for the sake of other examples in the
same file. Any other name is therefore a class that can be inherited from and says what is missing as soon as
it is used, and any other `swift.*` module exists.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from raytune_rl.errors import RewardError
from raytune_rl.multi_turn.scheduler import MultiTurnScheduler, Request, multi_turns
from raytune_rl.rewards import registry
from raytune_rl.rewards.base import ORM, AsyncORM
from raytune_rl.rewards.judge import DefaultRMPlugin, GenRMPlugin, rm_plugins
from raytune_rl.rewards.judge_answers import RequestConfig
from raytune_rl.rewards.judge_engine import JudgeEngine

_BUILT_IN = tuple(registry.orms.values())
_REGISTRIES = ("prms", "envs", "context_managers", "loss_map", "callbacks")


def real_swift_installed() -> bool:
    """Whether ms-swift is there, told without importing it (OpenStack has another package called `swift`)."""
    spec = importlib.util.find_spec("swift")
    folders = (spec.submodule_search_locations if spec else None) or []
    return any((Path(folder) / part).exists() for folder in folders for part in ("rewards", "plugin"))


def swift_importable() -> contextlib.AbstractContextManager[object]:
    """A block in which `import swift` works: the installed ms-swift, or else stand-ins."""
    return contextlib.nullcontext() if real_swift_installed() else swift_stand_ins()


@contextlib.contextmanager
def swift_stand_ins() -> Iterator[dict[str, dict[str, Any]]]:
    """Makes `swift` and all below it importable within the block, and only there.

    Yields:
        What plugins put into registries other than `orms`, by registry name; raytune_rl does not use these
        here.
    """
    others: dict[str, dict[str, Any]] = {name: {} for name in _REGISTRIES}
    finder = _Finder(others)
    sys.meta_path.insert(0, finder)
    try:
        yield others
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_swift(name)]:
            del sys.modules[name]


def _is_swift(module: str) -> bool:
    return module == "swift" or module.startswith("swift.")


def _get_logger(*args: Any, **kwargs: Any) -> logging.Logger:
    return logging.getLogger("raytune_rl.plugin")


def _to_device(inputs: Any, device: Any, **kwargs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: _to_device(value, device) for name, value in inputs.items()}
    return inputs.to(device) if hasattr(inputs, "to") else inputs


class _Finder(MetaPathFinder, Loader):
    def __init__(self, others: dict[str, dict[str, Any]]) -> None:
        self._names: dict[str, Any] = {
            "ORM": ORM,
            "AsyncORM": AsyncORM,
            "orms": registry.orms,
            "multi_turns": multi_turns,
            "MultiTurnScheduler": MultiTurnScheduler,
            "RolloutInferRequest": Request,
            "rm_plugins": rm_plugins,
            "DefaultRMPlugin": DefaultRMPlugin,
            "GenRMPlugin": GenRMPlugin,
            "RequestConfig": RequestConfig,
            **dict.fromkeys(("PtEngine", "TransformersEngine"), JudgeEngine),
            "to_device": _to_device,
            **{entry.__name__: entry for entry in _BUILT_IN},
            "get_logger": _get_logger,
            **others,
        }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if _is_swift(fullname) else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def lookup(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return self._names[name] if name in self._names else _missing(f"{module.__name__}.{name}")

        module.__dict__["__getattr__"] = lookup


def _missing(full_name: str) -> type:
    def refuse(self: object, *args: Any, **kwargs: Any) -> None:
        raise RewardError(f"This plugin uses `{full_name}` of ms-swift, which raytune_rl does not have.")

    return type(full_name.rpartition(".")[2], (), {"__init__": refuse})
