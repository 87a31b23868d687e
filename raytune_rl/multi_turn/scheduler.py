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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_rl.errors import ConfigError


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
    """

    message: Answer
    token_ids: list[int]
    finish_reason: str


class MultiTurnScheduler:
    """Decides after every turn of the model whether the conversation goes on, and with what.

    One scheduler serves all conversations of a worker, several at a time: keep what belongs to one of them
    in its request.

    Args:
        max_turns: Most turns of the model; None is no limit but the length.
    """

    def __init__(self, max_turns: int | None = None, **kwargs: Any) -> None:
        self.max_turns = max_turns

    def on_trajectory_start(self, requests: Sequence[Request]) -> None:
        """Called with all conversations before their first turn."""

    def check_finished(self, infer_request: Request, response_choice: Choice, current_turn: int) -> bool:
        """Whether the conversation ends here: the turn, counted from 1, was cut off, or it was the last."""
        if response_choice.finish_reason == "length":
            return True
        return self.max_turns is not None and current_turn >= self.max_turns

    def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Mapping[str, Any]:
        """What comes next.

        Append messages to `infer_request.messages`, or rewrite the content of its last one, the model's
        answer: what it has in common with what the model said stays, the rest is put in its mouth, and it
        goes on from there.

        Returns:
            {"infer_request": ..., "rollout_infos": {...}}; the second is optional.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define step")


class MathTipTrick(MultiTurnScheduler):
    """One second chance: a wrong-looking ending is replaced by a doubt, and the model goes on from there.

    The trick of ms-swift's scheduler of this name. It needs no solution: every first answer is doubted once.
    """

    tip = "But wait... It seems I made a mistake,"

    def check_finished(self, infer_request: Request, response_choice: Choice, current_turn: int) -> bool:
        return current_turn > 1 or super().check_finished(infer_request, response_choice, current_turn)

    def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Mapping[str, Any]:
        said = infer_request.messages[-1]["content"]
        ends = [said.find(mark) for mark in ("<answer>", "</think>") if mark in said]
        infer_request.messages[-1]["content"] = (said[: min(ends)] if ends else said) + self.tip
        return {"infer_request": infer_request}


multi_turns: dict[str, Any] = {"math_tip_trick": MathTipTrick}


def make_scheduler(name: str, max_turns: int | None) -> MultiTurnScheduler:
    """The scheduler registered under a name; plugin files must have been loaded before.

    Raises:
        ConfigError: There is none of that name, or it cannot be made.
    """
    if name not in multi_turns:
        near = difflib.get_close_matches(name, multi_turns, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--multi_turn_scheduler {name} is not registered.{hint} There are: {', '.join(multi_turns)}. A "
            "file of --external_plugins adds one by multi_turns['name'] = Class."
        )
    try:
        return multi_turns[name](max_turns=max_turns)
    except Exception as error:
        raise ConfigError(f"--multi_turn_scheduler {name}: {type(error).__name__}: {error}") from error
