"""Engines and a trainer that sleep for scripted times behind the interfaces of the real ones, so that what is
measured is the controller alone: `pipelines.online` with its collectors, buffer, rewards, log.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from raytune_rl.config import RLHFConfig
from raytune_rl.groups.start import OnlineGroups
from raytune_rl.protocol.data import Account, PromptSet, SourceCounts
from raytune_rl.protocol.rewards import RewardTable, TrainerState
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.tickets import Finished, FleetLoad, InFlight, Outcome, ServeReport, Ticket
from raytune_rl.protocol.train import StepReport
from raytune_rl.protocol.trajectory import EpisodeFacts, EpisodeRequest, Trajectory
from raytune_rl.protocol.weights import Manifest


class SleepingFleet:
    """An engine that samples up to `slots` completions at once, each token of each in `token_s`; who comes
    first begins first.

    Args:
        slots: Completions at once.
        token_s: Of one token, seconds.
        length: Tokens of a completion, by its seed.
        load_s: New weights take so long.
    """

    engines = 1

    def __init__(self, slots: int, token_s: float, length: Callable[[int], int], load_s: float) -> None:
        self._free = [0.0] * slots
        self._token_s, self._length, self._load_s = token_s, length, load_s
        self._due: list[tuple[float, Ticket, EpisodeRequest, int]] = []
        self._version = self._tickets = 0
        self._idle_s, self._busy_until = 0.0, time.monotonic()

    def submit(self, request: EpisodeRequest, prompts: PromptSet, *, evaluation: bool = False) -> Ticket:
        now, end = time.monotonic(), 0.0
        self._idle_s += max(now - self._busy_until, 0.0)
        for seed in request.seeds:
            begin = max(heapq.heappop(self._free), now)
            heapq.heappush(self._free, begin + self._length(seed) * self._token_s)
            end = max(end, begin + self._length(seed) * self._token_s)
        self._busy_until = max(self._busy_until, end)
        ticket = Ticket(self._tickets)
        self._tickets += 1
        heapq.heappush(self._due, (end, ticket, request, self._version))
        return ticket

    def submit_burst(
        self,
        requests: Sequence[EpisodeRequest],
        prompts: PromptSet,
        *,
        evaluation: bool = False,
        version: int | None = None,
    ) -> list[Ticket]:
        return [self.submit(one, prompts, evaluation=evaluation) for one in requests]

    def completed(self, timeout_s: float) -> Iterator[Outcome]:
        until = time.monotonic() + timeout_s
        while self._due:
            wait = self._due[0][0] - time.monotonic()
            if wait > 0:
                left = until - time.monotonic()
                time.sleep(max(min(wait, left), 0.0))
                if wait > left:
                    return
            _, ticket, request, version = heapq.heappop(self._due)
            yield Finished(ticket, tuple(self._trajectories(request, version)))

    def _trajectories(self, request: EpisodeRequest, version: int) -> Iterator[Trajectory]:
        for sample, seed in enumerate(request.seeds):
            facts = EpisodeFacts(request.prompt_id, sample, sample, 8, self._length(seed), "stop", version)
            where = RowPointer(request, sample)
            yield Trajectory(request.row, request.prompt_id, where, where, facts)

    def serve(self, version: int, *, in_flight: InFlight = "drain") -> ServeReport:
        time.sleep(self._load_s)
        self._version = version
        return ServeReport(version, 1, self._load_s)

    def pull(self, version: int) -> float:
        return self.serve(version).seconds

    def load(self) -> FleetLoad:
        return FleetLoad(1, 0, len(self._due), 0, self._idle_s, 0.0)


class SleepingTrainer:
    """Policy and learners: a step takes `seconds`. `begun` takes when each began, on the wall's clock and in
    CPU-seconds of this process.
    """

    def __init__(self, seconds: float, begun: list[tuple[float, float]]) -> None:
        self._seconds, self._begun = seconds, begun

    def train(self, batch: TrainBatch, step: int) -> StepReport:
        self._begun.append((time.monotonic(), time.process_time()))
        time.sleep(self._seconds)
        return StepReport({"loss": 0.0, "grad_norm": 0.0}, int(batch.lengths.sum()), 0.0)

    def publish(self, version: int) -> Manifest:
        return Manifest(version, "full", (), ())

    def snapshot_steps(self) -> int | None:
        return None

    def save(self, directory: Path, only_model: bool) -> None:
        raise AssertionError("the benchmark saves nothing")


class Rewards:
    """A reward a completion, at once."""

    def score(
        self, trajectories: Sequence[Trajectory], prompts: PromptSet, state: TrainerState
    ) -> RewardTable:
        values = np.array([float(t.episode.sample % 2) for t in trajectories])
        return RewardTable(("Toy",), ("toy",), values[:, None], ())


def prompt_set(count: int) -> PromptSet:
    """Prompts of 8 tokens."""
    account = Account((SourceCounts("scripted", count, 0, count),), {}, None, (), None, ())
    return PromptSet(None, None, None, np.full(count, 8, dtype=np.int64), account)


def groups_of(config: RLHFConfig, fleet: SleepingFleet, trainer: SleepingTrainer) -> OnlineGroups:
    """All that a run asks."""
    sharing = SimpleNamespace(to_policy=lambda: None, to_rollout=lambda: False, takes_turns=False)
    parts: dict[str, Any] = {
        "sizes": SimpleNamespace(on_gpu=False, elastic=None),
        "policy": trainer,
        "learners": trainer,
        "rollout": fleet,
        "rewards": Rewards(),
        "gpu_sharing": sharing,
        "reference": None,
        "critic": None,
        "store": SimpleNamespace(publish=lambda manifest: None),
    }
    return OnlineGroups(**parts)
