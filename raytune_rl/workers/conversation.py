"""Conversations of several turns: the engine speaks, a scheduler answers, until each one is finished.

The model's tokens stay as they were sampled; what the scheduler adds is in the context and never trained on.
A hook that raises or does not answer in time ends its own conversation where it stands, and nothing else.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.example import Message
from raytune_rl.data.turns import Continuation, as_returned, follow_up, go_on
from raytune_rl.errors import RewardError
from raytune_rl.multi_turn.scheduler import Answer, Choice, MultiTurnScheduler, Request

HOOKS_AT_ONCE = 16


class Turn(Protocol):
    """The engine's answer for one turn: int32 tokens `[n]`, their log-probs, weight versions, text, finish
    reason.
    """

    @property
    def tokens(self) -> NDArray[np.int32]: ...

    @property
    def logprobs(self) -> NDArray[np.float32]: ...

    @property
    def versions(self) -> NDArray[np.int32]: ...

    @property
    def text(self) -> str: ...

    @property
    def finish_reason(self) -> str: ...


GenerateTurn = Callable[[Sequence[int], Sequence[NDArray[np.int32]], Sequence[int], int], Sequence[Turn]]
"""(which conversations, what each has said since its prompt, most tokens of each, turn) -> a turn of each."""


@dataclass
class Conversation:
    """One conversation behind its prompt.

    Attributes:
        request: What hooks see of it.
        tokens: int32, ids, the model's and the environment's.
        trained: bool, of each token, whether the model sampled it.
        logprobs: float32, of the sampled tokens.
        versions: int32, the weights that these were sampled with.
        turns: Of the model.
        finish_reason: Of its last turn; "length" too if the next one would have had no room.
        failure: Why a hook could not be asked; empty if none failed.
    """

    request: Request
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    trained: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    versions: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    turns: int = 0
    finish_reason: str = ""
    failure: str = ""

    def add(self, spoken: Turn) -> None:
        """Puts a turn of the model behind what was said."""
        self._append(spoken.tokens, trained=True)
        self.logprobs = np.concatenate([self.logprobs, spoken.logprobs])
        self.versions = np.concatenate([self.versions, spoken.versions])
        self.turns += 1
        self.finish_reason = spoken.finish_reason
        messages = self.request.messages
        if messages and messages[-1].get("role") == "assistant":  # the same turn goes on
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + spoken.text}
        else:
            messages.append({"role": "assistant", "content": spoken.text})

    def untrain(self, positions: Sequence[int]) -> None:
        """Takes tokens out of the training that the model did sample."""
        if not positions:
            return
        entries = np.cumsum(self.trained)[list(positions)] - 1
        self.logprobs, self.versions = np.delete(self.logprobs, entries), np.delete(self.versions, entries)
        self.trained = self.trained.copy()
        self.trained[list(positions)] = False

    def drop(self, count: int) -> None:
        """Takes back the last tokens of the model's turn."""
        if count:
            self.tokens, self.trained = self.tokens[:-count], self.trained[:-count]
            self.logprobs, self.versions = self.logprobs[:-count], self.versions[:-count]

    def add_from_others(self, tokens: Sequence[int]) -> None:
        """Puts the environment's tokens behind what was said."""
        self._append(np.asarray(tokens, dtype=np.int32), trained=False)

    def _append(self, tokens: NDArray[np.int32], *, trained: bool) -> None:
        self.tokens = np.concatenate([self.tokens, tokens])
        self.trained = np.concatenate([self.trained, np.full(len(tokens), trained)])

    @property
    def sampled(self) -> int:
        """Tokens of the model."""
        return int(self.trained.sum())

    @property
    def last_text(self) -> str:
        """The text of the model's last turn."""
        texts = [m["content"] for m in self.request.messages if m.get("role") == "assistant"]
        return texts[-1] if texts else ""


class Conversations:
    """Leads conversations to their ends. To be closed.

    Args:
        scheduler: Decides what follows a turn.
        chat: The model's chat template.
        timeout_s: For the hooks of one round, seconds.
    """

    def __init__(self, scheduler: MultiTurnScheduler, chat: ChatTemplate, timeout_s: float) -> None:
        self._scheduler = scheduler
        self._chat = chat
        self._stops = chat.stop_token_ids()
        self._timeout_s = timeout_s
        self._hooks = ThreadPoolExecutor(HOOKS_AT_ONCE, thread_name_prefix="multi_turn")

    def close(self) -> None:
        """Lets its threads go."""
        self._hooks.shutdown(wait=False)

    def begin(self, requests: Sequence[Request]) -> list[NDArray[np.int32] | None]:
        """Lets the scheduler prepare conversations. The prompt of each that it changed, int32 ids, else None.

        Raises:
            RewardError: The hook raised, or did not answer in time.
            DataError: The chat template refuses what it made of the messages.
        """
        before = [copy.deepcopy(request.messages) for request in requests]
        try:
            self._ask([(None, lambda: _result(self._scheduler.on_trajectory_start(list(requests))))])
        except Exception as error:
            raise RewardError(
                f"--multi_turn_scheduler: on_trajectory_start: {type(error).__name__}: {error}"
            ) from error
        return [
            None if request.messages == old else self._prompt(request.messages)
            for request, old in zip(requests, before, strict=True)
        ]

    def _prompt(self, messages: Sequence[dict[str, Any]]) -> NDArray[np.int32]:
        turns = [Message(turn["role"], turn["content"]) for turn in messages]
        text = self._chat.render(turns, generation_prompt=True)
        return np.asarray(self._chat.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def run_episodes(
        self, generate_turn: GenerateTurn, requests: Sequence[Request], max_tokens: int
    ) -> list[Conversation]:
        """Runs all conversations, a turn of each at a time.

        Args:
            generate_turn: Samples turns.
            requests: The conversations, each ending with the prompt's last message.
            max_tokens: Most tokens behind a prompt, the environment's included.
        """
        conversations = [Conversation(request) for request in requests]
        alive, turn = list(range(len(conversations))), 1
        while alive:
            continuations = [conversations[i].tokens for i in alive]
            limits = [max_tokens - len(conversations[i].tokens) for i in alive]
            turns = dict(zip(alive, generate_turn(alive, continuations, limits, turn), strict=True))
            for number, one in turns.items():
                conversations[number].add(one)
            decided = self._ask(
                [(conversations[i], self._decision(conversations[i], turns[i], turn)) for i in alive]
            )
            alive = [
                number
                for number, decision in zip(alive, decided, strict=True)
                if decision is not None and _go_on(conversations[number], turns[number], decision, max_tokens)
            ]
            turn += 1
        return conversations

    def _decision(self, one: Conversation, spoken: Turn, turn: int) -> Callable[[], Continuation | None]:
        """The job of a thread for one conversation: it asks the hooks, and returns how to go on, or None."""
        logprobs = {"content": [{"logprob": value} for value in spoken.logprobs.tolist()]}
        choice = Choice(Answer(spoken.text), spoken.tokens.tolist(), spoken.finish_reason, logprobs)
        request, scheduler = one.request, self._scheduler
        sampled = spoken.tokens.tolist()  # schedulers extend the list that they are shown

        def decide() -> Continuation | None:
            turn_result = _result(scheduler.on_turn_end(request, choice, turn)) or {}
            request.rollout_infos.update(turn_result.get("rollout_infos") or {})
            finished = bool(_result(scheduler.check_finished(request, choice, turn)))
            most = scheduler.max_turns
            if turn_result.get("done", finished) or (most is not None and turn >= most):
                return None
            before, written = len(request.messages), request.messages[-1]["content"]
            answer = _answer(_result(scheduler.step(request, choice, turn)))
            changed = answer.get("infer_request", request)
            request.messages = list(changed.messages)
            request.rollout_infos.update(answer.get("rollout_infos") or {})
            new, content = request.messages[before:], request.messages[before - 1]["content"]
            ids, mask = answer.get("response_token_ids"), answer.get("response_loss_mask")
            if mask and not ids:
                raise ValueError("step() returned response_loss_mask without response_token_ids")
            if ids:
                return as_returned(self._chat, sampled, ids, mask or None, new, self._stops)
            if new and content != written:
                raise ValueError("step() both changed the model's answer and added messages to it")
            if new:
                return follow_up(self._chat, sampled, new)
            if content == written:
                raise ValueError("step() neither added a message nor changed the model's answer")
            earlier = written[: len(written) - len(spoken.text)]  # of a turn that already went on once
            if not content.startswith(earlier):
                raise ValueError("step() changed what was said before the model's last words")
            own = content[len(earlier) :]
            return go_on(self._chat.tokenizer, sampled, self._stops, spoken.text, own)

        return decide

    def _ask(self, jobs: Sequence[tuple[Conversation | None, Callable[[], Any]]]) -> list[Any]:
        """Runs hooks side by side; one that fails gives None and leaves its reason in its conversation.

        Raises:
            Exception: What a hook raised that belongs to no conversation.
        """
        snapshots = [copy.deepcopy(one.request.messages) if one else None for one, _ in jobs]
        futures: list[Future[Any]] = [self._hooks.submit(job) for _, job in jobs]
        _, late = wait(futures, timeout=self._timeout_s)
        if late:  # their threads cannot be ended: others take over
            self._hooks.shutdown(wait=False, cancel_futures=True)
            self._hooks = ThreadPoolExecutor(HOOKS_AT_ONCE, thread_name_prefix="multi_turn")
        answers: list[Any] = []
        for (one, _), future, snapshot in zip(jobs, futures, snapshots, strict=True):
            error: BaseException | None
            if future in late:
                error = TimeoutError(f"no answer within {self._timeout_s:g} s")
            else:
                error = future.exception()
            if error is None:
                answers.append(future.result())
                continue
            if one is None:
                raise error
            one.failure = f"{type(error).__name__}: {error}"
            assert snapshot is not None
            one.request = Request(
                snapshot, one.request.data_dict, one.request.uuid, dict(one.request.rollout_infos)
            )
            answers.append(None)
        return answers


def _go_on(one: Conversation, spoken: Turn, decision: Continuation, max_tokens: int) -> bool:
    """Puts the environment's tokens behind a turn; False if no room would be left to answer them."""
    dropped = len(spoken.tokens) - decision.kept
    if len(one.tokens) - dropped + len(decision.added) >= max_tokens:
        one.finish_reason = "length"
        return False
    one.drop(dropped)
    start = len(one.tokens) - decision.kept
    one.untrain([start + position for position in decision.untrained])
    one.add_from_others(decision.added)
    return True


_RETURNED = {
    "infer_request", "rollout_infos", "response_token_ids", "response_loss_mask", "rollout_logprobs",
}  # fmt: skip


def _answer(returned: Any) -> Mapping[str, Any]:
    """The value that step() returned, as a mapping; earlier versions of ms-swift return the request
    itself.
    """
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        return {"infer_request": returned}
    if unknown := sorted(returned.keys() - _RETURNED):
        raise ValueError(f"step() returned {', '.join(unknown)}, which has no effect here")
    return returned


def _result(value: Any) -> Any:
    """The value of a hook, which may be a coroutine function."""

    async def waited() -> Any:
        return await value

    return asyncio.run(waited()) if inspect.isawaitable(value) else value
