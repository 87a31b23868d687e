"""`raytune-rl algorithms`: what the registries of losses and credits hold. No Ray, no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from rich import box
from rich.console import Console
from rich.table import Table

from raytune_rl.algorithms.credit.base import CreditKind, credit_names, get_credit
from raytune_rl.algorithms.policy_loss import PolicySettings
from raytune_rl.algorithms.registry import Loss, get_loss, loss_names
from raytune_rl.config.algorithm_list import AlgorithmsConfig
from raytune_rl.config.base import Options
from raytune_rl.config.commands import PPOConfig, PreferenceConfig, RLHFConfig, SFTConfig
from raytune_rl.config.flags import flags_of
from raytune_rl.config.ppo import TWINS
from raytune_rl.config.preference import READS
from raytune_rl.pipelines.objective import PREFERENCES

HEADINGS = ("name", "kind", "asked for by", "paper", "flags of its own")


@dataclass(frozen=True)
class Row:
    """One algorithm.

    Attributes:
        name: In the registry.
        kind: "loss of online RL", "credit", ...
        asked_for: The flag and value that choose it.
        paper: Where it comes from.
        flags: Of its own: those of every loss of online RL are left out.
    """

    name: str
    kind: str
    asked_for: str
    paper: str
    flags: tuple[str, ...]


def rows() -> list[Row]:
    """Everything that the registries hold and a command can ask for, plugins' included."""
    return [*_losses(), *_credits()]


def _losses() -> Iterator[Row]:
    for name in loss_names():
        loss = get_loss(name)
        if loss.is_online and name != "ppo":
            yield _row(loss, "loss of online RL", f"rlhf --loss_type {name}", RLHFConfig)
    yield _row(get_loss("ppo"), "loss of online RL", "rlhf --rlhf_type ppo", PPOConfig, only={"epsilon"})
    yield _row(get_loss("ppo_value"), "loss of a critic", "rlhf --rlhf_type ppo", PPOConfig)
    for asked, (_, name, _) in PREFERENCES.items():
        kind = "loss of preferences"
        yield _row(
            get_loss(name), kind, f"rlhf --rlhf_type {asked}", PreferenceConfig, only=set(READS[asked])
        )
    yield _row(get_loss("sft"), "loss of supervised fine-tuning", "sft", SFTConfig)


def _row(loss: Loss, kind: str, asked_for: str, config: type[Options], only: set[str] | None = None) -> Row:
    shared = {one.name for one in fields(PolicySettings)} if loss.is_online else set()
    own = [one.name for one in fields(loss.settings_type) if one.name not in shared]
    flags = [name for name in own if name in flags_of(config) and (only is None or name in only)]
    if config is PPOConfig:
        flags = [TWINS.get(name, name) for name in flags]
    return Row(loss.name, kind, asked_for, loss.paper, tuple(flags))


def _credits() -> Iterator[Row]:
    for name in credit_names():
        kind = get_credit(name)
        config = PPOConfig if name == "gae" else RLHFConfig
        asked_for = "--rlhf_type ppo" if name == "gae" else f"--advantage_estimator {name}"
        yield Row(name, "credit", f"rlhf {asked_for}", kind.paper, tuple(_credit_flags(kind, config)))


def _credit_flags(kind: CreditKind, config: type[Options]) -> Iterator[str]:
    for one in fields(kind.make):
        if one.name not in kind.fixed and one.name in flags_of(config):
            yield one.name


def markdown(table: Iterable[Row]) -> str:
    """The table of the README, with a line break at its end."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += [f"| {' | '.join(_cells(row, quote='`'))} |" for row in table]
    return "\n".join(lines) + "\n"


def _cells(row: Row, quote: str = "") -> tuple[str, ...]:
    flags = " ".join(f"{quote}--{name}{quote}" for name in row.flags)
    return f"{quote}{row.name}{quote}", row.kind, f"{quote}{row.asked_for}{quote}", row.paper, flags


def run(config: AlgorithmsConfig, console: Console | None = None) -> list[Row]:
    """Prints the list."""
    found = rows()
    if config.format == "markdown":
        print(markdown(found), end="")
        return found
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        shown.add_column(heading, no_wrap=heading == "name", overflow="fold")
    for row in found:
        shown.add_row(*_cells(row))
    (console or Console()).print(shown)
    return found
