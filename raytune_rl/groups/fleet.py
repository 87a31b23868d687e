"""The rollout and reward groups as the pipelines see them: prompts in, scored trajectories out, by
reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from raytune_rl.data.media_table import ROW_COLUMN, media_of
from raytune_rl.errors import RaytuneError
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.rewards import Failure, RewardTable, Scores, TrainerState
from raytune_rl.protocol.rollout import Sampling
from raytune_rl.protocol.rows import Prefixes, RowPointer, TrainBatch
from raytune_rl.protocol.trajectory import EpisodeFacts, EpisodeRequest, Trajectory
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import Pending, fetch, fetch_all, settle


def sample_seed(seed: int, batch: int, prompt: int, sample: int) -> int:
    """A completion's own seed: a repeated batch, on any worker, samples the same."""
    return _seed(seed, batch, prompt, sample)


def row_seeds(seed: int, batch: int, rows: Sequence[int], completions: int) -> list[tuple[int, ...]]:
    """The seeds of the completions of each prompt of a batch. One that is in it again, as across the border
    of an epoch, has others.
    """
    before: Counter[int] = Counter()
    seeds = []
    for row in map(int, rows):
        again = (before[row],) if before[row] else ()
        seeds.append(tuple(_seed(seed, batch, row, sample, *again) for sample in range(completions)))
        before[row] += 1
    return seeds


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] & 0x7FFFFFFF)


class RolloutGroup:
    """M engines that answer as one.

    Args:
        group: The started workers.
        sampling: How completions are drawn.
        seed: Of all of them.
        evaluation: How they are drawn from held-out prompts, if that differs.
        multi_turn: Whether a scheduler answers the model.
    """

    def __init__(
        self,
        group: WorkerGroup,
        sampling: Sampling,
        seed: int,
        evaluation: Sampling | None = None,
        *,
        multi_turn: bool = False,
    ) -> None:
        self.workers = group
        self._sampling = sampling
        self._evaluation = evaluation or sampling
        self._seed = seed
        self._multi_turn = multi_turn

    @property
    def engines(self) -> int:
        """Number of engines."""
        return len(self.workers)

    def plain(self, max_tokens: int) -> RolloutGroup:
        """The same engines, drawing from the model's whole distribution, and no scheduler answers."""
        disallowed_token_ids = self._sampling.disallowed_token_ids
        return RolloutGroup(
            self.workers,
            Sampling(self._sampling.temperature, max_tokens, disallowed_token_ids=disallowed_token_ids),
            self._seed,
        )

    def load(self, version: int) -> float:
        """Every engine pulls a version; one call an engine. Returns the longest pull, seconds."""
        answers = self.workers.call("load_weights", version, what=f"pulling weights {version}")
        return max(seconds for _, seconds in answers)

    def generate(
        self,
        prompts: PromptSet,
        rows: Sequence[int],
        completions: int,
        version: int,
        batch: int,
        *,
        evaluation: bool = False,
    ) -> list[Trajectory]:
        """Samples `completions` completions of each prompt, the prompts spread over the engines.

        Args:
            prompts: The prompt set.
            rows: Which of its prompts.
            completions: Of each prompt.
            version: The weights to sample with.
            batch: Number of the batch in the run, for the seeds.
            evaluation: Draw them as in evaluation.

        Returns:
            Trajectories in the order of `rows`, those of one prompt together.

        Raises:
            RaytuneError: The counts do not add up: every prompt asked must come back exactly once.
        """
        requests = [
            EpisodeRequest(g, int(row), seeds)
            for g, (row, seeds) in enumerate(
                zip(rows, row_seeds(self._seed, batch, rows, completions), strict=True)
            )
        ]
        shares = [share.tolist() for share in np.array_split(np.arange(len(requests)), len(self.workers))]
        pending = [
            self.workers.submit(
                rank,
                "generate",
                prompts.columns,
                [requests[i] for i in share],
                self._evaluation if evaluation else self._sampling,
                version,
                *([prompts.extra] if self._multi_turn else []),
                what=f"sampling {len(share)} x {completions} completions",
                returns=4,
            )
            for rank, share in enumerate(shares)
            if share
        ]
        trajectories: dict[tuple[int, int], Trajectory] = {}
        for answer, episodes in zip(*settle(pending), strict=True):
            for episode in episodes:
                prompt = int(rows[episode.prompt_id])
                trajectory = _trajectory(episode, answer, prompt, prompts.media(prompt), self._multi_turn)
                trajectories[episode.prompt_id, episode.sample] = trajectory
        wanted = [(g, s) for g in range(len(rows)) for s in range(completions)]
        lost = [key for key in wanted if key not in trajectories]
        if lost or len(trajectories) != len(wanted):
            raise RaytuneError(
                f"{len(wanted)} completions were asked for and {len(trajectories)} came back (first missing: "
                f"{lost[:1]}); "
                "this is a defect of raytune_rl"
            )
        return [trajectories[key] for key in wanted]

    def forget_prompts(self) -> None:
        """Drops what the engines keep of the prompts so far."""
        self.workers.call("forget_prompts")

    def sleep(self) -> None:
        """Frees the engines' GPU memory while the policy trains beside them."""
        self.workers.call("sleep")

    def wake(self) -> None:
        """Takes it back."""
        self.workers.call("wake")


def _trajectory(
    episode: EpisodeFacts, answer: Pending, prompt: int, media: RowPointer | None, multi_turn: bool
) -> Trajectory:
    return Trajectory(
        prompt=prompt,
        group=episode.prompt_id,
        data=RowPointer(answer.ref[1], episode.row),
        text=RowPointer(answer.ref[2], episode.row),
        episode=episode,
        media=media,
        dialogue=RowPointer(answer.ref[3], episode.row) if multi_turn else None,
    )


def batch_of(trajectories: Sequence[Trajectory]) -> TrainBatch:
    """Where the rows of trajectories lie, and the media of their prompts if the data has any. Those of one
    prompt begin with it."""
    places = [t.media for t in trajectories if t.media is not None]
    return TrainBatch(
        [t.data for t in trajectories],
        np.array([t.length for t in trajectories], dtype=np.int64),
        {ROW_COLUMN: places} if places else {},
        prefixes=Prefixes(
            np.array([t.prompt for t in trajectories], dtype=np.int64),
            np.array([t.episode.prompt_tokens for t in trajectories], dtype=np.int64),
        ),
    )


REWARDS_SHARE = 0.8
"""Part of a call's deadline that reward functions may use: what they leave over costs samples, no run."""


class RewardGroup:
    """L workers that score completions; only numbers come back."""

    def __init__(self, group: WorkerGroup) -> None:
        self.workers = group

    def score(
        self, trajectories: Sequence[Trajectory], prompts: PromptSet, state: TrainerState
    ) -> RewardTable:
        """Scores every trajectory, the work spread over the workers."""
        by_object: dict[Any, list[int]] = {}
        for number, trajectory in enumerate(trajectories):
            by_object.setdefault(trajectory.text.ref, []).append(number)
        pending, members, turn = [], [], 0
        # A worker gets a part of each object, one after the other: the last has to be answered in time, too.
        limit_s = REWARDS_SHARE * self.workers.timeout_s / max(len(by_object), 1)
        for ref, numbers in by_object.items():
            for share in np.array_split(np.asarray(numbers), len(self.workers)):
                if not len(share):
                    continue
                share_trajectories = [trajectories[i] for i in share]
                call = self.workers.submit(
                    turn % len(self.workers),
                    "score",
                    [ref],
                    [t.text.row for t in share_trajectories],
                    [prompts.extra],
                    [t.prompt for t in share_trajectories],
                    reward_columns(share_trajectories, state),
                    [share_trajectories[0].dialogue.ref]
                    if share_trajectories[0].dialogue is not None
                    else None,
                    [share_trajectories[0].data.ref],
                    [share_trajectories[0].media.ref] if share_trajectories[0].media is not None else None,
                    limit_s,
                    what=f"scoring {len(share_trajectories)} completions",
                )
                pending.append(call)
                members.append(share)
                turn += 1
        return gather_scores(fetch_all(pending), members, len(trajectories))


def reward_columns(trajectories: Sequence[Trajectory], state: TrainerState) -> dict[str, Any]:
    """The columns that reward functions receive beside the data set's, under ms-swift's names."""
    return {
        "prompt_id": [str(t.prompt) for t in trajectories],
        "request_id": [f"{t.prompt}-{t.episode.sample}" for t in trajectories],
        "finish_reason": [t.episode.finish_reason for t in trajectories],
        "is_truncated": [t.episode.finish_reason == "length" for t in trajectories],
        "completion_tokens": [t.episode.completion_tokens for t in trajectories],
        "num_turns": [t.episode.turns for t in trajectories],
        "trainer_state": state,
    }


def gather_scores(answers: Sequence[Scores], members: Sequence[NDArray], count: int) -> RewardTable:
    """Answers of several workers as one: `members` are the rows that each is about, of `count` in all."""
    first = answers[0]
    values = np.full((count, len(first.functions)), np.nan)
    failures: list[Failure] = []
    one_by_one: dict[str, str] = {}
    for scores, numbers in zip(answers, members, strict=True):
        values[numbers] = scores.values
        one_by_one |= {n: why for n, why in zip(scores.functions, scores.slow_path, strict=True) if why}
        failures += [replace(f, row=int(numbers[f.row])) for f in scores.failures]
    failed = tuple(sorted(failures, key=lambda f: f.row))
    return RewardTable(first.labels, first.functions, values, failed, one_by_one)


def read_texts(trajectories: Sequence[Trajectory], timeout_s: float) -> list[str]:
    """The completions as text, for the log."""
    return _read([t.text for t in trajectories], timeout_s)


def read_dialogues(trajectories: Sequence[Trajectory], timeout_s: float) -> list[dict[str, Any]]:
    """The messages of all turns, and what the scheduler said about them, for the log; empty for one turn."""
    return _read([t.dialogue for t in trajectories if t.dialogue is not None], timeout_s)


def read_media_names(trajectories: Sequence[Trajectory], timeout_s: float) -> list[list[str]]:
    """Paths of the media of each one's prompt, or digests of their bytes, for the log; empty where no
    prompt has any."""
    places = [t.media for t in trajectories if t.media is not None]
    if not places:
        return []
    columns = fetch(Pending(places[0].ref, "the object store", "reading names of media", timeout_s))
    return [[medium.name for medium in media_of(columns, place.row)] for place in places]


def _read(places: Sequence[RowPointer], timeout_s: float) -> list[Any]:
    refs = list({place.ref: None for place in places})
    pending = [Pending(ref, "the object store", "reading completions", timeout_s) for ref in refs]
    values: Mapping[ray.ObjectRef, list[Any]] = dict(zip(refs, (fetch(p) for p in pending), strict=True))
    return [values[place.ref][place.row] for place in places]
