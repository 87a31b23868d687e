"""Reward models as the pipelines see them: completions in, scores out, beside those of reward functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from raytune_rl.groups.fleet import gather_scores
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rewards import RewardTable, TrainerState
from raytune_rl.protocol.rows import RowsOf
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import fetch_all


class Scorer(Protocol):
    """Whoever can say what completions are worth."""

    def score(
        self, trajectories: Sequence[Trajectory], prompts: PromptSet, state: TrainerState
    ) -> RewardTable:
        """One row a trajectory, one column a reward."""
        ...


class RewardModelGroup:
    """Workers that each hold every reward model; the completions are shared out among them."""

    def __init__(self, group: WorkerGroup) -> None:
        self.workers = group

    def empty_cache(self) -> None:
        """Gives back what the workers' allocators keep. Their weights stay: they score beside the engines."""
        self.workers.call("empty_cache", what="giving memory back")

    def score(
        self, trajectories: Sequence[Trajectory], prompts: PromptSet, state: TrainerState
    ) -> RewardTable:
        """Scores every trajectory, the longest spread evenly over the workers."""
        by_length = np.argsort([-t.length for t in trajectories], kind="stable")
        pending, members = [], []
        for rank in range(len(self.workers)):
            share = by_length[rank :: len(self.workers)]
            if not len(share):
                continue
            own = [trajectories[number] for number in share]
            dialogues = [t.dialogue for t in own if t.dialogue is not None]
            call = self.workers.submit(
                rank,
                "score",
                RowsOf.at([t.text for t in own]),
                [prompts.extra],
                [t.prompt for t in own],
                RowsOf.at(dialogues) if dialogues else None,
                state,
                what=f"scoring {len(own)} completions",
            )
            pending.append(call)
            members.append(share)
        return gather_scores(fetch_all(pending), members, len(trajectories))


class NoRewards:
    """For a run that learns from teachers alone: every completion is worth 0."""

    def score(
        self, trajectories: Sequence[Trajectory], prompts: PromptSet, state: TrainerState
    ) -> RewardTable:
        """A table without a column."""
        return RewardTable((), (), np.zeros((len(trajectories), 0)), ())


class Together:
    """Several scorers as one: their columns side by side, in the order of `--reward_weights`."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self._scorers = scorers

    def score(
        self, trajectories: Sequence[Trajectory], prompts: PromptSet, state: TrainerState
    ) -> RewardTable:
        """Scores of all of them."""
        parts = [scorer.score(trajectories, prompts, state) for scorer in self._scorers]
        failures = [failure for part in parts for failure in part.failures]
        return replace(
            parts[0],
            labels=tuple(label for part in parts for label in part.labels),
            names=tuple(name for part in parts for name in part.names),
            values=np.concatenate([part.values for part in parts], axis=1),
            failures=tuple(sorted(failures, key=lambda failure: failure.row)),
            one_by_one={name: why for part in parts for name, why in part.one_by_one.items()},
        )
