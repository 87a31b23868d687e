"""The run's log: a line of JSON each time, in ms-swift's shape and names, and its scalars to other sinks."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from raytune_rl.tracking.files import Truncation, json_line, truncate_jsonl
from raytune_rl.tracking.line_file import LineFile
from raytune_rl.tracking.run_dir import RunDir
from raytune_rl.tracking.sinks import open_sinks
from raytune_rl.tracking.text import duration
from raytune_rl.tracking.unwritten import forgiven

STEP_KEY = "global_step/max_steps"
NON_FINITE_KEY = "non_finite"


class RunLogger:
    """Appends to logging.jsonl and to the sinks of `report_to`. What one of them refuses is counted
    (`tracking.unwritten`).

    Args:
        run_dir: Where to.
        report_to: Any of `tensorboard`, `wandb`, `swanlab`; `none` or empty for logging.jsonl alone.
        total_steps: Optimizer steps of the whole run, for `global_step/max_steps` and the remaining time.
        resume_step: None for a new run. On resume the step gone on from: lines of later steps, the final line
            of an earlier end, and a line torn by a kill are dropped first.
        clock: Seconds, monotonic.

    Attributes:
        truncation: What the resume dropped from logging.jsonl.
        non_finite: How often each metric was NaN or infinite in this process.

    Raises:
        ConfigError: A sink is unknown or not installed.
    """

    def __init__(
        self,
        run_dir: RunDir,
        report_to: Sequence[str] | str,
        total_steps: int,
        *,
        resume_step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        names = [report_to] if isinstance(report_to, str) else list(report_to)
        self._sinks = open_sinks(names, run_dir, resume_step)
        self._total_steps = total_steps
        self._first_step = resume_step or 0
        self._clock = clock
        self._start = clock()
        self._closed = False
        self.truncation = Truncation(0, 0, 0)
        self.non_finite: Counter[str] = Counter()
        if resume_step is not None:
            self.truncation = truncate_jsonl(run_dir.logging_jsonl, lambda row: _belongs(row, resume_step))
        self._file = LineFile(run_dir.logging_jsonl)
        self._path = run_dir.path

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._shut()

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Writes one line and returns it as it was written.

        Numbers (numpy's and one-element tensors too) also go to the sinks; text stays in the line. A NaN or
        infinity is written as null, named in the line's `non_finite` and counted. The metrics' own keys win
        over the times that the logger adds.

        Args:
            step: The optimizer step that the metrics belong to, from 1.
            metrics: By their ms-swift names; held-out ones begin with `eval_`.
        """
        values = {name: _scalar(value) for name, value in metrics.items()}
        bad = [
            name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)
        ]
        self.non_finite.update(bad)
        line = {**values, STEP_KEY: f"{step}/{self._total_steps}"}
        for name, value in self._times(step).items():
            line.setdefault(name, value)
        if bad:
            line[NON_FINITE_KEY] = bad
        self._file.append([json_line(line)])
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for sink in self._sinks:
            with forgiven(self._path / type(sink).__name__, Exception):
                sink.write(step, numbers)
        return line

    def close(self, summary: Mapping[str, Any]) -> None:
        """Writes the final line (`global_step`, `last_model_checkpoint`...) and closes all. Once only."""
        if self._closed:
            return
        line = dict(summary)
        if self.non_finite:
            line.setdefault(NON_FINITE_KEY, dict(self.non_finite))
        self._file.append([json_line(line)])
        self._shut()

    def _times(self, step: int) -> dict[str, Any]:
        elapsed = self._clock() - self._start
        done = step - self._first_step
        if done <= 0:
            return {"elapsed_time": duration(elapsed)}
        pace = elapsed / done
        return {
            "elapsed_time": duration(elapsed),
            "remaining_time": duration(pace * max(self._total_steps - step, 0)),
            "train_speed(s/it)": round(pace, 6),
        }

    def _shut(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._file.close()
        for sink in self._sinks:
            with forgiven(self._path / type(sink).__name__, Exception):
                sink.close()


def line_step(row: Mapping[str, Any]) -> int | None:
    """The step of a line of logging.jsonl; None for the final line, which has no `global_step/max_steps`."""
    text = row.get(STEP_KEY)
    if not isinstance(text, str):
        return None
    try:
        return int(text.partition("/")[0])
    except ValueError:
        return None


def _belongs(row: Mapping[str, Any], resume_step: int) -> bool:
    step = line_step(row)
    return step is not None and step <= resume_step


def _scalar(value: Any) -> Any:
    """numpy scalars and one-element tensors as Python numbers, without importing either library."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "size", 1) != 0 else value
