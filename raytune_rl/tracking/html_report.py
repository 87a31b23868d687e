"""report.html: a run's curves, settings and completions in one file that needs nothing else.

Written from what the run left in its directory, so it can be made again at any time:
`python -m raytune_rl.tracking.html_report RUN_DIR`.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_rl.tracking import faults
from raytune_rl.tracking.files import plain, read_jsonl, write_atomic
from raytune_rl.tracking.plots import file_name, read_scalars
from raytune_rl.tracking.run_dir import RunDir

MOST_COMPLETIONS = 4000
MOST_CHARACTERS = 12_000_000
"""Rows that the page holds; of a longer run, or of longer completions, the best, the worst and the newest."""
_FIRST = (
    "reward", "loss", "eval_reward", "eval_loss", "kl", "completions/mean_length", "reward_std", "grad_norm",
    "token_acc",
)  # fmt: skip
_SHOWN = 6
_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Changed:
    """A prompt whose completions were worth something else at the end than at the beginning.

    Attributes:
        prompt: Its text.
        before, after: Mean reward of its completions, when it was first and when it was last sampled.
        first, last: The best completion of either time, with the step.
    """

    prompt: str
    before: float
    after: float
    first: Mapping[str, Any]
    last: Mapping[str, Any]

    @property
    def change(self) -> float:
        return self.after - self.before


def most_changed(rows: Sequence[Mapping[str, Any]], count: int = 20) -> list[Changed]:
    """Prompts that were sampled at two or more steps, by how much their mean reward changed, either way."""
    by_prompt: dict[tuple[str, ...], dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if _finite(row.get("reward")):
            prompt = (str(row["prompt"]), *row.get("media", ()))  # the same question, of another picture
            by_prompt.setdefault(prompt, {}).setdefault(int(row["step"]), []).append(row)
    changed = []
    for prompt, steps in by_prompt.items():
        if len(steps) > 1:
            first, last = steps[min(steps)], steps[max(steps)]
            changed.append(Changed(prompt[0], _mean(first), _mean(last), _best(first), _best(last)))
    return sorted(changed, key=lambda c: -abs(c.change))[:count]


def keep(
    rows: Sequence[Mapping[str, Any]], most: int = MOST_COMPLETIONS, characters: int = MOST_CHARACTERS
) -> list[Mapping[str, Any]]:
    """All rows, or the third with the best rewards, that with the worst and that with the newest steps, in
    their order; rows without a reward count as the worst. Rows of mean length then have about `characters`.
    """
    written = sum(len(row["prompt"]) + len(row["completion"]) for row in rows)
    most = min(most, characters * len(rows) // max(written, 1))
    if len(rows) <= most:
        return list(rows)
    part = max(most // 3, 1)
    ranked = sorted(range(len(rows)), key=lambda i: _worth(rows[i]))
    chosen = {*ranked[:part], *ranked[-part:], *range(len(rows) - part, len(rows))}
    return [rows[i] for i in sorted(chosen)]


def write_report(run_dir: RunDir, summary: Mapping[str, Any] | None = None) -> Path:
    """Writes report.html and returns its path.

    Args:
        run_dir: The run; its pictures, log, settings and completions are read.
        summary: Facts to stand on top, such as the status; None for those of the log's last line.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    rows = [row for row in read_jsonl(run_dir.completions_jsonl) if "completion" in row]
    kept = keep(rows)
    scalars = read_scalars(run_dir)
    order = [n for n in _FIRST if n in scalars] + sorted(n for n in scalars if n not in _FIRST)
    curves = [(name, data) for name in order if (data := _picture(run_dir, name))]
    settings = run_dir.read_args() if run_dir.args_json.is_file() else {}
    # Autoescaped: what a model writes into a completion is text here and never markup.
    page = Environment(
        loader=PackageLoader("raytune_rl.tracking", "."),
        autoescape=select_autoescape(default_for_string=True, default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(_TEMPLATE)
    text = page.render(
        name=run_dir.path.name,
        summary=dict(_end_of(run_dir) if summary is None else summary),
        main=curves[:_SHOWN],
        others=curves[_SHOWN:],
        settings={key: json.dumps(value, ensure_ascii=False) for key, value in sorted(settings.items())},
        faults=faults.table(faults.read(run_dir.faults_jsonl)),
        fault_columns=faults.COLUMNS,
        total=len(rows),
        shown=len(kept),
        changed=most_changed(rows),
        # Inside a script element "</" would end it, whatever the escaping.
        completions=json.dumps(plain(kept), ensure_ascii=False).replace("<", "\\u003c"),
    )
    path = run_dir.path / "report.html"
    write_atomic(path, text)
    return path


def _end_of(run_dir: RunDir) -> dict[str, Any]:
    """Status and steps as a finished run has logged them; nothing of one that was cut off."""
    ends = [row for row in read_jsonl(run_dir.logging_jsonl) if "status" in row]
    return {"status": ends[-1]["status"], "steps": ends[-1].get("global_step")} if ends else {}


def _picture(run_dir: RunDir, name: str) -> str | None:
    path = run_dir.images / f"{file_name(name)}.png"
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _worth(row: Mapping[str, Any]) -> float:
    return float(row["reward"]) if _finite(row.get("reward")) else -math.inf


def _best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(rows, key=_worth)


def _mean(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(row["reward"]) for row in rows) / len(rows)


if __name__ == "__main__":
    print(write_report(RunDir(Path(sys.argv[1]).absolute())))
