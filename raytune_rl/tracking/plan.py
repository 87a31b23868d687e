"""The plan of a run, shown before anything heavy starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raytune_rl.redaction import redact_text
from raytune_rl.tracking.text import number


@dataclass(frozen=True)
class GroupPlan:
    """One group of actors.

    Attributes:
        role: `policy`, `rollout`...
        actors: How many to begin with.
        cpus: CPUs of each actor.
        gpus: GPUs of each actor; a fraction where groups share a GPU.
        placement: In words: `8 per node`, `with policy`...
        what: What runs inside: `DeepSpeed ZeRO-2, bf16`.
    """

    role: str
    actors: int
    cpus: float
    gpus: float
    placement: str = ""
    what: str = ""


@dataclass(frozen=True)
class GenerationPlan:
    """The arithmetic of online RL, once; all counts are of the whole cluster.

    Attributes:
        prompts_per_generation: Distinct prompts sent to the rollout group at a time.
        completions_per_prompt: `num_generations`.
        optimizer_steps_per_generation: Steps that one generation's completions are trained for.
        optimizer_steps: Of the whole run.
        max_prompt_tokens: None where prompts are not limited.
        max_completion_tokens: `max_completion_length`.
    """

    prompts_per_generation: int
    completions_per_prompt: int
    optimizer_steps_per_generation: int
    optimizer_steps: int
    max_prompt_tokens: int | None
    max_completion_tokens: int

    @property
    def completions_per_generation(self) -> int:
        return self.prompts_per_generation * self.completions_per_prompt

    @property
    def generations(self) -> int:
        return -(-self.optimizer_steps // self.optimizer_steps_per_generation)

    @property
    def token_budget(self) -> int:
        """The most completion tokens one generation can make."""
        return self.completions_per_generation * self.max_completion_tokens

    def section(self) -> Section:
        prompt_limit = (
            "no limit"
            if self.max_prompt_tokens is None
            else f"at most {number(self.max_prompt_tokens)} tokens"
        )
        completions = (
            f"{number(self.prompts_per_generation)} prompts x {number(self.completions_per_prompt)} = "
            f"{number(self.completions_per_generation)} completions"
        )
        budget = (
            f"{number(self.token_budget)} completion tokens at most "
            f"({number(self.completions_per_generation)} x {number(self.max_completion_tokens)})"
        )
        steps = f"{number(self.optimizer_steps)} ({number(self.optimizer_steps_per_generation)} a generation)"
        rows = (
            ("each generation", completions),
            ("token budget", budget),
            ("prompts", prompt_limit),
            ("optimizer steps", steps),
            ("in the whole run", f"{number(self.generations * self.completions_per_generation)} completions"),
        )
        return Section("Generation", rows)


@dataclass(frozen=True)
class Section:
    """A titled list of (label, value)."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class RunPlan:
    """All of the plan.

    Attributes:
        title: `GRPO on Qwen/Qwen2.5-7B-Instruct, LoRA`.
        groups: The actor groups.
        sections: Data, generation, training, output: in the order they are shown.
        notices: What the user should know: a default that was chosen for them, a flag that means little here.
    """

    title: str
    groups: Sequence[GroupPlan]
    sections: Sequence[Section]
    notices: Sequence[str] = ()

    def render(self) -> RenderableType:
        """For `rich.print`."""
        parts: list[RenderableType] = [Text(self.title, style="bold"), self._group_table()]
        for section in self.sections:
            parts += [Text(section.title, style="bold cyan"), Padding(pairs(section.rows), (0, 0, 1, 2))]
        parts += [Text(f"Note: {redact_text(notice)}", style="yellow") for notice in self.notices]
        return Group(*parts)

    def _group_table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
        cpus = sum(group.actors * group.cpus for group in self.groups)
        gpus = sum(group.actors * group.gpus for group in self.groups)
        actors = sum(group.actors for group in self.groups)
        columns = (
            ("group", "in all", "left"),
            ("actors", number(actors), "right"),
            ("CPUs each", number(cpus), "right"),
            ("GPUs each", number(gpus), "right"),
            ("placement", "", "left"),
            ("inside", "", "left"),
        )
        for heading, footer, side in columns:
            table.add_column(heading, footer=footer, justify="right" if side == "right" else "left")
        for group in self.groups:
            cells = (
                group.role,
                number(group.actors),
                number(group.cpus),
                number(group.gpus),
                group.placement,
                group.what,
            )
            table.add_row(*(Text(cell) for cell in cells))
        return table


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Labels and values in two columns; text is shown as it is, never read as markup."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", overflow="fold", max_width=36)  # a long path must leave room for its value
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), Text(redact_text(value)))
    return table
