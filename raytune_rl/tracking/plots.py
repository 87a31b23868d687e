"""One picture a scalar, drawn from logging.jsonl. Also `python -m raytune_rl.tracking.plots RUN_DIR`."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_rl.tracking.files import read_jsonl
from raytune_rl.tracking.logger import line_step
from raytune_rl.tracking.run_dir import RunDir
from raytune_rl.tracking.sinks import tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 0.9
# These are settings or running averages, not noisy measurements: a smoothed learning rate would be a wrong
# one.
_EXACT = {"learning_rate", "epoch", "memory(GiB)", "weight_store(GiB)", "train_speed(s/it)"}
_SECONDS = ("profiling/", "step_time")
_RAW, _SMOOTH, _HELD_OUT = "#9dbfe0", "#1f5a96", "#c2571a"
_AXES = (0.12, 0.12, 0.85, 0.78)
"""Where they lie in any picture: left, bottom, width, height, of the whole. Margins of matplotlib's choosing
take as long again as all else."""


@dataclass(frozen=True)
class Series:
    """One scalar over the run: steps, and values (NaN where the log has null)."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


def read_scalars(run_dir: RunDir) -> dict[str, Series]:
    """Every numeric metric of logging.jsonl by name; a step that was logged twice keeps its last value."""
    points: dict[str, dict[int, float]] = {}
    numeric: set[str] = set()
    for row in read_jsonl(run_dir.logging_jsonl):
        step = line_step(row)
        if step is None:
            continue
        for name, value in row.items():
            if value is None:
                points.setdefault(name, {})[step] = math.nan
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                points.setdefault(name, {})[step] = float(value)
                numeric.add(name)
    ordered = {name: sorted(points[name].items()) for name in points if name in numeric}
    return {
        name: Series(tuple(s for s, _ in rows), tuple(v for _, v in rows)) for name, rows in ordered.items()
    }


def smooth(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """TensorBoard's exponential moving average, corrected for its start at zero; a NaN stays NaN."""
    average, seen = 0.0, 0
    result = []
    for value in values:
        if not math.isfinite(value):
            result.append(math.nan)
            continue
        seen += 1
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**seen))
    return result


def write_plots(run_dir: RunDir, only: Collection[str] | None = None) -> list[Path]:
    """Draws images/*.png and returns the paths.

    A training scalar is drawn faintly as it was logged and boldly smoothed; where `eval_<name>` exists, its
    points are in the same picture, and have one of their own too.

    Args:
        run_dir: The run.
        only: Names as in logging.jsonl; all when None. A picture takes some 0.05 s, so a save may want a few
            of them.
    """
    scalars = read_scalars(run_dir)
    names = [name for name in scalars if only is None or name in only]
    if not names:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run_dir.images.mkdir(exist_ok=True)
    # Figure and canvas directly: pyplot would choose a backend and keep state for the whole process.
    figure = Figure(figsize=(8, 4.5), dpi=110)
    FigureCanvasAgg(figure)
    written = []
    for name in names:
        _draw(figure, run_dir.path.name, name, scalars[name], scalars.get(f"eval_{name}"))
        path = run_dir.images / f"{file_name(name)}.png"
        hidden = path.with_name(f".{path.name}")
        figure.savefig(hidden, format="png")
        hidden.replace(path)
        written.append(path)
    return written


def file_name(name: str) -> str:
    """`rewards/accuracy/mean` -> `train_rewards_accuracy_mean`."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", tag(name)).strip("_")


def _draw(figure: Figure, run: str, name: str, series: Series, held_out: Series | None) -> None:
    from matplotlib.ticker import MaxNLocator

    figure.clear()
    axes = figure.add_axes(_AXES)
    finite = sum(math.isfinite(v) for v in series.values)
    missing = len(series.values) - finite
    noisy = name not in _EXACT and not name.startswith("eval_") and finite >= 5
    marker = "o" if finite < 30 else None
    if noisy:
        axes.plot(
            series.steps,
            series.values,
            color=_RAW,
            linewidth=1,
            marker=marker,
            markersize=3,
            label="each step",
        )
        label = f"smoothed ({SMOOTHING})"
        axes.plot(series.steps, smooth(series.values), color=_SMOOTH, linewidth=2, label=label)
    else:
        color = _HELD_OUT if name.startswith("eval_") else _SMOOTH
        label = "held out" if name.startswith("eval_") else "training"
        axes.plot(
            series.steps, series.values, color=color, linewidth=1.8, marker=marker, markersize=4, label=label
        )
    if held_out is not None:
        (line,) = axes.plot(held_out.steps, held_out.values, "--D", color=_HELD_OUT, label="held out")
        line.set(linewidth=1.2, markersize=5)
    if missing:
        axes.plot([], [], " ", label=f"{missing} not finite")
    unit = " [s]" if name.startswith(_SECONDS) else ""
    axes.set_title(f"{tag(name)}   ({run})", fontsize=11, loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(name.removeprefix("eval_") + unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_lines()) > 1:
        # Above the axes: inside there is no corner that every curve leaves free.
        axes.legend(
            frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.1
        )


if __name__ == "__main__":
    print(f"{len(write_plots(RunDir(Path(sys.argv[1]).absolute())))} pictures written")
