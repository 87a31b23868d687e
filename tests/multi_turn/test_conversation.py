"""Conversations with a scripted speaker: the tokens, the mask and the failures."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.errors import ConfigError
from raytune_rl.multi_turn.scheduler import (
    Choice,
    MathTipTrick,
    MultiTurnScheduler,
    Request,
    make_scheduler,
    multi_turns,
)
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.tiny.tokenizer import make_tiny_tokenizer
from raytune_rl.workers.conversation import Conversation, Conversations

EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_turn.py"
TOKENIZER = make_tiny_tokenizer()
CHAT = ChatTemplate.of(TOKENIZER)
END = TOKENIZER.eos_token_id


@dataclass
class Line:
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    text: str
    finish_reason: str
    versions: NDArray[np.int32]


class Script:
    """Says its lines; remembers what it was asked with."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines
        self.asked: list[tuple[list[int], list[list[int]], list[int], int]] = []

    def __call__(
        self, which: Sequence[int], said: Sequence[NDArray[np.int32]], limits: Sequence[int], turn: int
    ) -> list[Line]:
        self.asked.append((list(which), [s.tolist() for s in said], list(limits), turn))
        return [self.line(number, turn, limit) for number, limit in zip(which, limits, strict=True)]

    def line(self, number: int, turn: int, limit: int) -> Line:
        text = self.lines[min(turn, len(self.lines)) - 1].format(number=number)
        ids = [*TOKENIZER.encode(text, add_special_tokens=False), END]
        cut = np.asarray(ids[:limit], dtype=np.int32)
        text = TOKENIZER.decode(cut, skip_special_tokens=True)
        logprobs = -np.arange(1, len(cut) + 1, dtype=np.float32) / 8
        reason = "stop" if len(ids) <= limit else "length"
        return Line(cut, logprobs, text, reason, np.full(len(cut), turn, np.int32))


class Tool(MultiTurnScheduler):
    def check_finished(self, infer_request: Request, response_choice: Choice, current_turn: int) -> bool:
        said = response_choice.message.content
        return "tool" not in said or super().check_finished(infer_request, response_choice, current_turn)

    def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Mapping[str, Any]:
        infer_request.messages.append({"role": "tool", "content": infer_request.data_dict["solution"]})
        return {"infer_request": infer_request, "rollout_infos": {"calls": current_turn}}


def run_episodes(
    scheduler: MultiTurnScheduler, script: Script, count: int = 1, max_tokens: int = 100, timeout_s: float = 5
) -> list[Conversation]:
    requests = [
        Request([{"role": "user", "content": f"{i}+1=?"}], {"solution": str(i + 1)}, str(i))
        for i in range(count)
    ]
    return Conversations(scheduler, CHAT, timeout_s).run_episodes(script, requests, max_tokens)


def test_the_model_trains_on_its_own_tokens_only() -> None:
    script = Script("tool", "it is {number}")
    held = run_episodes(Tool(), script, count=2)
    for number, one in enumerate(held):
        env = f"\n<|im_start|>tool\n{number + 1}<|im_end|>\n<|im_start|>assistant\n"
        assert TOKENIZER.decode(one.tokens) == f"tool<|im_end|>{env}it is {number}<|im_end|>"
        own = [t for t, trained in zip(one.tokens, one.trained, strict=True) if trained]
        assert TOKENIZER.decode(own) == f"tool<|im_end|>it is {number}<|im_end|>"
        assert len(one.logprobs) == one.sampled == len(own)
        assert set(one.versions.tolist()) == {1, 2}
        assert len(one.versions) == one.sampled
        assert (one.turns, one.finish_reason, one.failure) == (2, "stop", "")
        assert one.last_text == f"it is {number}"
        assert [m["role"] for m in one.request.messages] == ["user", "assistant", "tool", "assistant"]
        assert one.request.rollout_infos == {"calls": 1}
    # The second turn is asked with the first one's tokens exactly, and with what room they leave.
    which, said, limits, turn = script.asked[1]
    assert (which, turn) == ([0, 1], 2)
    assert said[0] == held[0].tokens[: len(said[0])].tolist()
    assert limits == [100 - len(s) for s in said]


def test_conversations_end_each_in_its_own_turn() -> None:
    class Odd(Tool):
        def check_finished(self, infer_request: Request, response_choice: Choice, current_turn: int) -> bool:
            return int(infer_request.uuid) % 2 == 0 or current_turn == 3

    held = run_episodes(Odd(), Script("tool"), count=4)
    assert [one.turns for one in held] == [1, 3, 1, 3]


def test_max_turns_and_a_cut_turn_end_a_conversation() -> None:
    assert run_episodes(Tool(max_turns=2), Script("tool"))[0].turns == 2
    (cut,) = run_episodes(Tool(), Script("tool tool tool tool"), max_tokens=3)
    assert (cut.turns, cut.finish_reason, len(cut.tokens)) == (1, "length", 3)


def test_without_room_for_an_answer_nothing_is_added() -> None:
    (one,) = run_episodes(Tool(), Script("tool"), max_tokens=6)
    assert (one.turns, one.finish_reason) == (1, "length")
    assert all(one.trained)


def test_a_doubt_is_put_in_the_models_mouth() -> None:
    (one,) = run_episodes(MathTipTrick(), Script("<think>a</think><answer>7</answer>", " it is 2"))
    assert TOKENIZER.decode(one.tokens) == f"<think>a{MathTipTrick.tip} it is 2<|im_end|>"
    assert one.last_text == f"<think>a{MathTipTrick.tip} it is 2", "one turn, which was continued"
    doubt = [t for t, trained in zip(one.tokens, one.trained, strict=True) if not trained]
    assert TOKENIZER.decode(doubt) == MathTipTrick.tip
    assert len(one.logprobs) == one.sampled
    assert one.turns == 2
    for right in ("<think>a</think><answer> 1 </answer>", "it is \\boxed{{1}}"):
        assert run_episodes(MathTipTrick(), Script(right))[0].turns == 1, "the solution is 1"


def test_a_turn_may_go_on_more_than_once() -> None:
    class Again(MultiTurnScheduler):
        def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Any:
            said = infer_request.messages[-1]["content"]
            infer_request.messages[-1]["content"] = f"{said} and"
            return infer_request  # as ms-swift 3.7 had it

    (one,) = run_episodes(Again(max_turns=3), Script("one", "two", "three"))
    assert one.failure == ""
    assert one.last_text == "one and" + "two and" + "three"
    assert TOKENIZER.decode(one.tokens) == "one andtwo andthree<|im_end|>"
    assert len(one.logprobs) == one.sampled


class Environment(MultiTurnScheduler):
    """A game, by the hooks of ms-swift 4: it sets the prompt, moves, and tells when it is over."""

    async def on_trajectory_start(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.messages = [{"role": "user", "content": f"board {request.uuid}"}]

    async def on_turn_end(self, request: Request, response_choice: Choice, current_turn: int) -> Any:
        assert len(response_choice.logprobs["content"]) == len(response_choice.token_ids)  # type: ignore[index]
        return {"done": current_turn == 2, "rollout_infos": {"score": current_turn}}

    def check_finished(self, infer_request: Request, response_choice: Choice, current_turn: int) -> bool:
        return True

    def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Mapping[str, Any]:
        infer_request.messages.append({"role": "user", "content": "next"})
        return {"infer_request": infer_request}


def test_an_environment_sets_the_prompt_and_says_when_it_is_over() -> None:
    scheduler = Environment()
    requests = [Request([{"role": "user", "content": "?"}], {}, name) for name in ("a", "b")]
    conversations = Conversations(scheduler, CHAT, 5)
    prompts = conversations.begin(requests)
    assert [TOKENIZER.decode(prompt) for prompt in prompts if prompt is not None] == [
        f"<|im_start|>user\nboard {name}<|im_end|>\n<|im_start|>assistant\n" for name in ("a", "b")
    ]
    held = conversations.run_episodes(Script("move"), requests, 100)
    assert [one.turns for one in held] == [2, 2]
    assert [one.request.rollout_infos for one in held] == [{"score": 2}] * 2
    assert conversations.begin([]) == []
    assert Conversations(Tool(), CHAT, 5).begin(requests) == [None, None]


def test_a_scheduler_may_give_tokens_and_say_which_are_trained() -> None:
    class Tokens(MultiTurnScheduler):
        def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Any:
            tip = TOKENIZER.encode(" wait,", add_special_tokens=False)
            kept = response_choice.token_ids[:-2]
            infer_request.messages[-1]["content"] = TOKENIZER.decode(kept) + " wait,"
            return {
                "infer_request": infer_request,
                "response_token_ids": kept + tip,
                "response_loss_mask": [0] + [1] * (len(kept) - 1) + [0] * len(tip),
                "rollout_logprobs": [0.0] * len(kept),
            }

    (one,) = run_episodes(Tokens(max_turns=2), Script("12345", "6"))
    assert one.failure == ""
    assert TOKENIZER.decode(one.tokens) == "1234 wait,6<|im_end|>"
    own = [t for t, trained in zip(one.tokens, one.trained, strict=True) if trained]
    assert TOKENIZER.decode(own) == "2346<|im_end|>"
    assert one.logprobs.tolist() == [-2 / 8, -3 / 8, -4 / 8, -1 / 8, -2 / 8]
    assert one.last_text == "1234 wait,6"


def test_a_list_of_tokens_that_is_extended_in_place_is_still_the_environments() -> None:
    class Extends(MultiTurnScheduler):
        def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Any:
            ids = response_choice.token_ids
            mask = [1] * len(ids)
            ids.extend(TOKENIZER.encode("42", add_special_tokens=False))
            infer_request.messages[-1]["content"] += "42"
            mask += [0] * (len(ids) - len(mask))
            return {"infer_request": infer_request, "response_token_ids": ids, "response_loss_mask": mask}

    (one,) = run_episodes(Extends(max_turns=2), Script("6*7=", "!"))
    assert TOKENIZER.decode(one.tokens) == "6*7=42!<|im_end|>", "no end in the middle of a turn"
    own = [t for t, trained in zip(one.tokens, one.trained, strict=True) if trained]
    assert TOKENIZER.decode(own) == "6*7=!<|im_end|>"
    assert len(one.logprobs) == len(own)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ({"response_loss_mask": [1]}, "without response_token_ids"),
        ({"response_token_ids": [5], "response_loss_mask": [1, 1]}, "2 entries for 1"),
        ({"response_token_ids": [5], "response_loss_mask": [1]}, "did not sample"),
        ({"loss_mask": [1]}, "loss_mask, which has no effect"),
    ],
)
def test_tokens_that_do_not_fit_end_the_conversation(returned: dict[str, Any], reason: str) -> None:
    class Wrong(MultiTurnScheduler):
        def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Any:
            infer_request.messages.append({"role": "user", "content": "next"})
            return returned

    (one,) = run_episodes(Wrong(), Script("12"))
    assert reason in one.failure
    assert one.turns == 1


def test_max_turns_ends_it_whatever_the_scheduler_says() -> None:
    class Never(Tool):
        def check_finished(self, *args: Any) -> bool:
            return False

    assert run_episodes(Never(max_turns=2), Script("tool"))[0].turns == 2


class Broken(Tool):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.never = threading.Event()

    def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Mapping[str, Any]:
        if infer_request.uuid != "1":
            return super().step(infer_request, response_choice, current_turn)
        infer_request.messages.append({"role": "tool", "content": "half done"})
        if self.how == "raises":
            raise KeyError("nothing there")
        if self.how == "hangs":
            self.never.wait(30)
        if self.how == "idle":
            infer_request.messages.pop()
        if self.how == "both":
            infer_request.messages[-2]["content"] = "other"
        return {}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raises", "KeyError"),
        ("hangs", "no answer within 0.5 s"),
        ("idle", "neither"),
        ("both", "both"),
    ],
)
def test_a_hook_that_fails_ends_its_own_conversation(how: str, reason: str) -> None:
    scheduler = Broken(how)
    held = run_episodes(scheduler, Script("tool", "done"), count=3, timeout_s=0.5)
    scheduler.never.set()
    assert [one.turns for one in held] == [2, 1, 2]
    assert reason in held[1].failure
    assert [m["role"] for m in held[1].request.messages] == ["user", "assistant"]
    assert not held[0].failure


def test_coroutines_are_hooks_too() -> None:
    class Slow(Tool):
        async def step(self, *args: Any) -> Any:  # type: ignore[override]
            return super().step(*args)

    assert run_episodes(Slow(), Script("tool", "done"))[0].turns == 2


def test_an_unknown_scheduler_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean math_tip_trick"):
        make_scheduler("math_tip", None)
    multi_turns["refuses"] = lambda max_turns: 1 / 0
    multi_turns["leads"] = type("Leads", (MultiTurnScheduler,), {"run": None})
    try:
        with pytest.raises(ConfigError, match="ZeroDivisionError"):
            make_scheduler("refuses", 3)
        with pytest.raises(ConfigError, match=r"defines run\(\).*define on_trajectory_start"):
            make_scheduler("leads", 3)
    finally:
        del multi_turns["refuses"], multi_turns["leads"]
    assert make_scheduler("math_tip_trick", 3, TOKENIZER).tokenizer is TOKENIZER


def test_the_example_works_out_what_the_model_asks() -> None:
    load_plugins([EXAMPLE])
    try:
        calculator = make_scheduler("calculator", 4)
    finally:
        multi_turns.pop("calculator")
    (one,) = run_episodes(calculator, Script("<calc>6 * (3+4)</calc>", "so <calc>2/0</calc>", "42"))
    tools = [m["content"] for m in one.request.messages if m["role"] == "tool"]
    assert tools == ["42", "not a sum that can be worked out"]
    assert (one.turns, one.last_text, one.failure) == (3, "42", "")
