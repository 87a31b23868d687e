"""The parts of every training run: a directory, a log, a display, checkpoints, a way to stop it and a way
to go on.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console

from raytune_rl.config.commands import TrainConfig
from raytune_rl.errors import CheckpointError, RaytuneError
from raytune_rl.redaction import redact, redact_text
from raytune_rl.tracking.best import CheckpointRecord
from raytune_rl.tracking.checkpoints import (
    CheckpointWriter,
    clean_leftovers,
    latest,
    prune,
    read_state,
    step_of,
    supersede_after,
)
from raytune_rl.tracking.completions import CompletionLog
from raytune_rl.tracking.html_report import write_report
from raytune_rl.tracking.logger import RunLogger
from raytune_rl.tracking.plots import write_plots
from raytune_rl.tracking.progress import ProgressDisplay
from raytune_rl.tracking.run_dir import RunDir
from raytune_rl.tracking.sinks import check_sinks
from raytune_rl.tracking.timer import StepTimer

SHOWN = ("eval_reward", "eval_loss", "eval_token_acc", "eval_rewards/accuracies", "eval_rewards/margins")
"""Held-out metrics that are printed."""
WAITING = Console(stderr=True)
LOGGED_EVERY_S = 10.0
"""Seconds between two lines in a log on how far a stage is."""
STOPPING = b"Stopping: the present step is finished and saved first. Press Ctrl-C again to stop at once.\n"


@contextmanager
def stage(what: str) -> Iterator[Callable[[str], None]]:
    """Says what a run is doing while it has no display yet: a spinner on a terminal, a line in a log.

    Gives what takes sentences on how far it is; a log gets one of them now and then.
    """
    if WAITING.is_terminal:
        with WAITING.status(f"{what} ...") as status:
            yield lambda sentence: status.update(f"{what} ... {sentence}")
        return
    print(f"{what} ...", file=sys.stderr, flush=True)
    last = time.monotonic()

    def tell(sentence: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LOGGED_EVERY_S:
            last = time.monotonic()
            print(f"{what}: {sentence}", file=sys.stderr, flush=True)

    yield tell


def note(message: str) -> None:
    """Tells the user a sentence before there is a plan to show it with."""
    WAITING.print(f"Note: {redact_text(message)}", markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class RunResult:
    """The result of a finished (or interrupted) run.

    Attributes:
        run_dir: Everything the run wrote.
        status: "finished" or "interrupted".
        steps: Optimizer steps done, of `total_steps`.
        last_checkpoint: Load it with Transformers, or with PEFT if an adapter was trained.
        best_checkpoint: By the held-out metric, if there was one.
        metrics: Of the last logged step.
        before: Held-out metrics before the first step of the run, if there is held-out data.
        after: The same after the last step.
    """

    run_dir: Path
    status: str
    steps: int
    total_steps: int
    last_checkpoint: Path | None
    best_checkpoint: Path | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run starts: a new directory at step 0, or a checkpoint in its own directory.

    Attributes:
        run_dir: Where to write.
        checkpoint: What to restore; None for a new run.
        state: trainer_state.json of the checkpoint, or empty.
        notices: Sentences for the user.
    """

    run_dir: RunDir
    checkpoint: Path | None
    state: Mapping[str, Any]
    notices: tuple[str, ...]

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return int(self.state.get("global_step", 0))

    @property
    def resume_step(self) -> int | None:
        """The step gone on from, or None for a new run."""
        return None if self.checkpoint is None else self.step


def find_resume_point(config: TrainConfig) -> ResumePoint:
    """Opens the run's directory.

    Raises:
        CheckpointError: The checkpoint asked for is not there or not whole.
        ConfigError: The directory cannot be made, or what --report_to names is not installed.
    """
    check_sinks(config.report_to)
    wanted = config.resume_from_checkpoint
    checkpoint: Path | None = None
    notices: list[str] = []
    if wanted == "auto":
        checkpoint = latest(config.output_dir)
        if checkpoint is None:
            notices.append(
                f"--resume_from_checkpoint auto: no checkpoint under {config.output_dir}, so this run starts "
                "anew"
            )
    elif wanted is not None:
        checkpoint = Path(wanted).expanduser().absolute()
        if not (checkpoint / "trainer_state.json").is_file() and (nested := latest(checkpoint)) is not None:
            checkpoint = nested
    if checkpoint is None:
        run_dir = RunDir.create(config.output_dir, config.add_version)
        run_dir.write_args(config.args())
        return ResumePoint(run_dir, None, {}, tuple(notices))
    state = read_state(checkpoint)
    if not (checkpoint / "optimizer").is_dir():
        raise CheckpointError(
            f"{checkpoint} was saved with --save_only_model true: it has no optimizer state to resume from"
        )
    run_dir = RunDir.open(checkpoint)
    clean_leftovers(run_dir)
    later = supersede_after(run_dir, step_of(checkpoint))
    if later:
        notices.append(f"{len(later)} later checkpoint(s) of this run were set aside as {later[0].name} ...")
    notices.append(f"resuming from {checkpoint}")
    notices += _changed_settings(config, run_dir)
    return ResumePoint(run_dir, checkpoint, state, tuple(notices))


def _changed_settings(config: TrainConfig, run_dir: RunDir) -> list[str]:
    """Settings that differ from those the run began with: allowed, but never unnoticed."""
    before, now = run_dir.read_args(), redact(config.args())
    own = {"resume_from_checkpoint", "output_dir", "add_version", "ray_address"}
    changed = [n for n in sorted(now) if n in before and n not in own and before[n] != now[n]]
    return [f"--{name} is {now[name]!r} now; the run began with {before[name]!r}" for name in changed]


class Saves(Protocol):
    """The content of a checkpoint."""

    def save(self, directory: Path, only_model: bool) -> None:
        """Writes the model, and all else that a resumed run needs unless only the model is wanted."""


class Run:
    """The moving parts around a training loop.

    Args:
        config: Of the run.
        resume_point: Where it starts.
        total_steps: Optimizer steps of the whole run.
        best_by: Held-out metric that chooses the best checkpoint, such as "eval_reward".
        greater_is_better: Its direction.
    """

    def __init__(
        self,
        config: TrainConfig,
        resume_point: ResumePoint,
        total_steps: int,
        best_by: str,
        greater_is_better: bool,
    ) -> None:
        self.config = config
        self.dir = resume_point.run_dir
        self.total_steps = total_steps
        self.step = resume_point.step
        self.started = time.monotonic()
        self.first_metrics: dict[str, float] = dict(resume_point.state.get("first_metrics", {}))
        self.before: dict[str, float] = dict(resume_point.state.get("before", {}))
        self.after: dict[str, float] = {}
        self._evaluated: int | None = None
        self.last_metrics: dict[str, float] = {}
        self.stop_requested = False
        self._best_by, self._greater = best_by, greater_is_better
        self._record = CheckpointRecord.from_state(resume_point.state, resume_point.run_dir)
        self.console = Console()
        self._origin = resume_point
        self.completions = CompletionLog(resume_point.run_dir, resume_step=resume_point.resume_step)

    def say(self, message: Any) -> None:
        """Prints something that stays on the screen, above the live display once there is one."""
        self.console.print(redact_text(message) if isinstance(message, str) else message, markup=False)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Training begins: log, display and clocks start, and from here on the first Ctrl-C or SIGTERM asks
        for a stop instead of tearing the run."""
        resume_point, every = self._origin, self.config.logging_steps
        self.logger = RunLogger(
            resume_point.run_dir,
            self.config.report_to,
            self.total_steps,
            resume_step=resume_point.resume_step,
        )
        self.display = ProgressDisplay(
            self.total_steps, start_step=resume_point.step, logging_steps=every, console=self.console
        )
        self.timer = StepTimer(on_phase=self.display.phase)

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            # Not through the console: the signal may have come in the middle of its own printing.
            os.write(2, STOPPING)

        before = {number: _set_handler(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.display, self.logger:
                yield
        except (RaytuneError, KeyboardInterrupt):
            if self._record.last_model_checkpoint and not self.config.save_only_model:
                last = self._record.last_model_checkpoint
                self.say(f"To go on, add to the same command: --resume_from_checkpoint {last}")
            raise
        finally:
            for number, handler in before.items():
                _set_handler(number, handler)

    def record(self, metrics: Mapping[str, float]) -> None:
        """One optimizer step is done: shows it, and logs it where the user asked for a line. A step with a
        number that is not finite always gets one."""
        self.step += 1
        times = self.timer.finish()
        line = {**metrics, **times.metrics()}
        self.last_metrics = dict(line)
        if not self.first_metrics:
            self.first_metrics = {k: float(v) for k, v in line.items()}
        every = self.step == 1 or self.step % self.config.logging_steps == 0 or self.step == self.total_steps
        strange = [
            name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)
        ]
        if every or strange:
            self.logger.log(self.step, line)
        if norms := [name for name in strange if name.endswith("grad_norm")]:
            self.say(
                f"step {self.step}/{self.total_steps} | {', '.join(norms)} is not finite: the step was left "
                "out, the weights stay as they were"
            )
        self.display.update(self.step, line, times)

    def record_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Held-out metrics, their names beginning with `eval_`."""
        if self.step == 0 and not self.before:
            self.before = dict(metrics)
        self.after, self._evaluated = dict(metrics), self.step
        self.logger.log(self.step, metrics)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k in SHOWN)
        self.say(f"step {self.step}/{self.total_steps} | held out: {shown}")

    def save(self, trained: Saves, state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint, whole or not at all, and removes the ones beyond the limit. It may be the best
        one only if these very weights were evaluated."""
        metric = self.after.get(self._best_by) if self._evaluated == self.step else None
        record = self._record.after(self.dir.checkpoint(self.step), metric, self._greater)
        kept = {**state, **record.as_dict(), "first_metrics": self.first_metrics, "before": self.before}
        writer = CheckpointWriter(self.dir, self.step, kept)
        with writer as path:
            trained.save(path, self.config.save_only_model)
        self._record = record
        prune(self.dir, self.config.save_total_limit, record.best)
        write_plots(self.dir, only=("loss", "reward", "kl"))
        return writer.final

    def finish(self, facts: Mapping[str, Any] | None = None) -> RunResult:
        """Closes the log with its last line, `facts` among it, and gives the result."""
        status = "interrupted" if self.step < self.total_steps else "finished"
        last_line = {"global_step": self.step, "status": status, **self._record.as_dict(), **(facts or {})}
        self.logger.close(last_line)
        write_plots(self.dir)
        self.write_report(status)
        last, best = self._record.last_model_checkpoint, self._record.best_model_checkpoint
        return RunResult(
            run_dir=self.dir.path,
            status=status,
            steps=self.step,
            total_steps=self.total_steps,
            last_checkpoint=Path(last) if last else None,
            best_checkpoint=Path(best) if best else None,
            metrics=self.last_metrics,
            before=self.before,
            after=self.after,
        )

    def write_report(self, status: str) -> None:
        """report.html, with what one wants to know first on top."""
        held_out = [metrics.get(self._best_by) for metrics in (self.before, self.after)]
        facts = {"status": status, "steps": f"{self.step} of {self.total_steps}", "model": self.config.model}
        if held_out[1] is not None:
            facts[self._best_by] = " to ".join(f"{value:.4g}" for value in held_out if value is not None)
        write_report(self.dir, facts)

    @property
    def seconds(self) -> float:
        """Wall time of this process."""
        return time.monotonic() - self.started


def _set_handler(number: int, handler: Any) -> Any:
    """Signals can only be handled in the main thread; elsewhere the caller's own handling stays."""
    import threading

    if threading.current_thread() is threading.main_thread():
        return signal.signal(number, handler)
    return None
