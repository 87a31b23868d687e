"""`--external_plugins file.py`: files that add reward functions to the registry."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import logging
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from raytune_rl.errors import RewardError
from raytune_rl.rewards import registry
from raytune_rl.rewards.shims import real_swift_installed, swift_stand_ins

_log = logging.getLogger(__name__)


class PluginFile(str):
    """The absolute path of a plugin file that carries the file's text, for machines that lack the file.

    Attributes:
        text: None where there was no such file to read.
    """

    text: str | None

    @classmethod
    def read(cls, file: str | Path) -> PluginFile:
        """A file of this machine; one that is not there is for `load_plugins` to complain of."""
        path = Path(file).expanduser().resolve()
        made = cls(path)
        try:
            made.text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            made.text = None
        return made


def on_this_machine(files: Sequence[str | Path]) -> tuple[str, ...]:
    """Absolute paths of plugin files; what is carried and not there, as on another node of a cluster, is
    written to a folder of this process's own. Files that a plugin imports beside it are not carried.
    """
    return tuple(str(_unpacked(file)) for file in files)


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="raytune_rl-plugins-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _unpacked(file: str | Path) -> Path:
    path = Path(file).expanduser().resolve()
    text = getattr(file, "text", None)
    if path.exists() or text is None:
        return path
    copy = _folder() / path.relative_to("/")  # two files of one name stay two
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(text, encoding="utf-8")
    return copy


def load_plugins(files: Sequence[str | Path]) -> None:
    """Imports plugin files in order; what they put into `orms` is registered afterwards.

    Files written for ms-swift 3.x and 4.x load unchanged, with ms-swift installed or not. A plugin's
    directory is appended to `sys.path`, so that it may import files that lie beside it.

    Raises:
        RewardError: A file does not exist or raises while it is imported; the message names file and line.
    """
    for file in on_this_machine(files):
        _load(Path(file))


def _load(path: Path) -> None:
    if not path.is_file():
        raise RewardError(
            f"--external_plugins: there is no file {path}. Relative paths start at the current directory."
        )
    before = dict(registry.orms)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    others: dict[str, dict[str, Any]] = {}
    if real_swift_installed():
        theirs = _real_orms()
        _execute(path)
        registered = {name: entry for name, entry in _real_orms().items() if theirs.get(name) is not entry}
        registry.orms.update(registered)
    else:
        with swift_stand_ins() as others:
            _execute(path)
    for name in sorted(name for name in before if registry.orms.get(name) is not before[name]):
        _log.warning("%s replaces the reward function `%s`", path, name)
    for name, entries in others.items():
        if entries:
            _log.warning(
                "%s registers %s in `%s`, which has no effect on rewards", path, sorted(entries), name
            )


def _real_orms() -> dict[str, Any]:
    """A copy of the registry of the installed ms-swift: `swift.rewards` since 4.0, `swift.plugin` before."""
    module = "swift.rewards" if importlib.util.find_spec("swift.rewards") else "swift.plugin"
    try:
        return dict(importlib.import_module(module).orms)
    except (ImportError, AttributeError) as error:
        raise RewardError(
            f"ms-swift is installed, so plugin files use it, but its reward registry cannot be had: {error}"
        ) from error


def _execute(path: Path) -> None:
    name = f"{registry.PLUGIN_PREFIX}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"--external_plugins: {path} is no Python file; its name has to end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise RewardError(
            f"Plugin {error.filename}:{error.lineno}: {error.msg}: {(error.text or '').strip()}"
        ) from error
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"Plugin {path}:{_line_in(path, error)}: {type(error).__name__}: {error}"
        ) from error


def _line_in(path: Path, error: BaseException) -> int:
    """The last line of the plugin that was being executed, not the line of the library it called."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return (frames[-1].lineno or 0) if frames else 0
