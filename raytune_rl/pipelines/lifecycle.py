"""The parts of every training run: a directory, a log, a display, checkpoints, a way to stop it and a way
to go on.
"""

from __future__ import annotations

import math
import os
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
from raytune_rl.errors import CheckpointError
from raytune_rl.pipelines.recovery import FaultLog
from raytune_rl.pipelines.resume_point import ResumePoint
from raytune_rl.redaction import redact_text
from raytune_rl.runtime.signals import HANDLED, set_handlers
from raytune_rl.tracking.best import CheckpointRecord
from raytune_rl.tracking.checkpoints import CheckpointWriter, prune
from raytune_rl.tracking.completions import CompletionLog
from raytune_rl.tracking.html_report import write_report
from raytune_rl.tracking.logger import RunLogger
from raytune_rl.tracking.plots import write_plots
from raytune_rl.tracking.progress import ProgressDisplay
from raytune_rl.tracking.timer import StepTimer
from raytune_rl.tracking.unwritten import forgiven, missing

SHOWN = ("eval_reward", "eval_loss", "eval_token_acc", "eval_rewards/accuracies", "eval_rewards/margins")
"""Held-out metrics that are printed."""
WAITING = Console(stderr=True)
LOGGED_EVERY_S = 10.0
"""Seconds between two lines in a log on how far a stage is."""
STOPPING = "Stopping: the present step is finished{saved} first. Press Ctrl-C again to stop at once.\n"


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
        self.unsaved = 0
        self._best_by, self._greater = best_by, greater_is_better
        self._record = CheckpointRecord.from_state(resume_point.state, resume_point.run_dir)
        self.console = Console()
        self._origin = resume_point
        self.faults = FaultLog(self.dir.faults_jsonl, self.say)
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
            saved = "" if self.config.save_strategy == "no" else " and saved"
            os.write(2, STOPPING.format(saved=saved).encode())

        before = set_handlers(dict.fromkeys(HANDLED, ask))
        try:
            with self.display, self.logger:
                yield
        finally:
            set_handlers(before)

    def ends(self) -> bool:
        """Whether the run ends after the present step: it was the last, or a stop was asked for.

        A loop asks right before it saves and goes by that answer: a stop asked for later ends the next step.
        """
        return self.step >= self.total_steps or self.stop_requested

    def record(self, metrics: Mapping[str, float]) -> None:
        """One optimizer step is done: shows it, and logs it where the user asked for a line. A step with a
        number that is not finite always gets one."""
        self.step += 1
        times = self.timer.finish()
        line = {**metrics, **self.faults.metrics(), **times.metrics()}
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

    def save(self, trained: Saves, state: Mapping[str, Any]) -> Path | None:
        """Writes a checkpoint, whole or not at all, and removes the ones beyond the limit. It may be the best
        one only if these very weights were evaluated.

        Returns:
            The checkpoint; None with --save_strategy no, or where it could not be written in mid-run: that
            is said, and the next one is tried.

        Raises:
            CheckpointError: The last checkpoint of the run could not be written.
            RunInUseError: The directory is another command's by now.
        """
        if self.config.save_strategy == "no":
            return None
        if self._origin.lock is not None:
            self._origin.lock.check()
        metric = self.after.get(self._best_by) if self._evaluated == self.step else None
        record = self._record.after(self.dir.checkpoint(self.step), metric, self._greater)
        writer = CheckpointWriter(self.dir, self.step, self.whole_state(state, record))
        try:
            with writer as path:
                trained.save(path, self.config.save_only_model)
        except CheckpointError as error:
            if self.ends():
                raise
            self.unsaved += 1
            self.say(f"Note: step {self.step}: {error} The run goes on, and tries the next checkpoint.")
            return None
        self._record = record
        with forgiven(self.dir.path):
            prune(self.dir, self.config.save_total_limit, record.best)
        with forgiven(self.dir.images):
            write_plots(self.dir, only=("loss", "reward", "kl"))
        return writer.final

    def whole_state(self, state: Mapping[str, Any], record: CheckpointRecord | None = None) -> dict[str, Any]:
        """A pipeline's state with what the run itself must know again, for trainer_state.json."""
        known = (record or self._record).as_dict()
        return {**state, **known, "first_metrics": self.first_metrics, "before": self.before}

    def finish(self, facts: Mapping[str, Any] | None = None) -> RunResult:
        """Closes the log with its last line, `facts` among it, and gives the result."""
        status = "interrupted" if self.step < self.total_steps else "finished"
        last_line = {"global_step": self.step, "status": status, **self._record.as_dict(), **(facts or {})}
        self.logger.close(last_line)
        with forgiven(self.dir.images):
            write_plots(self.dir)
        with forgiven(self.dir.path / "report.html"):
            self.write_report(status)
        for name, count in missing(self.dir.path).items():
            self.say(f"Note: {name}: {count} line(s) or file(s) could not be written and are missing")
        if self.unsaved:
            self.say(f"Note: {self.unsaved} checkpoint(s) of this run could not be written")
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
