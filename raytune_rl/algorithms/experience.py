"""A generation: trajectories and their rewards, by groups. Pure values; tokens lie elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.advantages import group_advantages, known_rewards
from raytune_rl.protocol.rewards import RewardTable
from raytune_rl.protocol.trajectory import Trajectory


def known_values(scored: RewardTable, weights: Sequence[float]) -> NDArray[np.float64]:
    """Rewards by function, without those of completions on which one of them failed (`known_rewards`)."""
    return known_rewards(scored.values, weights, scored.failed())


@dataclass(frozen=True)
class Experience:
    """Scored trajectories.

    Attributes:
        batch: The trajectories, those of one group together.
        scored: Their rewards by function.
        rewards: The weighted total of each, float64 `[n]`; NaN where there is none.
        greedy: The reward of the likeliest answer to each one's prompt, float64 `[n]`, for a credit that asks
            for it; NaN where there is none.
    """

    batch: list[Trajectory]
    scored: RewardTable
    rewards: NDArray[np.float64]
    greedy: NDArray[np.float64] | None = None

    @property
    def groups(self) -> list[int]:
        """The distinct groups, in order."""
        return list(dict.fromkeys(t.group for t in self.batch))

    @property
    def group_ids(self) -> list[int]:
        """The group of each trajectory."""
        return [t.group for t in self.batch]

    def informative(self, rewards: NDArray[np.float64] | None = None) -> set[int]:
        """Groups with at least two different rewards: only these teach anything.

        Args:
            rewards: What must differ, float64 `[n]`; None: `rewards`.
        """
        if not self.batch:
            return set()
        grouped = group_advantages(self.rewards if rewards is None else rewards, self.group_ids, "none")
        return {int(g) for g, std in zip(grouped.groups, grouped.group_std, strict=True) if std > 0}

    def unscored(self) -> set[int]:
        """Groups of which no completion has a reward."""
        return set(self.groups) - {
            t.group for t, reward in zip(self.batch, self.rewards, strict=True) if np.isfinite(reward)
        }

    def of_groups(self, chosen: Collection[int]) -> Experience:
        """The part of these groups, in the order it has here."""
        rows = [row for row, t in enumerate(self.batch) if t.group in chosen]
        place = {row: number for number, row in enumerate(rows)}
        scored = replace(
            self.scored,
            values=self.scored.values[rows],
            failures=tuple(replace(f, row=place[f.row]) for f in self.scored.failures if f.row in place),
        )
        greedy = None if self.greedy is None else self.greedy[rows]
        return Experience([self.batch[row] for row in rows], scored, self.rewards[rows], greedy)


def join(parts: Sequence[Experience]) -> Experience:
    """One experience of several, whose groups are numbered anew."""
    batch: list[Trajectory] = []
    failures = []
    groups = 0
    for part in parts:
        failures += [replace(f, row=f.row + len(batch)) for f in part.scored.failures]
        number = {group: groups + k for k, group in enumerate(part.groups)}
        batch += [replace(t, group=number[t.group]) for t in part.batch]
        groups += len(number)
    scored = replace(
        parts[0].scored,
        values=np.concatenate([part.scored.values for part in parts]),
        failures=tuple(failures),
    )
    known = [part.greedy for part in parts if part.greedy is not None]
    greedy = np.concatenate(known) if len(known) == len(parts) else None
    return Experience(batch, scored, np.concatenate([part.rewards for part in parts]), greedy)


@dataclass(frozen=True)
class Filled:
    """A batch of groups with a signal, as far as there were any.

    Attributes:
        kept: The batch, always of the size that was wanted.
        replaced: Groups without a signal that are not in it.
        rounds: Times that groups were drawn.
        without_signal: Groups of the batch that have no signal.
    """

    kept: Experience
    replaced: Experience
    rounds: int
    without_signal: int


def fill_with_signal(
    wanted: int,
    rounds: int,
    draw: Callable[[int, int], Experience],
    informative: Callable[[Experience], set[int]] = Experience.informative,
) -> Filled:
    """Draws groups until `wanted` of them are informative, or the rounds are used up.

    Each round draws as many as are missing. If they do not suffice, the first groups without a signal that
    were drawn fill the batch up.

    Args:
        wanted: Groups.
        rounds: Most times to draw.
        draw: (number of groups, number of the round from 0) -> that many groups.
        informative: Which groups of an experience teach anything.
    """
    good: list[Experience] = []
    dull: list[Experience] = []
    have = used = 0
    while have < wanted and used < rounds:
        drawn = draw(wanted - have, used)
        teaching = informative(drawn)
        good.append(drawn.of_groups(teaching))
        dull.append(drawn.of_groups(set(drawn.groups) - teaching))
        have += len(teaching)
        used += 1
    rest = join(dull)
    filling = set(rest.groups[: wanted - have])
    return Filled(
        kept=join([*good, rest.of_groups(filling)]),
        replaced=rest.of_groups(set(rest.groups) - filling),
        rounds=used,
        without_signal=len(filling),
    )
