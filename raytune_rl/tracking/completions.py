"""What the policy said: completions.jsonl, one row a completion, and a small table of it for the console."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from raytune_rl.tracking.files import Truncation, in_short, json_line, truncate_jsonl
from raytune_rl.tracking.run_dir import RunDir
from raytune_rl.tracking.text import number


@dataclass(frozen=True)
class CompletionRow:
    """One completion and what became of it.

    Attributes:
        step: The optimizer step that it was sampled for.
        prompt: As text, after the chat template.
        completion: As text.
        tokens: Completion length in tokens.
        rewards: Each reward function's score; None where the function failed or abstained.
        reward: The weighted total; None if there is none.
        advantage: None where the completion was filtered before advantages.
        weight_version: The version that sampled its first token.
        finish_reason: `stop`, `length`...
        extra: Further columns (solution, prompt id...); a name of the above is refused.
    """

    step: int
    prompt: str
    completion: str
    tokens: int
    rewards: Mapping[str, float | None]
    reward: float | None
    advantage: float | None
    weight_version: int
    finish_reason: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "extra"}
        if clash := own.keys() & self.extra.keys():
            raise ValueError(f"extra columns of a completion hide its own: {', '.join(sorted(clash))}")
        return {**own, **self.extra}


class CompletionLog:
    """Appends rows to completions.jsonl, flushed with each call.

    Args:
        run_dir: Where to.
        resume_step: On resume, rows of later steps and a torn last row are dropped first.

    Attributes:
        truncation: What the resume dropped.
    """

    def __init__(self, run_dir: RunDir, *, resume_step: int | None = None) -> None:
        self.truncation = Truncation(0, 0, 0)
        if resume_step is not None:
            self.truncation = truncate_jsonl(
                run_dir.completions_jsonl,
                lambda row: isinstance(row.get("step"), int) and row["step"] <= resume_step,
            )
        self._file = run_dir.completions_jsonl.open("a", encoding="utf-8")

    def __enter__(self) -> CompletionLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, rows: Iterable[CompletionRow]) -> None:
        self._file.writelines(json_line(row.as_dict(), in_short) for row in rows)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def best_and_worst(rows: Sequence[CompletionRow], count: int = 2, max_chars: int = 160) -> Table:
    """The `count` best and worst completions by total reward; those without a finite reward count as the
    worst.

    Text is cut to `max_chars` in the middle, and shown with line breaks as signs and control characters
    removed: what a model writes must not steer the terminal.
    """
    ranked = sorted(rows, key=_rank, reverse=True)
    best = ranked[:count]
    worst = ranked[max(len(ranked) - count, len(best)) :]
    table = Table(box=box.SIMPLE_HEAD, title="Completions: best and worst", title_justify="left", expand=True)
    for heading, right in (("", False), ("reward", True), ("adv.", True), ("tokens", True), ("end", False)):
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    for kind, group, style in (("best", best, "green"), ("worst", worst, "red")):
        for row in group:
            table.add_row(
                Text(kind, style=style),
                number(row.reward),
                number(row.advantage),
                number(row.tokens),
                Text(_shown(row.finish_reason, 12)),
                Text(_shown(row.prompt, max_chars)),
                Text(_shown(row.completion, max_chars)),
            )
    return table


def _rank(row: CompletionRow) -> float:
    return row.reward if row.reward is not None and math.isfinite(row.reward) else -math.inf


def _shown(text: str, max_chars: int) -> str:
    clean = "".join("⏎" if c == "\n" else c for c in text if c == "\n" or c.isprintable())
    if len(clean) <= max_chars:
        return clean
    half = (max_chars - 1) // 2
    return f"{clean[: max_chars - 1 - half]}…{clean[-half:]}"
