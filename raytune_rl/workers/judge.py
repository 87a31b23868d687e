"""One reward model that a plugin asks: `genrm`, or a class of the user's."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.example import Message
from raytune_rl.data.model_tokens import as_ids
from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import Unscored
from raytune_rl.rewards.judge import plugin_class
from raytune_rl.rewards.registry import describe_error


class JudgeTemplate:
    """Conversations as the model's tokens, for plugins.

    Attributes:
        tokenizer: The model's.
        stop_token_ids: Tokens that end a turn.
        max_tokens: Token budget of a pass.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._chat = replace(ChatTemplate.of(tokenizer), eos_token_ids=eos_token_ids)
        self.stop_token_ids = self._chat.stop_token_ids()

    def prompt(self, request: Any) -> list[int]:
        """Ids of a conversation, up to where the model answers."""
        return self._ids(request, generation_prompt=True)

    def encode(self, request: Any) -> dict[str, list[int]]:
        """Ids of a whole conversation, as a classifier reads it."""
        return {"input_ids": self._ids(request, generation_prompt=False)}

    def data_collator(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """Rows of `encode`, padded on the right: int64 tensors `[rows, longest]`."""
        import torch

        ids = [torch.tensor(row["input_ids"]) for row in rows]
        pad = self.tokenizer.pad_token_id or 0
        masks = [torch.ones_like(row) for row in ids]
        padded = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": padded(ids, batch_first=True, padding_value=pad),
            "attention_mask": padded(masks, batch_first=True),
        }

    def _ids(self, request: Any, *, generation_prompt: bool) -> list[int]:
        turns = request["messages"] if isinstance(request, Mapping) else request.messages
        text = self._chat.render(
            [Message(turn["role"], turn["content"]) for turn in turns], generation_prompt=generation_prompt
        )
        return self.tokenizer.encode(text, add_special_tokens=False)


class Judge:
    """A model and the plugin that asks it.

    Args:
        name: Registered name of the plugin.
        model: In eval mode, on its device.
        tokenizer: Its own.
        max_tokens: Token budget of a pass.

    Raises:
        RewardError: The plugin is not registered, or cannot be made.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, max_tokens: int) -> None:
        self._name = name
        plugin_type = plugin_class(name)
        try:
            self._plugin = plugin_type(
                model=model, template=JudgeTemplate(tokenizer, max_tokens, _listed_ends(model))
            )
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(f"--reward_model_plugin {name}: {describe_error(error)}") from error

    def score(
        self, inputs: list[dict[str, Any]], trainer_state: Any
    ) -> tuple[NDArray[np.float64], dict[int, str]]:
        """Scores, float64 `[n]`, and why a row has none. What the plugin raises costs the batch its scores.

        Args:
            inputs: "messages", the completion as the last, and the row's columns.
            trainer_state: How far the run has come.
        """
        values = np.full(len(inputs), np.nan)
        try:
            returned = self._plugin(inputs=inputs, trainer_state=trainer_state)
            returned = returned.tolist() if hasattr(returned, "tolist") else list(returned)
            if len(returned) != len(inputs):
                raise RewardError(f"returned {len(returned)} values for {len(inputs)} completions")
            if odd := [v for v in returned if not isinstance(v, (numbers.Real, Unscored, type(None)))]:
                raise RewardError(f"returned a {type(odd[0]).__name__} in place of a number")
        except Exception as error:  # noqa: BLE001, a plugin is the user's: it may raise anything
            why = f"--reward_model_plugin {self._name}: {describe_error(error)}"
            return values, dict.fromkeys(range(len(inputs)), why)
        reasons = {}
        for row, value in enumerate(returned):
            if isinstance(value, Unscored):
                reasons[row] = value.message
            elif value is not None:
                values[row] = float(value)
                if not np.isfinite(values[row]):
                    values[row], reasons[row] = np.nan, f"--reward_model_plugin {self._name}: gave {value}"
        return values, reasons


def _listed_ends(model: Any) -> tuple[int, ...]:
    return as_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def is_classifier(path: str) -> bool:
    """Whether a folder holds a model, or an adapter, with a head for scores."""
    adapter, config = Path(path) / "adapter_config.json", Path(path) / "config.json"
    if adapter.is_file():
        return json.loads(adapter.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"
    if not config.is_file():
        return False
    names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or ()
    return any(str(name).endswith("ForSequenceClassification") for name in names)
