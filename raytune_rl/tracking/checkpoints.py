"""Checkpoints that are whole or absent.

A checkpoint is written into a hidden sibling directory, listed in a manifest, synced to disk and then
renamed. Only the rename makes it a `checkpoint-N`, so a kill at any moment leaves either nothing or all of
it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from raytune_rl.errors import CheckpointError
from raytune_rl.tracking.directories import hidden, parse_hidden, publish, sync_tree
from raytune_rl.tracking.files import plain
from raytune_rl.tracking.run_dir import RESUMABLE_PATTERN, RunDir, version_dirs

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"


class CheckpointWriter:
    """`with CheckpointWriter(run, step, state) as path:` and write the weights into `path`.

    On leaving, `trainer_state.json` (from `state`), a copy of the run's args.json and the manifest are added,
    all is synced, and the directory becomes `checkpoint-<step>`, replacing an earlier one of that step. If
    the body raises (Ctrl-C too), nothing remains. Several processes may write into `path` as long as they are
    done before the body ends. With `rescues` it becomes `rescued-<step>`, which holds no model.

    Attributes:
        final: The path that the checkpoint has once it is whole.

    Raises:
        CheckpointError: The file system refused (full, read-only), or the body wrote its own
            trainer_state.json.
    """

    def __init__(
        self, run_dir: RunDir, step: int, state: Mapping[str, Any] | None = None, rescues: bool = False
    ) -> None:
        self.final = run_dir.rescued(step) if rescues else run_dir.checkpoint(step)
        self._run_dir = run_dir
        self._step = step
        self._state = dict(state or {})
        self._temporary = hidden(self.final, "tmp")

    def __enter__(self) -> Path:
        try:
            self._temporary.mkdir()
        except OSError as error:
            raise _cannot_write(self.final, error) from error
        return self._temporary

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            return
        try:
            self._complete()
            sync_tree(self._temporary)
            publish(self._temporary, self.final)
        except BaseException as failure:
            shutil.rmtree(self._temporary, ignore_errors=True)
            if isinstance(failure, OSError):
                raise _cannot_write(self.final, failure) from failure
            raise

    def _complete(self) -> None:
        state_file = self._temporary / TRAINER_STATE
        if state_file.exists():
            raise CheckpointError(
                f"{TRAINER_STATE} was written into {self.final.name} by the body of CheckpointWriter; "
                "pass it as `state` instead, so that there is one."
            )
        _write_json(state_file, {**self._state, "global_step": self._step})
        if self._run_dir.args_json.exists() and not (self._temporary / "args.json").exists():
            shutil.copyfile(self._run_dir.args_json, self._temporary / "args.json")
        files = {
            p.relative_to(self._temporary).as_posix(): p.stat().st_size for p in _files_in(self._temporary)
        }
        written = datetime.now().astimezone().isoformat(timespec="seconds")
        _write_json(
            self._temporary / MANIFEST, {"format": 1, "step": self._step, "written": written, "files": files}
        )


def verify(path: str | Path) -> dict[str, Any]:
    """Checks that a checkpoint is whole and returns its manifest. Files added later are no fault.

    Raises:
        CheckpointError: It is not there, has no readable manifest, or files are missing or of another size;
            all of them are named.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): int(size) for name, size in manifest["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} has no {MANIFEST}: it was not written by raytune-rl, or is only a part of a checkpoint"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error}") from error
    faults = []
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != size:
            faults.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
    if faults:
        raise CheckpointError(f"{path} is not whole: " + "; ".join(faults))
    return manifest


def is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def list_checkpoints(run_dir: RunDir) -> list[Path]:
    """The whole checkpoints of a run, oldest step first."""
    return [path for path in run_dir.checkpoints if is_whole(path)]


def latest(directory: str | Path) -> Path | None:
    """The newest whole checkpoint of a run directory, or else of the newest run under it that has one.

    This is what `--resume_from_checkpoint auto` means. None when there is no whole checkpoint at all.
    """
    directory = Path(directory).expanduser().absolute()
    for candidate in [directory, *version_dirs(directory)]:
        if whole := list_checkpoints(RunDir(candidate)):
            return whole[-1]
    return None


def step_of(path: Path) -> int:
    """N of `checkpoint-N`.

    Raises:
        CheckpointError: The directory is not named like a checkpoint.
    """
    match = RESUMABLE_PATTERN.match(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint: its name should be checkpoint-N")
    return int(match.group(1))


def read_state(path: Path) -> dict[str, Any]:
    """`trainer_state.json` of a whole checkpoint.

    Raises:
        CheckpointError: The checkpoint is not whole.
    """
    verify(path)
    return json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))


def clean_leftovers(run_dir: RunDir) -> list[Path]:
    """Removes what a kill during a save left, and returns it. Call at the start of a run, before any save.

    If the kill fell between setting an old checkpoint-N aside and renaming the new one, the old one is put
    back.
    """
    removed = []
    for path in sorted(run_dir.path.iterdir()):
        parsed = parse_hidden(path)
        if parsed is None or not RESUMABLE_PATTERN.match(parsed[0].name):
            continue
        final, kind = parsed
        if kind == "old" and not final.exists() and is_whole(path):
            path.rename(final)
            continue
        shutil.rmtree(path)
        removed.append(path)
    return removed


def supersede_after(run_dir: RunDir, step: int) -> list[Path]:
    """Renames checkpoints later than `step` to `superseded-checkpoint-N-<time>` and returns the new paths.

    For a resume from an earlier checkpoint: the later ones belong to a history that the run is leaving, and
    neither `latest` nor `prune` may take them for its own. They are kept; deleting them is the user's choice.
    """
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    moved = []
    for path in run_dir.checkpoints:
        if step_of(path) > step:
            moved.append(path.rename(path.with_name(f"superseded-{path.name}-{stamp}")))
    return moved


def prune(run_dir: RunDir, save_total_limit: int | None, keep: Path | None = None) -> list[Path]:
    """Removes the oldest checkpoints beyond `save_total_limit` and returns their paths. Call after a save.

    The newest whole one and `keep` (the best) always stay, and count towards the limit; None or 0 is no
    limit. Checkpoints that are not whole are left for the user to look at.
    """
    if not save_total_limit or save_total_limit < 0:
        return []
    whole = list_checkpoints(run_dir)
    kept_name = keep.name if keep is not None else None
    surplus = len(whole) - save_total_limit
    removed: list[Path] = []
    for path in whole[:-1]:
        if len(removed) >= surplus:
            break
        if path.name == kept_name:
            continue
        # Deleting takes time: under its own name a half-deleted checkpoint could be met by a reader.
        shutil.rmtree(path.rename(hidden(path, "tmp")))
        removed.append(path)
    return removed


def _files_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(plain(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _cannot_write(final: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{final} could not be saved: {error.strerror or error} ({error.filename or final.parent}). "
        "Nothing of it remains; earlier checkpoints are untouched."
    )
