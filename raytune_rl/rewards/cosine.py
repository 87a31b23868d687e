"""The cosine reward: right answers are worth more when short, wrong ones cost less when long.

Source: Yeo et al. 2025, "Demystifying long chain-of-thought reasoning in LLMs", section 4; flags and defaults
as in ms-swift.
"""

from __future__ import annotations

import math
from typing import Any

from raytune_rl.protocol.rewards import Unscored
from raytune_rl.rewards.accuracy import MathAccuracy
from raytune_rl.rewards.base import ORM


class CosineReward(ORM):
    """Half a cosine over the completion's length, from its value at 0 tokens to that at `cosine_max_len`.

    Right (by the `accuracy` reward): from `cosine_min_len_value_correct` down to
    `cosine_max_len_value_correct`; wrong: from `cosine_min_len_value_wrong` up to
    `cosine_max_len_value_wrong`. A longer completion gets the value at the end, where ms-swift lets the curve
    swing back. What `accuracy` cannot score has no cosine reward either.
    """

    def __init__(
        self,
        max_completion_length: int = 512,
        cosine_max_len: int | None = None,
        cosine_min_len_value_wrong: float = -0.5,
        cosine_max_len_value_wrong: float = 0.0,
        cosine_min_len_value_correct: float = 1.0,
        cosine_max_len_value_correct: float = 0.5,
    ) -> None:
        super().__init__()
        self._accuracy = MathAccuracy()
        self._max_len = cosine_max_len or max_completion_length
        self._wrong = (cosine_min_len_value_wrong, cosine_max_len_value_wrong)
        self._correct = (cosine_min_len_value_correct, cosine_max_len_value_correct)

    def __call__(
        self,
        completions: list[str],
        solution: list[str | float | None],
        completion_tokens: list[int],
        **kwargs: Any,
    ) -> list[float | Unscored]:
        right = self._accuracy(completions, solution)
        return [
            verdict if isinstance(verdict, Unscored) else self._value(verdict >= 1, tokens)
            for verdict, tokens in zip(right, completion_tokens, strict=True)
        ]

    def _value(self, correct: bool, tokens: int) -> float:
        short, long = self._correct if correct else self._wrong
        way = (1 - math.cos(math.pi * min(tokens / self._max_len, 1.0))) / 2
        return short + (long - short) * way
