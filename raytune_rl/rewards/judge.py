"""Reward models asked in another way than for one score: `--reward_model_plugin`, by name.

A plugin is a class, made once with the loaded model and its template, and called with conversations:

    from swift.plugin import GenRMPlugin, rm_plugins

    class Strict(GenRMPlugin):
        system = "Grade the last answer ... End with a line `Reward: x`, x from 0 to 1."

    rm_plugins["strict"] = Strict

Names and shapes are ms-swift's: `prepare_rm_inputs` makes the judge's conversations (`messages_to_query` the
text in them), `compute_rewards` reads its answers (`extract_reward` one of them), and any may be overridden.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import Unscored
from raytune_rl.rewards.judge_answers import JudgeAnswer, RequestConfig

_REWARD = re.compile(r"reward\W{0,5}?\s*([-+]?\d+(?:\.\d+)?|[-+]?\.\d+)", re.IGNORECASE)


class DefaultRMPlugin:
    """Asks a classifier: the first logit of the whole conversation."""

    def __init__(self, model: Any, template: Any = None, **kwargs: Any) -> None:
        self.model, self.template = model, template

    def __call__(self, inputs: list[dict[str, Any]], **kwargs: Any) -> Any:
        import torch

        batch = self.template.data_collator([self.template.encode(request) for request in inputs])
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            return self.model(**{name: value.to(device) for name, value in batch.items()}).logits[:, 0]


class GenRMPlugin(DefaultRMPlugin):
    """Asks a language model to grade each conversation, and reads `Reward: x` (0 to 1) from what it says.

    The mean of its answers' rewards; `Unscored` where no answer has one. Answers are greedy.
    """

    system = (
        "You grade the work of an assistant. You are shown a conversation; judge how correct, helpful and "
        "clear the assistant's last answer is. Reason briefly. Then finish with one line of the form\n"
        "Reward: x\n"
        "where x is a number from 0 (wrong or useless) to 1 (nothing to improve)."
    )
    request_config = RequestConfig(max_tokens=1024)

    def __init__(self, model: Any, template: Any, **kwargs: Any) -> None:
        from raytune_rl.rewards.judge_engine import JudgeEngine

        super().__init__(model, template)
        self.engine = JudgeEngine(model, template=template)

    def __call__(self, inputs: list[dict[str, Any]], **kwargs: Any) -> Any:
        answers = self.engine.infer(self.prepare_rm_inputs(inputs), self.request_config)
        return self.compute_rewards(answers)

    def prepare_rm_inputs(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation of the judge for each of `inputs`, which have "messages" and the row's columns."""
        return [
            {
                "messages": [
                    {"role": "system", "content": self.system},
                    {"role": "user", "content": self.messages_to_query(one["messages"])},
                ]
            }
            for one in inputs
        ]

    def compute_rewards(self, results: Sequence[JudgeAnswer]) -> list[float | Unscored]:
        """A reward for each answer of the engine."""
        return [self._reward([choice.message.content for choice in result.choices]) for result in results]

    @staticmethod
    def messages_to_query(messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as a text that a judge can read."""
        return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)

    @staticmethod
    def extract_reward(model_output: str) -> float | None:
        """The last `Reward: x` of an answer with x from 0 to 1, or None."""
        found = [float(number) for number in _REWARD.findall(model_output)]
        return found[-1] if found and 0 <= found[-1] <= 1 else None

    def _reward(self, texts: Sequence[str]) -> float | Unscored:
        found = [reward for text in texts if (reward := self.extract_reward(text)) is not None]
        if not found:
            if not any(texts):
                return Unscored("the judge says nothing: is there room for an answer in its context?")
            return Unscored(f"the judge gives no 'Reward: x', x from 0 to 1; its end: {texts[0][-120:]!r}")
        return sum(found) / len(found)


rm_plugins: dict[str, Any] = {"default": DefaultRMPlugin, "genrm": GenRMPlugin}


def plugin_class(name: str) -> Any:
    """The class registered under a name; plugin files must have been loaded before.

    Raises:
        RewardError: There is none.
    """
    if name in rm_plugins:
        return rm_plugins[name]
    near = difflib.get_close_matches(name, rm_plugins, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RewardError(
        f"--reward_model_plugin {name} is not registered.{hint} There are: {', '.join(rm_plugins)}. A file "
        "of --external_plugins adds one by rm_plugins['name'] = Class."
    )
