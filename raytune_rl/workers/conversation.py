"""Conversations of several turns: the engine speaks, a scheduler answers, until each one is finished.

The model's tokens stay as they were sampled; what the scheduler adds is in the context and never trained on.
A hook that raises or does not answer in time ends its own conversation where it stands, and nothing else.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.turns import Continuation, follow_up, go_on
from raytune_rl.multi_turn.scheduler import Answer, Choice, MultiTurnScheduler, Request

HOOKS_AT_ONCE = 16


class Turn(Protocol):
    """What the engine gives for one turn: int32 tokens `[n]`, their log-probs, text, finish reason."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    text: str
    finish_reason: str


Speak = Callable[[Sequence[int], Sequence[NDArray[np.int32]], Sequence[int], int], Sequence[Turn]]
"""(which conversations, what each has said since its prompt, most tokens of each, turn) -> a turn of each."""


@dataclass
class Conversation:
    """One conversation behind its prompt.

    Attributes:
        request: What hooks see of it.
        tokens: int32, ids, the model's and the environment's.
        trained: bool, of each token, whether the model sampled it.
        logprobs: float32, of the sampled tokens.
        turns: Of the model.
        finish_reason: Of its last turn; "length" too if the next one would have had no room.
        failure: Why a hook could not be asked; empty if none failed.
    """

    request: Request
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    trained: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    turns: int = 0
    finish_reason: str = ""
    failure: str = ""

    def add(self, spoken: Turn) -> None:
        """Puts a turn of the model behind what was said."""
        self._append(spoken.tokens, trained=True)
        self.logprobs = np.concatenate([self.logprobs, spoken.logprobs])
        self.turns += 1
        self.finish_reason = spoken.finish_reason
        self.request.messages.append({"role": "assistant", "content": spoken.text})

    def drop(self, count: int) -> None:
        """Takes back the last tokens of the model's turn."""
        if count:
            self.tokens, self.trained = self.tokens[:-count], self.trained[:-count]
            self.logprobs = self.logprobs[:-count]

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
        """What the model said last."""
        said = [m["content"] for m in self.request.messages if m.get("role") == "assistant"]
        return said[-1] if said else ""


class Conversations:
    """Leads conversations to their ends.

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

    def hold(self, speak: Speak, requests: Sequence[Request], max_tokens: int) -> list[Conversation]:
        """Runs all conversations, a turn of each at a time.

        Args:
            speak: Samples turns.
            requests: The conversations, each ending with the prompt's last message.
            max_tokens: Most tokens behind a prompt, the environment's included.
        """
        held = [Conversation(request) for request in requests]
        self._ask([(None, lambda: self._scheduler.on_trajectory_start(list(requests)))])
        alive, turn = list(range(len(held))), 1
        while alive:
            said = [held[i].tokens for i in alive]
            limits = [max_tokens - len(held[i].tokens) for i in alive]
            spoken = dict(zip(alive, speak(alive, said, limits, turn), strict=True))
            for number, one in spoken.items():
                held[number].add(one)
            decided = self._ask([(held[i], self._decision(held[i], spoken[i], turn)) for i in alive])
            alive = [
                number
                for number, decision in zip(alive, decided, strict=True)
                if decision is not None and _go_on(held[number], spoken[number], decision, max_tokens)
            ]
            turn += 1
        return held

    def _decision(self, one: Conversation, spoken: Turn, turn: int) -> Callable[[], Continuation | None]:
        """What a thread does for one conversation: asks the hooks, and tells how it goes on, or None."""
        choice = Choice(Answer(spoken.text), spoken.tokens.tolist(), spoken.finish_reason)
        request = one.request

        def decide() -> Continuation | None:
            if _result(self._scheduler.check_finished(request, choice, turn)):
                return None
            before = len(request.messages)
            answer = _result(self._scheduler.step(request, choice, turn)) or {}
            changed = answer.get("infer_request", request)
            request.messages = list(changed.messages)
            request.rollout_infos.update(answer.get("rollout_infos") or {})
            new, content = request.messages[before:], request.messages[before - 1]["content"]
            if new and content != spoken.text:
                raise ValueError("step() both changed the model's answer and added messages to it")
            if new:
                return follow_up(self._chat, choice.token_ids, new)
            if content == spoken.text:
                raise ValueError("step() neither added a message nor changed the model's answer")
            return go_on(self._chat.tokenizer, choice.token_ids, self._stops, spoken.text, content)

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
    one.add_from_others(decision.added)
    return True


def _result(value: Any) -> Any:
    """The value of a hook, which may be a coroutine function."""

    async def waited() -> Any:
        return await value

    return asyncio.run(waited()) if inspect.isawaitable(value) else value
