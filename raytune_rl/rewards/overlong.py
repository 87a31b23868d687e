"""The soft penalty for completions that come near the length limit.

Source: Yu et al. 2025 (DAPO), section 3.4, eq. 13; flags as in ms-swift.
"""

from __future__ import annotations

from typing import Any

from raytune_rl.errors import RewardError
from raytune_rl.rewards.base import ORM


class SoftOverlong(ORM):
    """`min(-(tokens - (soft_max_length - soft_cache_length)) / soft_cache_length, 0)`.

    0 up to `soft_max_length - soft_cache_length` tokens, from there evenly down to -1 at `soft_max_length`.
    """

    def __init__(
        self,
        soft_cache_length: int | None = None,
        soft_max_length: int | None = None,
        max_completion_length: int = 512,
    ) -> None:
        super().__init__()
        longest = soft_max_length or max_completion_length
        if soft_cache_length is None or not 0 < soft_cache_length < longest:
            raise RewardError(
                f"--soft_cache_length is {soft_cache_length}; soft_overlong needs the number of tokens "
                f"before the limit ({longest}) in which the penalty grows, between 1 and {longest - 1}."
            )
        self._cache = soft_cache_length
        self._free = longest - soft_cache_length

    def __call__(self, completions: list[str], completion_tokens: list[int], **kwargs: Any) -> list[float]:
        return [min((self._free - tokens) / self._cache, 0.0) for tokens in completion_tokens]
