"""The repetition penalty: n-grams that come again cost.

Source: Yeo et al. 2025, "Demystifying long chain-of-thought reasoning in LLMs", appendix; flags and defaults
as in ms-swift, which splits at white space only and so takes a whole Chinese sentence for one word.
"""

from __future__ import annotations

import re
from typing import Any

from raytune_rl.rewards.base import ORM

# Scripts that put no blanks between words: Thai, Lao, Tibetan, Burmese, Khmer, Japanese, Chinese.
_NO_BLANKS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNIT = re.compile(f"[{_NO_BLANKS}]|[^\\s{_NO_BLANKS}]+")


class RepetitionPenalty(ORM):
    """`repetition_max_penalty * (1 - distinct n-grams / all n-grams)`; 0 for fewer than n words.

    Words are what stands between blanks, in lower case; in scripts that are written without blanks (Chinese,
    Japanese, Thai, ...) each character counts as a word.
    """

    def __init__(self, repetition_n_grams: int = 3, repetition_max_penalty: float = -1.0) -> None:
        super().__init__()
        self._n = repetition_n_grams
        self._max_penalty = repetition_max_penalty

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [self._penalty(words(text)) for text in completions]

    def _penalty(self, found: list[str]) -> float:
        total = len(found) - self._n + 1
        if total < 1:
            return 0.0
        distinct = len({tuple(found[start : start + self._n]) for start in range(total)})
        return self._max_penalty * (1 - distinct / total) or 0.0  # not -0.0


def words(text: str) -> list[str]:
    """The words of a text, see `RepetitionPenalty`."""
    return _UNIT.findall(text.lower())
