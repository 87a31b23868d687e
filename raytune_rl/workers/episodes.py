"""From prompts to conversations: one turn of the model, or several that a scheduler answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.media_table import media_of
from raytune_rl.errors import DataError
from raytune_rl.multi_turn.scheduler import Request
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.rollout import Sampling
from raytune_rl.protocol.trajectory import EpisodeFacts, EpisodeRequest
from raytune_rl.workers.conversation import Conversation, Conversations
from raytune_rl.workers.engine_loop import EngineLoop, settle
from raytune_rl.workers.engine_prompt import Ask, EnginePrompt, Sampled

EPISODES_AT_ONCE = 512
"""Threads, each with conversations of several turns; one starts when it is needed."""

Extra = Mapping[str, Sequence[Any]]
GroupAnswer = tuple[list[EpisodeFacts], Columns, list[str], list[dict[str, Any]]]
"""Facts of each completion; the trajectory columns (tokens, loss_mask, logprobs, versions; one row a
completion, the latter two one entry a sampled token); what the model said last; and of conversations of
several turns the messages and the scheduler's "rollout_infos"."""
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class CompletionRequest:
    """One completion to be made."""

    request: EpisodeRequest
    sample: int
    seed: int

    def seed_of(self, turn: int) -> int:
        """Every turn has a seed of its own."""
        if turn == 1:
            return self.seed
        return int(np.random.SeedSequence([self.seed, turn]).generate_state(1)[0] & 0x7FFFFFFF)

    def conversation(self, extra: Extra) -> Request:
        """The request that a scheduler sees before the first turn, made of the prompt's row."""
        row = {name: column[self.request.row] for name, column in extra.items()}
        messages = [dict(message) for message in row.pop("messages")]
        return Request(messages, row, f"{self.request.prompt_id}-{self.sample}")


@dataclass(eq=False)
class Group:
    """One prompt with its completions.

    Attributes:
        requested: The completions.
        prompts: Of each; a scheduler may change them.
        sampling: How to draw.
        extra: The data set's columns, of which a scheduler sees a row; None: the model has one turn.
        version: The weights that it must be sampled with; None: any.
        answer: Its conversations, once it has begun.
        served: The weights with which it began.
        abandoned: Nobody waits for it any more.
    """

    requested: list[CompletionRequest]
    prompts: list[EnginePrompt]
    sampling: Sampling
    extra: Extra | None
    version: int | None
    answer: Future[list[Conversation]] | None = None
    served: int | None = None
    abandoned: bool = False

    @classmethod
    def of(
        cls,
        prompts: Columns,
        request: EpisodeRequest,
        sampling: Sampling,
        version: int | None,
        extra: Extra | None,
    ) -> Group:
        """From what the actor is called with."""
        prompt = read_prompt(prompts, request.row)
        requested = [CompletionRequest(request, sample, seed) for sample, seed in enumerate(request.seeds)]
        return cls(requested, [prompt for _ in requested], sampling, extra, version)


def read_prompt(prompts: Columns, row: int) -> EnginePrompt:
    """One prompt of the columns that `RolloutWorker.run_group` takes."""
    tokens, engine_prompt_ids = prompts["prompt"], prompts.get("engine_prompt_ids", prompts["prompt"])
    return EnginePrompt(tokens[row], engine_prompt_ids[row], tuple(media_of(prompts, row)))


class Episodes:
    """Runs groups at an engine, any number side by side.

    Args:
        engine: Samples.
        conversations: Makes the leader of conversations of several turns; None: there are none.
        max_model_len: Longest prompt and completion together, tokens.
    """

    def __init__(
        self,
        engine: EngineLoop[Any],
        conversations: Callable[[], Conversations] | None,
        max_model_len: int,
    ) -> None:
        self._engine, self._conversations, self._longest = engine, conversations, max_model_len
        self._threads = ThreadPoolExecutor(EPISODES_AT_ONCE, thread_name_prefix="episodes")

    def begin(self, groups: Sequence[Group]) -> list[Future[list[Conversation]]]:
        """Begins all groups in the same step of the engine. An answer for each; cancelling it aborts what is
        being sampled.

        Groups of several turns that begin together stay together, turn by turn: the engine's numbers may
        depend on what it computes at once. Their answers come together.
        """
        if not groups:
            return []
        if groups[0].extra is None or self._conversations is None:
            asked = self._engine.sample_all([self._asks(group) for group in groups])
            return [_then(answer, _one_turn) for answer in asked]
        leader = self._conversations()
        turns: list[Future[list[Sampled]]] = []
        answers: list[Future[list[Conversation]]] = [Future() for _ in groups]

        def give_up(_: Future[Any]) -> None:
            if all(answer.cancelled() for answer in answers):
                for turn in turns:
                    turn.cancel()

        for answer in answers:
            answer.add_done_callback(give_up)

        def run() -> None:
            try:
                done = self._several_turns(groups, leader, turns)
            except (Exception, CancelledError) as error:  # noqa: BLE001  (whoever waits gets it)
                for answer in answers:
                    settle(answer, error=error)
            else:
                for answer, conversations in zip(answers, done, strict=True):
                    settle(answer, conversations)
            finally:
                leader.close()

        self._threads.submit(run)
        return answers

    def _asks(self, group: Group) -> list[Ask]:
        return [
            Ask(prompt, one.seed, group.sampling, group.sampling.max_tokens)
            for one, prompt in zip(group.requested, group.prompts, strict=True)
        ]

    def _several_turns(
        self, groups: Sequence[Group], leader: Conversations, turns: list[Future[list[Sampled]]]
    ) -> list[list[Conversation]]:
        requested = [one for group in groups for one in group.requested]
        prompts = [prompt for group in groups for prompt in group.prompts]
        sampling, extra = groups[0].sampling, groups[0].extra
        assert extra is not None
        requests = [one.conversation(extra) for one in requested]
        for number, changed in enumerate(leader.begin(requests)):
            if changed is not None:
                prompts[number] = self._fitting(prompts[number], changed, sampling.max_tokens)

        def generate_turn(
            which: Sequence[int], continuations: Sequence[NDArray[np.int32]], limits: Sequence[int], turn: int
        ) -> list[Sampled]:
            asks = [
                Ask(prompts[i].followed_by(more), requested[i].seed_of(turn), sampling, limit)
                for i, more, limit in zip(which, continuations, limits, strict=True)
            ]
            answer = self._engine.sample(asks)
            turns[:] = [answer]
            return answer.result()

        conversations = iter(leader.run_episodes(generate_turn, requests, sampling.max_tokens))
        every = iter(prompts)
        parts = []
        for group in groups:
            group.prompts = [next(every) for _ in group.requested]
            parts.append([next(conversations) for _ in group.requested])
        return parts

    def _fitting(self, prompt: EnginePrompt, changed: NDArray[np.int32], more: int) -> EnginePrompt:
        if prompt.media:
            raise DataError("--multi_turn_scheduler changed a prompt with media, which only texts can be")
        if len(changed) + more > self._longest:
            raise DataError(
                f"--multi_turn_scheduler made a prompt of {len(changed)} tokens. With {more} for the answer "
                f"it does not fit the {self._longest} that the engine takes: raise --vllm_max_model_len"
            )
        return EnginePrompt(changed, changed)


def answer_of(group: Group, conversations: list[Conversation]) -> GroupAnswer:
    """What the actor returns for a group."""
    assert group.served is not None
    served = group.served  # of the odd one of which not a token is trained on
    episodes = [
        EpisodeFacts(
            prompt_id=a.request.prompt_id,
            sample=a.sample,
            row=row,
            prompt_tokens=len(prompt.tokens),
            completion_tokens=one.sampled,
            finish_reason=one.finish_reason,
            version=int(one.versions.min()) if len(one.versions) else served,
            other_tokens=len(one.tokens) - one.sampled,
            turns=one.turns,
            failure=one.failure,
            newest_version=newest_of(one.versions),
        )
        for row, (a, prompt, one) in enumerate(
            zip(group.requested, group.prompts, conversations, strict=True)
        )
    ]
    pairs = list(zip((prompt.tokens for prompt in group.prompts), conversations, strict=True))
    columns: Columns = {
        "tokens": Ragged.from_rows([np.concatenate([p, one.tokens]) for p, one in pairs], np.int32),
        "loss_mask": Ragged.from_rows(
            [np.concatenate([np.zeros(len(p)), one.trained]) for p, one in pairs], np.bool_
        ),
        "logprobs": Ragged.from_rows([one.logprobs for one in conversations], np.float32),
        "versions": Ragged.from_rows([one.versions for one in conversations], np.int32),
    }
    dialogues = [
        {"messages": one.request.messages, "rollout_infos": one.request.rollout_infos}
        for one in (conversations if group.extra is not None else ())
    ]
    return episodes, columns, [one.last_text for one in conversations], dialogues


def newest_of(versions: NDArray[np.int32]) -> int | None:
    """The newest of several versions; None for one."""
    several = len(versions) and versions.min() != versions.max()
    return int(versions.max()) if several else None


def _one_turn(sampled: list[Sampled]) -> list[Conversation]:
    conversations = [Conversation(Request([])) for _ in sampled]
    for one, turn in zip(conversations, sampled, strict=True):
        one.add(turn)
    return conversations


Before = TypeVar("Before")


def _then(first: Future[Before], make: Callable[[Before], Answer]) -> Future[Answer]:
    """What is made of an answer. Cancelling it cancels the first."""
    second: Future[Answer] = Future()

    def made(done: Future[Before]) -> None:
        try:
            settle(second, make(done.result()))
        except (Exception, CancelledError) as error:  # noqa: BLE001  (whoever waits gets it)
            settle(second, error=error)

    def cancelled(done: Future[Answer]) -> None:
        if done.cancelled():
            first.cancel()

    first.add_done_callback(made)
    second.add_done_callback(cancelled)
    return second
