"""The end of a run in one screen: what happened, what became of every prompt, and what to do next."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raytune_rl.tracking.faults import COLUMNS
from raytune_rl.tracking.plan import Section, pairs
from raytune_rl.tracking.text import duration, number


@dataclass(frozen=True)
class PromptCounts:
    """Every prompt dispatched comes back once: finished, filtered or failed, the last two with a reason.
    Where sampling is ahead of the training, an interrupted run leaves some to the run that goes on from it.
    """

    dispatched: int
    finished: int
    filtered: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    ahead: int = 0

    @property
    def unaccounted(self) -> int:
        """Zero in a sound run; negative if prompts came back more than once."""
        ended = self.finished + sum(self.filtered.values()) + sum(self.failed.values())
        return self.dispatched - ended - self.ahead

    def as_dict(self) -> dict[str, Any]:
        """For the log."""
        return {**asdict(self), "unaccounted": self.unaccounted}

    def rows(self) -> list[tuple[str, str]]:
        rows = [("prompts dispatched", number(self.dispatched)), ("finished", number(self.finished))]
        rows += [("filtered", _with_reasons(self.filtered)), ("failed", _with_reasons(self.failed))]
        if self.ahead:
            rows.append(("asked ahead, not trained on", f"{number(self.ahead)} (in the last checkpoint)"))
        if self.unaccounted:
            rows.append(
                ("UNACCOUNTED FOR", f"{number(self.unaccounted)} (a defect of raytune_rl: please report it)")
            )
        return rows


@dataclass(frozen=True)
class Change:
    """A measure at the beginning and at the end; None where it was not taken."""

    before: float | None
    after: float | None

    def text(self) -> str:
        if self.before is None or self.after is None:
            return f"{number(self.before)} -> {number(self.after)}"
        difference = self.after - self.before
        sign = "+" if difference >= 0 else ""
        return f"{number(self.before)} -> {number(self.after)} ({sign}{number(difference)})"


@dataclass(frozen=True)
class RunSummary:
    """All of the summary; a part that a kind of run does not have stays None or empty and is not shown.

    Attributes:
        title: What ran: `GRPO on <model>, LoRA`.
        status: `finished`, `interrupted`, `failed: ...`.
        steps: Optimizer steps done, of `total_steps`.
        seconds: Wall time of this process.
        changes: label -> first and last: `reward (training)`, `reward (held out)`, `loss`.
        prompts: What became of the prompts.
        quarantined: Bad rows of data set aside.
        reward_failures: Reward function -> failed samples.
        lost_workers: Group -> workers that were lost and replaced.
        faults: A row a loss, under `tracking.faults.COLUMNS`.
        weight_versions: Versions published.
        max_logp_gap: The largest |log-prob by the policy - by the rollout engine| seen, in nats.
        non_finite: Metric -> how often it was NaN or infinite.
        output_dir: The run's directory.
        last_checkpoint: None if none was saved.
        best_checkpoint: None if there was no held-out metric.
        next_commands: label -> command line: resume, infer, export.
        notices: Anything else the user must not miss.
    """

    title: str
    status: str
    steps: int
    total_steps: int
    seconds: float
    output_dir: Path
    changes: Mapping[str, Change] = field(default_factory=dict)
    prompts: PromptCounts | None = None
    quarantined: int = 0
    reward_failures: Mapping[str, int] = field(default_factory=dict)
    lost_workers: Mapping[str, int] = field(default_factory=dict)
    faults: Sequence[tuple[str, ...]] = ()
    weight_versions: int | None = None
    max_logp_gap: float | None = None
    non_finite: Mapping[str, int] = field(default_factory=dict)
    last_checkpoint: Path | None = None
    best_checkpoint: Path | None = None
    next_commands: Mapping[str, str] = field(default_factory=dict)
    notices: Sequence[str] = ()

    def sections(self) -> list[Section]:
        steps = f"{number(self.steps)} of {number(self.total_steps)} in {duration(self.seconds)}"
        result = [("status", self.status), ("optimizer steps", steps)]
        result += [(label, change.text()) for label, change in self.changes.items()]
        out = [
            ("output", str(self.output_dir)),
            ("report", str(Path(self.output_dir) / "report.html")),
            ("last checkpoint", str(self.last_checkpoint or "none was saved")),
        ]
        if self.best_checkpoint is not None:
            out.append(("best checkpoint", str(self.best_checkpoint)))
        sections = [
            Section("Result", result),
            Section("Prompts", self.prompts.rows() if self.prompts is not None else []),
            Section("Health", self._health()),
            Section("Files", out),
        ]
        return [section for section in sections if section.rows]

    def _health(self) -> list[tuple[str, str]]:
        rows = [("rows quarantined", number(self.quarantined))]
        if self.prompts is not None:
            rows.append(("reward failures", _with_reasons(self.reward_failures)))
        if self.lost_workers:
            rows.append(("workers lost and replaced", _with_reasons(self.lost_workers)))
        if self.weight_versions is not None:
            rows.append(("weight versions", number(self.weight_versions)))
        if self.max_logp_gap is not None:
            rows.append(("largest log-prob gap", f"{number(self.max_logp_gap)} (policy vs rollout engine)"))
        if self.non_finite:
            rows.append(("not finite", _with_reasons(self.non_finite)))
        return rows

    def show(self, console: Console) -> None:
        """Prints it. Commands stand on lines of their own, whole whatever the width, to be copied."""
        console.print(Text(self.title, style="bold"))
        for section in self.sections():
            console.print(Text(section.title, style="bold cyan"))
            console.print(Padding(pairs(section.rows), (0, 0, 0, 2)))
        if self.faults:
            console.print(Text("Lost and started anew", style="bold cyan"))
            console.print(Padding(_grid(COLUMNS, self.faults), (0, 0, 0, 2)))
        if self.next_commands:
            console.print(Text("Next", style="bold cyan"))
        for label, command in self.next_commands.items():
            console.print(Text(f"  {label}:\n    {command}"), soft_wrap=True)
        for notice in self.notices:
            console.print(Text(f"Note: {notice}", style="yellow"))

    def text(self, width: int = 100) -> str:
        """Without colour, for a file or a log."""
        buffer = io.StringIO()
        self.show(Console(file=buffer, width=width, color_system=None, force_terminal=False))
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for name in head:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _with_reasons(counts: Mapping[str, int]) -> str:
    """`3 (2 time-out, 1 ValueError)`, the most frequent first."""
    total = number(sum(counts.values()))
    reasons = sorted(((n, reason) for reason, n in counts.items() if n), key=lambda item: (-item[0], item[1]))
    return f"{total} ({', '.join(f'{number(n)} {reason}' for n, reason in reasons)})" if reasons else total
