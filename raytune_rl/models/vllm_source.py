"""What vLLM's model classes can do, read from their source: importing vLLM takes seconds, and the driver has
no other use for it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ADAPTERS = "SupportsLoRA"


def serves_adapters(config: Any) -> bool:
    """Whether vLLM's class for a model takes LoRA adapters.

    Args:
        config: Transformers' configuration.

    Returns:
        True also where it cannot be told: no vLLM here, a class that it does not know, or one with a base
        that is not found. The engine then says it when it starts.
    """
    models = _folder()
    if models is None:
        return True
    registered = _registered(models / "registry.py")
    known = [registered[name] for name in getattr(config, "architectures", None) or () if name in registered]
    return all(_inherits(models, module, name) is not False for module, name in known)


@cache
def _folder() -> Path | None:
    package = find_spec("vllm")
    for place in (package and package.submodule_search_locations) or ():
        models = Path(place) / "model_executor" / "models"
        if models.is_dir():
            return models
    return None


@cache
def _registered(file: Path) -> dict[str, tuple[str, str]]:
    """Module and class by the architecture's name."""
    found = {}
    for table in (node for node in ast.walk(_tree(file)) if isinstance(node, ast.Dict)):
        for key, value in zip(table.keys, table.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                parts = [part.value for part in value.elts if isinstance(part, ast.Constant)]
                if len(parts) == 2:
                    found[str(key.value)] = (str(parts[0]), str(parts[1]))
    return found


@cache
def _inherits(models: Path, module: str, name: str) -> bool | None:
    """Whether a class has vLLM's mark of adapters among its bases; None where one of them is not found."""
    if name == ADAPTERS:
        return True
    tree = _tree(models / f"{module}.py")
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        source = next((known for alias, known in _imports(tree) if alias == name), None)
        return _inherits(models, *source) if source else None
    named = classes[name].bases
    bases = [base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in named]
    found = [_base(models, module, base) for base in bases]
    if True in found:
        return True
    return None if None in found else False


def _base(models: Path, module: str, name: str) -> bool | None:
    """The same of a base class; those from outside of vLLM's models have no such mark."""
    if name in ("Module", "Protocol", "ABC", "Generic") or (name.startswith("Supports") and name != ADAPTERS):
        return False
    return _inherits(models, module, name)


def _imports(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names that come from a sibling module, and where they stand there."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module.removeprefix("vllm.model_executor.models.")
            if node.level == 1 or inside != node.module:
                for alias in node.names:
                    yield alias.asname or alias.name, (inside, alias.name)


@cache
def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return ast.Module([], [])
