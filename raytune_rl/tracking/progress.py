"""The run as it goes: a live display on a terminal, one plain line at each log elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raytune_rl.tracking.text import duration, number
from raytune_rl.tracking.timer import StepTimer, StepTimes

__all__ = ["ProgressDisplay", "StepTimer", "StepTimes"]

# What is worth a place on the line, in this order, where the run has it; all else is in the log.
SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "eval_reward": "held-out reward",
    "kl": "kl",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "token_acc": "token acc",
    "eval_loss": "held-out loss",
    "completions/mean_length": "length",
    "learning_rate": "lr",
    "tokens_per_second": "tokens/s",
}


class ProgressDisplay:
    """Shows step, times, the main metrics and the split of the step time.

    Args:
        total_steps: Optimizer steps of the whole run.
        start_step: Steps done before this process (resume).
        logging_steps: Without a terminal, a line is printed at the first step of this process, at every
            multiple of this, and at the last step.
        console: Where to; standard output by default.
        live: Force the live display on or off; None decides by terminal and the CI variable.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        logging_steps: int = 1,
        console: Console | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self._total, self._first = total_steps, start_step
        self._every = max(logging_steps, 1)
        self._clock = clock
        self._start = clock()
        self._step = start_step
        self._metrics: dict[str, float] = {}
        self._times: StepTimes | None = None
        self._phase: str | None = None
        in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        wanted = self.console.is_interactive and not in_ci if live is None else live
        self._live = (
            Live(get_renderable=self._render, console=self.console, refresh_per_second=4) if wanted else None
        )

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def __enter__(self) -> ProgressDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._phase = None
            self._live.stop()

    def phase(self, name: str | None) -> None:
        """Sets the present phase of the run in the live display; fits `StepTimer(on_phase=display.phase)`."""
        self._phase = name

    def update(self, step: int, metrics: Mapping[str, Any], times: StepTimes | None = None) -> None:
        """After each step; metrics that are absent keep their last value on the live display."""
        numbers = {
            name: float(metrics[name]) for name in SHOWN if isinstance(metrics.get(name), (int, float))
        }
        self._step, self._times = step, times
        self._metrics.update(numbers)
        if self._live is not None:
            self._live.refresh()
        elif step % self._every == 0 or step in (self._first + 1, self._total):
            self.console.print(self._line(numbers), soft_wrap=True, highlight=False, markup=False)

    def message(self, renderable: RenderableType) -> None:
        """Prints something that stays, above the live display."""
        self.console.print(renderable)

    def _elapsed_and_remaining(self) -> tuple[str, str]:
        elapsed = self._clock() - self._start
        done = self._step - self._first
        remaining = duration(elapsed / done * (self._total - self._step)) if done > 0 else "unknown"
        return duration(elapsed), remaining

    def _line(self, numbers: Mapping[str, float]) -> str:
        parts = [f"step {self._step}/{self._total}", *(f"{label} {text}" for label, text in _pairs(numbers))]
        if self._times is not None:
            parts.append(_split(self._times))
        elapsed, remaining = self._elapsed_and_remaining()
        return " | ".join([*parts, f"elapsed {elapsed}", f"remaining {remaining}"])

    def _render(self) -> RenderableType:
        elapsed, remaining = self._elapsed_and_remaining()
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"step {self._step}/{self._total}", style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._step, width=30),
            Text(f"elapsed {elapsed}, remaining {remaining}", style="dim"),
            Text(f"now: {self._phase}" if self._phase else "", style="cyan"),
        )
        lines: list[RenderableType] = [head]
        if self._metrics:
            parts = [Text.assemble((f"{label} ", "dim"), text) for label, text in _pairs(self._metrics)]
            lines.append(Text("   ").join(parts))
        if self._times is not None:
            lines.append(Text(f"last step {_split(self._times)}", style="dim"))
        return Group(*lines)


def _pairs(numbers: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(label, number(numbers[name])) for name, label in SHOWN.items() if name in numbers]


def _split(times: StepTimes) -> str:
    """`2.31 s (generate 1.20, train 0.80, other 0.31)`; the rest is shown so that nobody has to subtract."""
    parts = [f"{name} {seconds:.2f}" for name, seconds in times.phases.items()] + [f"other {times.other:.2f}"]
    return f"{times.total:.2f} s ({', '.join(parts)})"
