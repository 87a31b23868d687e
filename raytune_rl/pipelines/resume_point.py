"""Where a run starts: in a new directory, or at a checkpoint in its own; and what it leaves if it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_rl.config.commands import TrainConfig
from raytune_rl.errors import CheckpointError, ConfigError, RunInUseError
from raytune_rl.pipelines.matching import differences
from raytune_rl.redaction import redact
from raytune_rl.tracking.checkpoints import (
    clean_leftovers,
    latest,
    list_checkpoints,
    read_state,
    step_of,
    supersede_after,
)
from raytune_rl.tracking.run_dir import RunDir, version_dirs
from raytune_rl.tracking.run_lock import RunLock, locked
from raytune_rl.tracking.sinks import check_sinks

OPTIMIZER = "optimizer"
"""Folder of a checkpoint without which nothing can be gone on from."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a run starts: a new directory at step 0, or a checkpoint in its own directory.

    Attributes:
        run_dir: Where to write.
        checkpoint: What to restore; None for a new run.
        state: trainer_state.json of the checkpoint, or empty.
        notices: Sentences for the user.
        lock: Of the directory, held while the run lives.
    """

    run_dir: RunDir
    checkpoint: Path | None
    state: Mapping[str, Any]
    notices: tuple[str, ...]
    lock: RunLock | None = None

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return int(self.state.get("global_step", 0))

    @property
    def resume_step(self) -> int | None:
        """The step gone on from, or None for a new run."""
        return None if self.checkpoint is None else self.step


@contextmanager
def open_run(config: TrainConfig) -> Iterator[ResumePoint]:
    """Opens the run's directory and holds its lock for the time of the block. If the block fails, by
    whatever error, it is said what can be gone on from.

    Raises:
        CheckpointError: The checkpoint asked for is not there or not whole.
        ConfigError: The directory cannot be made, or what --report_to names is not installed.
        RunInUseError: A command that lives writes there.
    """
    check_sinks(config.report_to)
    with ExitStack() as stack:
        checkpoint, notices = _asked(config)
        resume_point = (
            _new(config, notices, stack) if checkpoint is None else _gone_on(config, checkpoint, stack)
        )
        try:
            yield resume_point
        except (ConfigError, RunInUseError):
            raise
        except BaseException:
            _say_how_to_go_on(config, resume_point.run_dir)
            raise


def _asked(config: TrainConfig) -> tuple[Path | None, tuple[str, ...]]:
    """The checkpoint that the user means, and what is to be said where there is none."""
    asked = config.resume_from_checkpoint
    if asked == "auto":
        return _newest_of_same(config)
    if asked is None:
        return None, ()
    found = Path(asked).expanduser().absolute()
    if not (found / "trainer_state.json").is_file() and (nested := latest(found)) is not None:
        found = nested
    return found, ()


def _newest_of_same(config: TrainConfig) -> tuple[Path | None, tuple[str, ...]]:
    """What `--resume_from_checkpoint auto` means: the newest whole checkpoint of the newest run under
    --output_dir that is of what is asked for now.

    Raises:
        RunInUseError: Such a run lives.
        ConfigError: The directory can hold one run only, and holds another.
    """
    base = Path(config.output_dir).expanduser().absolute()
    notices: list[str] = []
    for directory in [base, *version_dirs(base)]:
        run = RunDir(directory)
        whole = list_checkpoints(run)
        if not whole and not run.args_json.is_file():
            continue
        other = _other_than_asked(config, run)
        if not other:
            RunLock(directory).refuse_if_held()
            if whole:
                return whole[-1], ()
        elif whole:
            why = f"{whole[-1]} is of another run: {'; '.join(other)}"
            if not config.add_version:
                raise ConfigError(
                    f"--resume_from_checkpoint auto: {why}. Choose another --output_dir for this run, or "
                    "name that checkpoint to go on with it all the same."
                )
            notices.append(f"--resume_from_checkpoint auto: {why}. It is left alone")
    what = "no checkpoint of such a run" if notices else "no checkpoint"
    notices.append(
        f"--resume_from_checkpoint auto: {what} under {config.output_dir}, so this run starts anew"
    )
    return None, tuple(notices)


def _other_than_asked(config: TrainConfig, run: RunDir) -> list[str]:
    try:
        return differences(redact(config.args()), run.read_args(), run.read_working_directory())
    except CheckpointError as error:
        return [f"what it trains cannot be told ({error})"]


def _new(config: TrainConfig, notices: tuple[str, ...], stack: ExitStack) -> ResumePoint:
    """A run in a new directory, or in one that holds none yet."""
    base = Path(config.output_dir).expanduser().absolute()
    if not config.add_version and base.is_dir():
        lock = stack.enter_context(locked(base))
        run_dir = RunDir.create(base, add_version=False)
    else:
        run_dir = RunDir.create(base, config.add_version)
        lock = stack.enter_context(locked(run_dir.path))
    run_dir.write_args(config.args())
    return ResumePoint(run_dir, None, {}, notices, lock)


def _gone_on(config: TrainConfig, checkpoint: Path, stack: ExitStack) -> ResumePoint:
    """A run that goes on in its own directory."""
    read_state(checkpoint)
    run_dir = RunDir.open(checkpoint)
    lock = stack.enter_context(locked(run_dir.path))
    state = read_state(checkpoint)  # under the lock: until now another command could change it
    if not (checkpoint / OPTIMIZER).is_dir():
        raise CheckpointError(
            f"{checkpoint} was saved with --save_only_model true: it has no optimizer state to resume from"
        )
    clean_leftovers(run_dir)
    notices = []
    if later := supersede_after(run_dir, step_of(checkpoint)):
        notices.append(f"{len(later)} later checkpoint(s) of this run were set aside as {later[0].name} ...")
    notices.append(f"resuming from {checkpoint}")
    notices += _changed_settings(config, run_dir)
    return ResumePoint(run_dir, checkpoint, state, tuple(notices), lock)


def _changed_settings(config: TrainConfig, run_dir: RunDir) -> list[str]:
    """Settings that differ from those the run began with: allowed, but never unnoticed."""
    before, now = run_dir.read_args(), redact(config.args())
    own = {"resume_from_checkpoint", "output_dir", "add_version", "ray_address"}
    changed = [n for n in sorted(now) if n in before and n not in own and before[n] != now[n]]
    return [f"--{name} is {now[name]!r} now; the run began with {before[name]!r}" for name in changed]


def _say_how_to_go_on(config: TrainConfig, run_dir: RunDir) -> None:
    """One line, whole also on a narrow terminal, so that it can be copied."""
    with contextlib.suppress(OSError, CheckpointError):
        resumable = [p for p in list_checkpoints(run_dir) if (p / OPTIMIZER).is_dir()]
        if resumable:
            print(f"To go on, add to the same command: --resume_from_checkpoint {resumable[-1]}", flush=True)
