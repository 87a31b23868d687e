"""The R1 format reward."""

from __future__ import annotations

import re
from typing import Any

from raytune_rl.rewards.base import ORM

_R1 = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


class Format(ORM):
    """1.0 if a completion is `<think>...</think>`, white space, `<answer>...</answer>`, else 0.0.

    To the letter, as in ms-swift: neither text before `<think>` nor a newline after the last `</answer>`.
    """

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0 if _R1.fullmatch(text) else 0.0 for text in completions]
