"""Schedulers: what follows a model's turn. The names and hooks are ms-swift's, so that its plugin files load.

    from swift.plugin.multi_turn import MultiTurnScheduler, multi_turns

    class Calculator(MultiTurnScheduler):
        def check_finished(self, infer_request, response_choice, current_turn):
            return "<tool>" not in response_choice.message.content

        def step(self, infer_request, response_choice, current_turn):
            infer_request.messages.append({"role": "tool", "content": "42"})
            return {"infer_request": infer_request}

    multi_turns["calculator"] = Calculator

What a scheduler adds is the environment's: it goes into the context and is never trained on.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from raytune_rl.errors import ConfigError

_ANSWER = re.compile(r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}", re.DOTALL)


@dataclass
class Request:
    """A conversation in progress, as hooks see and change it.

    Attributes:
        messages: `{"role", "content"}` each; the last one is the model's answer when `step` is called.
        data_dict: The row's other columns (solution, ...).
        uuid: The same for the whole conversation.
        rollout_infos: What `step` has returned under that name so far; rewards receive it.
    """

    messages: list[dict[str, Any]]
    data_dict: Mapping[str, Any] = field(default_factory=dict)
    uuid: str = ""
    rollout_infos: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The content of a model's turn, and its role."""

    content: str
    role: str = "assistant"


@dataclass(frozen=True)
class Choice:
    """One turn of the model.

    Attributes:
        message: What it said, without special tokens.
        token_ids: As sampled, the end token included.
        finish_reason: "stop" or "length".
        logprobs: {"content": [{"logprob": ...}, ...]}, one entry a token.
    """

    message: Answer
    token_ids: list[int]
    finish_reason: str
    logprobs: Mapping[str, Any] | None = None


class MultiTurnScheduler:
    """Decides after every turn of the model whether the conversation goes on, and with what.

    One scheduler serves all conversations of a worker, several at a time: keep what belongs to one of them
    in its request.

    Hooks may be coroutine functions.

    Args:
        max_turns: Most turns of the model; None is no limit but the length.
        tokenizer: The model's, for `response_token_ids`; None while it is only tried whether the class can be
            made.
    """

    def __init__(self, max_turns: int | None = None, tokenizer: Any = None, **kwargs: Any) -> None:
        self.max_turns = max_turns
        self.tokenizer = tokenizer
        # Where schedulers for ms-swift before 4.0 look for it.
        self.infer_engine = SimpleNamespace(
            tokenizer=tokenizer, default_template=SimpleNamespace(tokenizer=tokenizer)
        )

    def on_trajectory_start(self, requests: Sequence[Request]) -> Any:
        """Called with all conversations before their first turn. May change their messages, of prompts
        without media.
        """

    def on_turn_end(
        self, infer_request: Request, response_choice: Choice, current_turn: int
    ) -> Mapping[str, Any] | Any:
        """Called after every turn of the model, before `check_finished`.

        Returns:
            {"done": ..., "rollout_infos": {...}}; both are optional, and "done" overrules `check_finished`.
        """
        return {}

    def check_finished(self, infer_request: Request, response_choice: Choice, current_turn: int) -> bool:
        """Whether the conversation ends here: the turn, counted from 1, was cut off, or it was the last.
        Whatever this says, `max_turns` ends it too.
        """
        if response_choice.finish_reason == "length":
            return True
        return self.max_turns is not None and current_turn >= self.max_turns

    def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Mapping[str, Any]:
        """The next messages of a conversation.

        Append messages to `infer_request.messages`, or rewrite the content of its last one, the model's
        answer: what it has in common with what the model said stays, the rest is put in its mouth, and it
        goes on from there.

        Returns:
            {"infer_request": ...}, and, if wanted, "rollout_infos": {...}, which rewards receive;
            "response_token_ids": the tokens to go on with in place of the turn's, of which only those are the
            model's that it sampled; "response_loss_mask": which of them are trained on, none but sampled
            ones. "rollout_logprobs" are the engine's own, whatever is returned.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define step")


class MathTipTrick(MultiTurnScheduler):
    """One second chance: the ending is replaced by a doubt, and the model goes on from there.

    The trick of ms-swift's scheduler of this name. Answers are not worked out here, where a hostile one could
    stop the engine: one that is the row's solution to the letter is left alone, any other is doubted once.
    """

    tip = "But wait... It seems I made a mistake,"

    def check_finished(self, infer_request: Request, response_choice: Choice, current_turn: int) -> bool:
        if current_turn > 1 or self._is_right(infer_request, response_choice.message.content):
            return True
        return super().check_finished(infer_request, response_choice, current_turn)

    def _is_right(self, infer_request: Request, said: str) -> bool:
        solution, found = infer_request.data_dict.get("solution"), _ANSWER.search(said)
        if solution is None or found is None:
            return False
        tagged = _ANSWER.search(str(solution))
        return _plain(found) == (str(solution).strip() if tagged is None else _plain(tagged))

    def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Mapping[str, Any]:
        said = infer_request.messages[-1]["content"]
        ends = [said.find(mark) for mark in ("<answer>", "</think>") if mark in said]
        infer_request.messages[-1]["content"] = (said[: min(ends)] if ends else said) + self.tip
        return {"infer_request": infer_request}


def _plain(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group is not None).strip()


multi_turns: dict[str, Any] = {"math_tip_trick": MathTipTrick}


def make_scheduler(name: str, max_turns: int | None, tokenizer: Any = None) -> MultiTurnScheduler:
    """The scheduler registered under a name; plugin files must have been loaded before.

    Args:
        name: As registered.
        max_turns: Most turns of the model.
        tokenizer: The model's; given to a class that takes it.

    Raises:
        ConfigError: There is none of that name, it cannot be made, or it wants to lead conversations itself.
    """
    if name not in multi_turns:
        near = difflib.get_close_matches(name, multi_turns, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--multi_turn_scheduler {name} is not registered.{hint} There are: {', '.join(multi_turns)}. A "
            "file of --external_plugins adds one by multi_turns['name'] = Class."
        )
    try:
        taken = inspect.signature(multi_turns[name]).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        more = {"tokenizer": tokenizer} if open_ended or "tokenizer" in taken else {}
        scheduler = multi_turns[name](max_turns=max_turns, **more)
    except Exception as error:
        raise ConfigError(f"--multi_turn_scheduler {name}: {type(error).__name__}: {error}") from error
    if hasattr(scheduler, "run"):
        raise ConfigError(
            f"--multi_turn_scheduler {name} defines run(), to lead conversations itself. Rollout workers do "
            "that here: define on_trajectory_start, on_turn_end, check_finished and step."
        )
    return scheduler
