"""The teachers as the pipelines see them: advantages in, advantages with the teachers' part out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.credit.base import Credited
from raytune_rl.algorithms.distillation import TEACHER_COLUMNS, Advice, ReverseKL
from raytune_rl.data.media_table import ROW_COLUMN
from raytune_rl.data.prefix_plan import Budget
from raytune_rl.groups.logprobs import Asked, ask_about
from raytune_rl.protocol.data import TEACHER_PROMPT, TEACHER_PROMPT_TOKENS, PromptSet, TokenSet
from raytune_rl.protocol.model import Settled
from raytune_rl.protocol.rows import PROMPT_TOKENS, Prefixes, RowPointer, TrainBatch
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.runtime.group import WorkerGroup


@dataclass(frozen=True)
class Teacher:
    """One teacher.

    Attributes:
        workers: Its copies.
        coefficient: Weight of its part of the advantage.
        settled: How its rows are laid out.
    """

    workers: WorkerGroup
    coefficient: float
    settled: Settled


class Teachers:
    """All of them.

    Args:
        teachers: They, in the order of `--teacher_model`.
        max_tokens: Token budget of a micro-batch.
    """

    def __init__(self, teachers: Sequence[Teacher], max_tokens: int) -> None:
        self._teachers, self._max_tokens = teachers, max_tokens

    def advise(
        self,
        batch: TrainBatch,
        credited: Credited,
        whose: NDArray[np.int64] | None,
        advice: Advice | None = None,
    ) -> Credited:
        """Advantages with the teachers' part, one a token, as the column "advantages" of the batch.

        Args:
            batch: The rows as teachers see them (`as_seen`), with the column "old_logprobs".
            credited: What they earned otherwise.
            whose: The teacher of each row, int64 `[n]`; None: all teachers judge every row.
            advice: How they do; None: each by its coefficient times the reverse KL.
        """
        rows = _shown(batch, {"old_logprobs"})
        rows = rows.with_scalars(advantage=credited.advantages)
        earned = dict(enumerate(credited.batch.columns.get("advantages", ())))
        sums, kl, judged = np.zeros((len(batch), 3)), 0.0, 0.0
        for judges in self._at_once(len(batch), whose):
            asked = []
            for teacher, own in judges:
                part = _with_earned(rows, own, earned)
                how = advice or ReverseKL(teacher.coefficient)
                asked.append((own, self._ask(teacher, part, "advise", how)))
            for own, opinion in asked:
                columns, told = opinion.answers()
                earned |= dict(zip(own, columns, strict=True))
                answers = np.zeros((len(own), 3))
                for share, answer in told:
                    answers[share] = answer
                sums[own] = answers
                kl, judged = kl + float(answers[:, 0].sum()), judged + float(answers[:, 2].sum())
        return Credited(
            credited.batch.with_columns(advantages=[earned[row] for row in range(len(batch))]),
            (sums[:, 1] / np.maximum(sums[:, 2], 1)).astype(np.float32),
            {**credited.metrics, "teacher_kl": kl / max(judged, 1.0)},
        )

    def offload(self, weights: bool) -> None:
        """Gives back what the allocators keep, and moves the weights to the CPU if they are wanted away."""
        for teacher in self._teachers:
            teacher.workers.call("offload", weights, what="offloading a teacher")

    def reload(self) -> None:
        """Brings them back."""
        for teacher in self._teachers:
            teacher.workers.call("reload", what="reloading a teacher")

    def logprobs(self, batch: TrainBatch, whose: NDArray[np.int64] | None) -> list[RowPointer]:
        """Where the teachers' log-probs lie, of each row; arguments as in `distributions`."""
        return self._columns(_shown(batch), whose, "logprobs")

    def distributions(
        self, batch: TrainBatch, whose: NDArray[np.int64] | None, k: int
    ) -> dict[str, list[RowPointer]]:
        """Where the teachers' likeliest tokens lie (`distillation.TEACHER_COLUMNS`), of each row.

        Args:
            batch: The rows as teachers see them (`as_seen`).
            whose: The teacher of each row, int64 `[n]`; None: there is one teacher.
            k: So many tokens; 0: as many as `opinions.usual_top` says.
        """
        return dict.fromkeys(TEACHER_COLUMNS, self._columns(_shown(batch), whose, "distributions", k))

    def _columns(
        self, rows: TrainBatch, whose: NDArray[np.int64] | None, method: str, *settings: Any
    ) -> list[RowPointer]:
        places: dict[int, RowPointer] = {}
        (judges,) = self._at_once(len(rows), whose)
        asked = [(own, self._ask(t, rows.part(own), method, *settings)) for t, own in judges]
        for own, opinion in asked:
            places |= dict(zip(own, opinion.answers()[0], strict=True))
        return [places[row] for row in range(len(rows))]

    def _at_once(self, count: int, whose: NDArray[np.int64] | None) -> list[list[tuple[Teacher, list[int]]]]:
        """Who is asked about which rows, one list after the other: where all judge every row, each adds to
        what the one before it said.
        """
        if whose is None:
            return [[(teacher, list(range(count)))] for teacher in self._teachers]
        parts = [(t, np.flatnonzero(whose == number).tolist()) for number, t in enumerate(self._teachers)]
        return [[(teacher, own) for teacher, own in parts if own]]

    def _ask(self, teacher: Teacher, rows: TrainBatch, method: str, *settings: Any) -> Asked:
        budget = Budget.of(teacher.settled, len(teacher.workers), self._max_tokens)
        return ask_about(teacher.workers, rows, budget, method, *settings, what="an opinion of")


def as_seen(batch: TrainBatch, trajectories: Sequence[Trajectory], prompts: PromptSet) -> TrainBatch:
    """A batch as teachers see it: where the data says so, the same completions behind other prompts.

    Args:
        batch: The rows of the trajectories.
        trajectories: Completions of prompts.
        prompts: The prompt set.
    """
    if TEACHER_PROMPT_TOKENS not in prompts.values:
        return batch
    rows = np.array([t.prompt for t in trajectories], dtype=np.int64)
    own = np.array([t.episode.prompt_tokens for t in trajectories], dtype=np.int64)
    asked = prompts.values[TEACHER_PROMPT_TOKENS][rows].astype(np.int64)
    seen = replace(batch, lengths=batch.lengths - own + asked, prefixes=Prefixes(rows, asked))
    places = [RowPointer(prompts.columns, int(row)) for row in rows]
    return seen.with_columns(**{TEACHER_PROMPT: places}).with_scalars(**{PROMPT_TOKENS: own})


def longest_seen(prompts: PromptSet, max_model_len: int, answers: TokenSet | None) -> int:
    """Tokens of the longest row that teachers may see: the policy's, which have at most `max_model_len`,
    behind their own prompts; and the answers of the data, if they see any.
    """
    asked = prompts.values.get(TEACHER_PROMPT_TOKENS)
    more = 0 if asked is None else max(0, int((asked - prompts.lengths).max()))
    return max(max_model_len + more, 0 if answers is None else int(answers.lengths.max()))


def _shown(batch: TrainBatch, more: Collection[str] = ()) -> TrainBatch:
    """What of a batch a teacher is shown, and the columns that are named."""
    rows = batch.keep({ROW_COLUMN, TEACHER_PROMPT, *more})
    known = {name: batch.scalars[name] for name in (PROMPT_TOKENS,) if name in batch.scalars}
    return rows.without_scalars().with_scalars(**known)


def _with_earned(rows: TrainBatch, own: list[int], earned: dict[int, RowPointer]) -> TrainBatch:
    part = rows.part(own)
    if own[0] not in earned:
        return part
    return part.with_columns(advantages=[earned[row] for row in own])
