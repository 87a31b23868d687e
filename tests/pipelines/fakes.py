"""Stand-ins for the groups of an online run: no actors, no tensors. Each writes down what it is asked, gives
answers that follow from the question and from how often the model was trained, and refuses what the real one
could not do: to sample with weights that it has not loaded, to be asked while another has its GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from raytune_rl.algorithms.experience import Experience
from raytune_rl.config import RLHFConfig
from raytune_rl.groups.start import OnlineGroups, learners_of
from raytune_rl.groups.trajectory_data import TrajectoryData, TrajectoryStore
from raytune_rl.pipelines.group_flow import Aside, Outside
from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.data import Account, PromptSet, SourceCounts
from raytune_rl.protocol.rewards import Failure, RewardTable, TrainerState
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.tickets import Failed, Finished, FleetLoad, InFlight, Outcome, ServeReport, Ticket
from raytune_rl.protocol.train import Estimates, EstimateSettings, RowLogprobs, StepReport, TokenOrder
from raytune_rl.protocol.trajectory import EpisodeFacts, EpisodeRequest, Trajectory
from raytune_rl.protocol.weights import Manifest

Reward = Callable[[Trajectory], float]
"""The reward of a completion; NaN: it could not be scored."""


@dataclass
class Stage:
    """The common record of the stand-ins.

    Attributes:
        calls: Everything that was asked, in order.
        shared: Whether policy and engines share their GPUs.
        owner: Who has them.
        on_call: Told of each call when it is made.
        now: Of the scripted clock, seconds.
        training_s: A step of the policy takes so long by it.
    """

    calls: list[str] = field(default_factory=list)
    shared: bool = False
    owner: str = "policy"
    on_call: Callable[[str], None] = lambda call: None
    now: float = 0.0
    training_s: float = 0.0

    def call(self, text: str, owner: str | None = None) -> None:
        """Writes a call down; `owner` must have the GPUs for it."""
        assert not self.shared or owner in (None, self.owner), f"{text}: {self.owner} has the GPUs"
        self.calls.append(text)
        self.on_call(text)


def prompt_set(count: int, name: str = "train") -> PromptSet:
    """Prompts of 3, 4, 5, ... tokens."""
    account = Account((SourceCounts(name, count, 0, count),), {}, None, (), None, ())
    return PromptSet(name, name, name, np.arange(3, 3 + count, dtype=np.int64), account)


class FakeSharing:
    """See `groups.gpu_sharing.GPUSharing`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def to_policy(self) -> None:
        """The policy has the GPUs."""
        self._stage.owner = "policy"

    def to_rollout(self) -> bool:
        """The engines have them; True: they slept, and have lost their weights."""
        woke = self._stage.shared and self._stage.owner == "policy"
        self._stage.owner = "rollout"
        return woke

    @property
    def takes_turns(self) -> bool:
        """Whether there is only one of them at a time."""
        return self._stage.shared


class FakeRollout:
    """See `groups.fleet.RolloutFleet`. Sample s of prompt p has 2 + s tokens, which lie in row 10 p + s; it
    is cut off where p is 4, 9, ...
    """

    def __init__(self, stage: Stage, name: str = "rollout", engines: int = 1) -> None:
        self._stage, self._name, self.engines = stage, name, engines
        self.loaded = [-1]

    def plain(self, max_tokens: int) -> FakeRollout:
        """The same engines for a probe."""
        probe = FakeRollout(self._stage, "probe", self.engines)
        probe.loaded = self.loaded
        return probe

    def greedy(self) -> FakeRollout:
        """The same engines for the likeliest answers."""
        likeliest = FakeRollout(self._stage, "greedy", self.engines)
        likeliest.loaded = self.loaded
        return likeliest

    def pull(self, version: int) -> float:
        """Pulls a version."""
        self._stage.call(f"rollout.pull {version}", "rollout")
        self.loaded[0] = version
        return 0.0

    def generate(
        self,
        prompts: PromptSet,
        rows: Sequence[int],
        completions: int,
        version: int,
        batch: int,
        *,
        evaluation: bool = False,
        at_once: bool = False,
    ) -> list[Trajectory]:
        """Completions of prompts."""
        assert version == self.loaded[0], f"asked for version {version}, the engines have {self.loaded[0]}"
        which = "evaluation" if evaluation else f"batch {batch}"
        of = " ".join(str(int(row)) for row in rows)
        self._stage.call(f"{self._name}.generate {which}: prompts {of}, {completions} each", "rollout")
        return [
            Trajectory(
                prompt=int(row),
                group=group,
                data=RowPointer(f"tokens {batch}", int(row) * 10 + sample),
                text=RowPointer(f"texts {batch}", int(row) * 10 + sample),
                episode=EpisodeFacts(
                    prompt_id=group,
                    sample=sample,
                    row=int(row) * 10 + sample,
                    prompt_tokens=int(prompts.lengths[row]),
                    completion_tokens=2 + sample,
                    finish_reason="length" if row % 5 == 4 else "stop",
                    version=version,
                ),
            )
            for group, row in enumerate(rows)
            for sample in range(completions)
        ]

    def forget_prompts(self) -> None:
        """Drops what is kept of prompts."""
        self._stage.call("rollout.forget_prompts", "rollout")


Script = Callable[[int, Sequence[int]], float]
"""Seconds that the completions of a prompt take, by its row and their seeds; negative: nobody can answer."""


@dataclass
class _Asked:
    """A prompt in flight."""

    request: EpisodeRequest
    prompts: PromptSet
    version: int
    newest: int
    due: float


class FakeFleet(FakeRollout):
    """See `groups.fleet.RolloutFleet`: engines without end, in which each prompt takes the time that a script
    says. Where they are waited for, the clock jumps to whoever is the next.

    Attributes:
        script: Says how long.
        asked: Training prompts that were ever asked: row and seeds.
        admitted: How often an engine came to serve.
    """

    def __init__(self, stage: Stage, script: Script = lambda row, seeds: 1.0) -> None:
        super().__init__(stage)
        self.script = script
        self.asked: list[tuple[int, tuple[int, ...]]] = []
        self.admitted = 1
        self._flying: dict[Ticket, _Asked] = {}
        self._tickets = 0

    def submit(self, request: EpisodeRequest, prompts: PromptSet, *, evaluation: bool = False) -> Ticket:
        """Asks for a group."""
        return self._ask("submit", [request], prompts, evaluation)[0]

    def submit_burst(
        self,
        requests: Sequence[EpisodeRequest],
        prompts: PromptSet,
        *,
        evaluation: bool = False,
        version: int | None = None,
    ) -> list[Ticket]:
        """Asks for groups at once."""
        assert version in (None, self.loaded[0]), f"version {version} is not what the engines have"
        return self._ask("submit_burst", requests, prompts, evaluation)

    def _ask(
        self, how: str, requests: Sequence[EpisodeRequest], prompts: PromptSet, evaluation: bool
    ) -> list[Ticket]:
        which = " evaluation:" if evaluation else ""
        self._stage.call(f"rollout.{how}{which} {' '.join(str(one.row) for one in requests)}", "rollout")
        version = self.loaded[0]
        tickets = []
        for one in requests:
            ticket = Ticket(self._tickets)
            self._tickets += 1
            due = self._stage.now + abs(self.script(one.row, one.seeds))
            self._flying[ticket] = _Asked(one, prompts, version, version, due)
            tickets.append(ticket)
            if not evaluation:
                self.asked.append((one.row, one.seeds))
        return tickets

    def completed(self, timeout_s: float) -> Iterator[Outcome]:
        """Whoever is done by now; if nobody is, whoever is the next, however long that takes."""
        if self._flying:
            self._stage.now = max(self._stage.now, min(one.due for one in self._flying.values()))
        done = [t for t, one in self._flying.items() if one.due <= self._stage.now]
        for ticket in sorted(done, key=lambda t: (self._flying[t].due, t)):
            one = self._flying.pop(ticket)
            if self.script(one.request.row, one.request.seeds) < 0:
                yield Failed(ticket, f"prompt {one.request.row} ends whoever takes it")
            else:
                yield Finished(ticket, tuple(self._trajectories(ticket, one)))

    def _trajectories(self, ticket: Ticket, asked: _Asked) -> Iterator[Trajectory]:
        row, group = asked.request.row, asked.request.prompt_id
        for sample in range(len(asked.request.seeds)):
            facts = EpisodeFacts(
                prompt_id=group,
                sample=sample,
                row=row * 10 + sample,
                prompt_tokens=int(asked.prompts.lengths[row]),
                completion_tokens=2 + sample,
                finish_reason="length" if row % 5 == 4 else "stop",
                version=asked.version,
                newest_version=asked.newest,
            )
            where = [RowPointer(f"{what} {ticket.number}", row * 10 + sample) for what in ("tokens", "texts")]
            yield Trajectory(row, group, where[0], where[1], facts)

    def serve(self, version: int, *, in_flight: InFlight = "drain") -> ServeReport:
        """All engines have a version."""
        self._stage.call(f"rollout.serve {version}", "rollout")
        self.loaded[0] = version
        for one in self._flying.values():
            if in_flight == "drain":
                self._stage.now = max(self._stage.now, one.due)
            elif one.due > self._stage.now:
                one.newest = version
                if in_flight == "abort":
                    one.version = version
                    one.due = self._stage.now + abs(self.script(one.request.row, one.request.seeds))
        return ServeReport(version, 1, 0.0)

    def load(self) -> FleetLoad:
        """How busy they are."""
        return FleetLoad(1, 0, len(self._flying), 0, 0.0, 0.0, admitted=self.admitted)


class FakeAside(Aside[Experience]):
    """Does its work at once."""

    def start(self, work: Callable[[], Experience]) -> None:
        """Does it."""
        self._done: Experience | None = work()

    @property
    def busy(self) -> bool:
        """Whether its answer was not fetched."""
        return getattr(self, "_done", None) is not None

    def fetch(self, timeout_s: float) -> Experience | None:
        """Its answer."""
        answer, self._done = getattr(self, "_done", None), None
        return answer


class FakeStore(TrajectoryStore):
    """Trajectories whose content is their pointers."""

    def read(self, trajectories: Sequence[Trajectory]) -> TrajectoryData:
        """Of a group."""
        rows = Ragged.from_rows([[t.data.row] for t in trajectories], np.int64)
        return TrajectoryData({"rows": rows}, [t.text.ref for t in trajectories], [])

    def write(
        self, data: TrajectoryData, trajectories: Sequence[Trajectory], prompts: PromptSet
    ) -> list[Trajectory]:
        """As they were."""
        rows = data.columns["rows"]
        return [
            replace(
                t, data=RowPointer(f"saved {text}", int(rows[i][0])), text=RowPointer(text, int(rows[i][0]))
            )
            for i, (t, text) in enumerate(zip(trajectories, data.texts, strict=True))
        ]


def outside(stage: Stage) -> Outside:
    """The world by the scripted clock, where nothing happens in the background."""
    return Outside(lambda work: nullcontext(), FakeAside, lambda: stage.now, FakeStore(1.0))


class FakeRewards:
    """See `groups.rewards.Scorer`."""

    def __init__(self, stage: Stage, reward: Reward) -> None:
        self._stage, self._reward = stage, reward

    def score(
        self, trajectories: Sequence[Trajectory], prompts: PromptSet, state: TrainerState
    ) -> RewardTable:
        """The rewards of completions."""
        at = f"step {state.global_step} of {state.max_steps}"
        self._stage.call(f"rewards.score {len(trajectories)} of {prompts.texts}, {at}")
        values = np.array([self._reward(t) for t in trajectories])
        failures = [Failure(int(row), "toy", "timeout", "slow") for row in np.flatnonzero(np.isnan(values))]
        return RewardTable(("Toy",), ("toy",), values[:, None], tuple(failures))


def _column(name: str, batch: TrainBatch) -> list[RowPointer]:
    return [RowPointer(f"{name} of {place.ref}", place.row) for place in batch.rows]


class FakeTrainable:
    """See `groups.world.Trainable`. Its weights are the number of steps that it was trained.

    Attributes:
        batches: What it was trained on.
    """

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage, self._name = stage, name
        self.updates = 0
        self.batches: list[TrainBatch] = []

    def start_step(self, batch: TrainBatch, step: int) -> FakeTrainable:
        """Begins a step."""
        rows = " ".join(str(place.row) for place in batch.rows)
        columns = " ".join(sorted(batch.columns)) or "none"
        scalars = " ".join(sorted(batch.scalars)) or "none"
        self._stage.call(
            f"{self._name}.start_step {step}: rows {rows}; columns {columns}; scalars {scalars}", "policy"
        )
        self.batches.append(batch)
        self.updates += 1
        self._stage.now += self._stage.training_s
        return self

    def finish(self) -> StepReport:
        """Waits for it."""
        self._stage.call(f"{self._name}.finish")
        loss = float((self.batches[-1].scalars["weight"] * self.updates).sum())
        metrics = {"loss": loss, "grad_norm": 1.0 / self.updates, "learning_rate": 0.5}
        return StepReport(metrics, int(self.batches[-1].lengths.sum()), 0.25)

    def offload(self, weights: bool, optimizer: bool) -> None:
        """Moves it to the CPU."""

    def reload(self) -> None:
        """Brings it back."""

    def save(self, directory: Path, only_model: bool) -> None:
        """Writes the weights."""
        self._stage.call(f"{self._name}.save{' only_model' if only_model else ''}", "policy")
        directory.mkdir(exist_ok=True)
        (directory / "weights.json").write_text(json.dumps(self.updates))
        if not only_model:
            (directory / "optimizer").mkdir()
            (directory / "optimizer" / "state").write_text("state")

    def load(self, directory: Path) -> None:
        """Restores them."""
        self.updates = json.loads((directory / "weights.json").read_text())
        self._stage.call(f"{self._name}.load {self.updates}", "policy")

    def snapshot_steps(self) -> int | None:
        """It has no snapshot."""
        return None


class FakePolicy:
    """See `groups.trainer.PolicyGroup`.

    Attributes:
        half_square: What `row_kl` gives by "k2": half of the squared gap of an engine's log-prob.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage, self.half_square = stage, 0.0

    def logprobs(self, batch: TrainBatch) -> RowLogprobs:
        """Log-probs of rows."""
        self._stage.call(f"policy.logprobs {len(batch)}", "policy")
        return RowLogprobs(_column("policy logprobs", batch), np.zeros(len(batch)))

    def entropies(self, batch: TrainBatch) -> list[RowPointer]:
        """Entropies of rows."""
        self._stage.call(f"policy.entropies {len(batch)}", "policy")
        return _column("entropies", batch)

    def entropy_threshold(self, batch: TrainBatch, tokens: Sequence[int], share: float) -> float:
        """The entropy that a token must have."""
        self._stage.call(f"policy.entropy_threshold {len(batch)}, {sum(tokens)} tokens, {share:g}", "policy")
        return 0.125 if sum(tokens) else -math.inf

    def first_tokens(self, batch: TrainBatch, order: TokenOrder, count: int) -> list[RowPointer]:
        """The first tokens of an order."""
        assert {"start_logprobs"} <= batch.columns.keys()
        rows = int(batch.scalars["counted"].sum())
        self._stage.call(f"policy.first_tokens {count} of {rows} rows, step {order.step}", "policy")
        return _column("chosen", batch)

    def row_kl(self, batch: TrainBatch, estimator: str) -> np.ndarray:
        """The KL of rows: a tenth of their number."""
        assert {"old_logprobs", "ref_logprobs"} <= batch.columns.keys()
        self._stage.call(f"policy.row_kl {len(batch)}, {estimator}", "policy")
        if estimator == "k2":
            return np.full(len(batch), self.half_square)
        return np.arange(len(batch)) / 10

    def publish(self, version: int) -> Manifest:
        """The weights as they are."""
        self._stage.call(f"policy.publish {version}", "policy")
        return Manifest(version, "full", (), ())


class FakeReference:
    """See `groups.logprobs.ReferenceGroup`, and `Follower` of it."""

    name = "reference"

    def __init__(self, stage: Stage, every: int, share: float) -> None:
        self._stage, self.every, self._share, self.mixed = stage, every, share, -1

    def logprobs(self, batch: TrainBatch) -> RowLogprobs:
        """Log-probs of rows."""
        self._stage.call(f"reference.logprobs {len(batch)}", "policy")
        return RowLogprobs(_column("reference logprobs", batch), np.zeros(len(batch)))

    def mix(self, manifest: Manifest) -> None:
        """Moves towards a version."""
        self._stage.call(f"reference.mix {manifest.version}, {self._share:g}")
        self.mixed = manifest.version

    def save(self, directory: Path) -> None:
        """Writes it."""
        self._stage.call("reference.save")
        directory.mkdir()
        (directory / "mixed.json").write_text(json.dumps(self.mixed))

    def load(self, directory: Path) -> None:
        """Restores it."""
        self.mixed = json.loads((directory / "mixed.json").read_text())
        self._stage.call(f"reference.load {self.mixed}")


class FakeCritic:
    """See `groups.critic.CriticGroup`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def estimate(
        self, batch: TrainBatch, scores: Any, settings: EstimateSettings, *, whiten_rewards: bool
    ) -> Estimates:
        """Advantages and returns: a row's mean advantage is its score."""
        shown = " ".join(f"{score:g}" for score in scores)
        columns = " ".join(sorted(batch.columns))
        self._stage.call(f"critic.estimate scores {shown}; columns {columns}", "policy")
        made = {name: _column(name, batch) for name in ("advantages", "returns", "old_values")}
        return Estimates(made, np.asarray(scores, dtype=np.float64), {"critic/returns": 0.5})


class FakeWeights:
    """See `groups.weight_store.WeightStore`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def publish(self, manifest: Manifest) -> None:
        """Makes a version the newest."""
        self._stage.call(f"store.publish {manifest.version}")


@dataclass
class Cast:
    """The stand-ins of one run: the policy as it is asked, the models as they are trained, all as a run takes
    them."""

    policy: FakePolicy
    policy_model: FakeTrainable
    critic_model: FakeTrainable
    groups: OnlineGroups


def cast_of(config: RLHFConfig, needs: frozenset[str], stage: Stage, reward: Reward) -> Cast:
    """Those that a run of these needs has; `Learners` are the real ones over stand-ins of the models."""
    policy, model, critic = FakePolicy(stage), FakeTrainable(stage, "policy"), FakeTrainable(stage, "critic")
    worlds: list[Any] = [model, critic if "values" in needs else None]
    learners = learners_of(worlds[0], worlds[1], config)
    reference = FakeReference(stage, config.ref_model_sync_steps, config.ref_model_mixup_alpha)
    groups: dict[str, Any] = {
        "sizes": SimpleNamespace(on_gpu=False, elastic=None),
        "policy": policy,
        "learners": learners,
        "rollout": FakeFleet(stage),
        "rewards": FakeRewards(stage, reward),
        "gpu_sharing": FakeSharing(stage),
        "reference": reference if "ref_logprobs" in needs else None,
        "followers": (reference,) if config.sync_ref_model else (),
        "critic": FakeCritic(stage) if "values" in needs else None,
        "store": FakeWeights(stage),
    }
    return Cast(policy, model, critic, OnlineGroups(**groups))
