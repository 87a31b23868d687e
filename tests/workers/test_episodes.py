"""Groups at an engine that says lines: one turn, several, side by side, and what is returned of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.multi_turn.scheduler import Choice, MultiTurnScheduler, Request
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.rollout import Sampling
from raytune_rl.protocol.tickets import InFlight
from raytune_rl.protocol.trajectory import EpisodeRequest
from raytune_rl.tiny.tokenizer import make_tiny_tokenizer
from raytune_rl.workers.conversation import Conversations
from raytune_rl.workers.engine_loop import EngineLoop
from raytune_rl.workers.engine_prompt import Ask, Sampled
from raytune_rl.workers.episodes import Episodes, Group, answer_of

TOKENIZER = make_tiny_tokenizer()
CHAT = ChatTemplate.of(TOKENIZER)
PROMPTS: Columns = {"prompt": Ragged.from_rows([[5, 6, 7], [8, 9]], np.int32)}
EXTRA = {"messages": [[{"role": "user", "content": "?"}]] * 2, "solution": ["one", "two"]}


class Speaking:
    """Says its lines, one completion's turns after another: a step a token. What it was asked at once is in
    `asked`: (seed, tokens of the prompt) of each."""

    def __init__(self, *lines: str) -> None:
        self.version: int | None = 3
        self.lines = lines
        self.asked: list[list[tuple[int, int]]] = []
        self.open: dict[str, tuple[list[int], int]] = {}
        self.may_go = threading.Event()
        self.may_go.set()

    def add(self, asks: Sequence[Ask]) -> list[str]:
        """Takes completions; the longer the prompt, the later the line."""
        self.asked.append([(ask.seed, len(ask.prompt.tokens)) for ask in asks])
        names = []
        for ask in asks:
            line = self.lines[min(len(ask.prompt.tokens) > 3, len(self.lines) - 1)]
            ids = [*TOKENIZER.encode(line, add_special_tokens=False), TOKENIZER.eos_token_id]
            names.append(f"{len(self.asked)}-{len(names)}")
            self.open[names[-1]] = (ids, 0)
        return names

    def step(self) -> list[tuple[str, Sampled | Exception]]:
        """A token of each."""
        assert self.may_go.wait(20)
        finished: list[tuple[str, Sampled | Exception]] = []
        for name, (ids, count) in list(self.open.items()):
            self.open[name] = (ids, count + 1)
            if count + 1 == len(ids):
                del self.open[name]
                tokens = np.array(ids, np.int32)
                own = Sampled(tokens, -np.ones(len(ids), np.float32), "", "stop", np.zeros(0, np.int32))
                finished.append((name, own))
        return finished

    @contextmanager
    def halted(self) -> Iterator[list[tuple[str, Sampled | Exception]]]:
        """It is never in the middle of a step."""
        yield []

    def abort(self, names: Sequence[str]) -> None:
        """Forgets completions."""
        for name in names:
            del self.open[name]

    def sampled(self, names: Sequence[str]) -> list[int]:
        """Tokens so far."""
        return [self.open[name][1] for name in names]

    def texts(self, sampled: Sequence[Sampled], sampling: Sampling) -> list[str]:
        """As text."""
        return [TOKENIZER.decode(one.tokens, skip_special_tokens=True) for one in sampled]

    def load(self, version: int | None, running: InFlight | None) -> tuple[int, float]:
        """Other weights."""
        self.version = version
        return version or 0, 0.0


class Tool(MultiTurnScheduler):
    """Answers whoever calls a tool."""

    def check_finished(self, infer_request: Request, response_choice: Choice, current_turn: int) -> bool:
        return "tool" not in response_choice.message.content

    def step(self, infer_request: Request, response_choice: Choice, current_turn: int) -> Mapping[str, Any]:
        infer_request.messages.append({"role": "tool", "content": infer_request.data_dict["solution"]})
        return {"infer_request": infer_request, "rollout_infos": {"calls": current_turn}}


def started(*lines: str, several_turns: bool) -> tuple[EngineLoop[Speaking], Episodes]:
    loop = EngineLoop(lambda: Speaking(*lines))
    leader = (lambda: Conversations(Tool(), CHAT, 5.0)) if several_turns else None
    return loop, Episodes(loop, leader, 200)


def group(row: int, seeds: tuple[int, ...], *, several_turns: bool = False) -> Group:
    made = Group.of(
        PROMPTS,
        EpisodeRequest(10 + row, row, seeds),
        Sampling(1.0, 100),
        None,
        EXTRA if several_turns else None,
    )
    made.served = 3
    return made


def test_groups_of_one_turn_begin_together_and_end_each_by_itself() -> None:
    loop, episodes = started("ab", several_turns=False)
    groups = [group(0, (1, 2)), group(1, (3,))]
    answers = [a.result(timeout=10) for a in episodes.begin(groups)]
    assert loop._engine.asked == [[(1, 3), (2, 3)], [(3, 2)]]
    facts, columns, texts, dialogues = answer_of(groups[0], answers[0])
    assert [(f.prompt_id, f.sample, f.row, f.prompt_tokens, f.version) for f in facts] == [
        (10, 0, 0, 3, 3),
        (10, 1, 1, 3, 3),
    ]
    assert {f.newest_version for f in facts} == {None}
    assert texts == ["ab", "ab"]
    assert dialogues == []
    count = facts[0].completion_tokens
    assert columns["loss_mask"][0].tolist() == [False] * 3 + [True] * count  # type: ignore[index]
    assert columns["versions"][1].tolist() == [3] * count  # type: ignore[index]
    loop.close()


def test_conversations_that_begin_together_stay_together_turn_by_turn() -> None:
    """As one call had them; and their seeds are those of their turns."""
    loop, episodes = started("tool", "so", several_turns=True)
    groups = [group(0, (1, 2), several_turns=True), group(1, (3,), several_turns=True)]
    answers = [a.result(timeout=10) for a in episodes.begin(groups)]
    first, second = loop._engine.asked
    assert first == [(1, 3), (2, 3), (3, 2)]
    assert len(second) == 3
    assert not {seed for seed, _ in second} & {1, 2, 3}
    facts, columns, texts, dialogues = answer_of(groups[1], answers[1])
    assert [(f.prompt_id, f.turns, f.failure) for f in facts] == [(11, 2, "")]
    assert facts[0].other_tokens > 0
    assert len(columns["logprobs"][0]) == len(columns["versions"][0]) == facts[0].completion_tokens  # type: ignore[index]
    assert texts == ["so"]
    assert [m["role"] for m in dialogues[0]["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert dialogues[0]["messages"][2]["content"] == "two"
    loop.close()


def test_conversations_that_come_alone_are_led_side_by_side() -> None:
    loop, episodes = started("tool", "so", several_turns=True)
    loop._engine.may_go.clear()
    answers = [episodes.begin([group(row, (row,), several_turns=True)])[0] for row in (0, 1, 0, 1)]
    while loop.unfinished + len(loop._engine.asked) < 2:
        threading.Event().wait(0.001)
    loop._engine.may_go.set()
    turns = [a.result(timeout=10)[0].turns for a in answers]
    assert turns == [2] * 4
    assert len(loop._engine.asked) == 8
    loop.close()


def test_new_weights_between_two_turns_are_in_the_versions() -> None:
    loop, episodes = started("tool", "so", several_turns=True)
    engine = loop._engine
    made = group(0, (1,), several_turns=True)
    engine.may_go.clear()
    (answer,) = episodes.begin([made])
    while not loop.stepping:
        threading.Event().wait(0.001)
    load = loop.load(4, "keep")
    engine.may_go.set()
    load.result(timeout=10)
    (facts,), columns, _, _ = answer_of(made, answer.result(timeout=10))
    assert (facts.version, facts.newest_version) == (3, 4)
    versions = columns["versions"][0].tolist()  # type: ignore[index]
    assert versions == sorted(versions)
    loop.close()


def test_a_cancelled_conversation_leaves_the_engine() -> None:
    loop, episodes = started("tool", "so", several_turns=True)
    loop._engine.may_go.clear()
    (answer,) = episodes.begin([group(0, (1, 2), several_turns=True)])
    while not loop._engine.asked:
        threading.Event().wait(0.001)
    assert answer.cancel()
    loop._engine.may_go.set()
    while loop.unfinished:
        threading.Event().wait(0.001)
    assert loop.sample([]).result(timeout=5) == []
    assert len(loop._engine.asked) == 1
    loop.close()


def test_what_a_hook_raises_before_the_first_turn_is_the_groups_error() -> None:
    class Refuses(Tool):
        def on_trajectory_start(self, requests: list[Request]) -> None:
            raise KeyError("state")

    loop = EngineLoop(lambda: Speaking("tool"))
    episodes = Episodes(loop, lambda: Conversations(Refuses(), CHAT, 5.0), 200)
    (answer,) = episodes.begin([group(0, (1,), several_turns=True)])
    with pytest.raises(Exception, match="on_trajectory_start: KeyError"):
        answer.result(timeout=10)
    loop.close()
