"""A prompt as an engine takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.media_table import Medium


@dataclass(frozen=True)
class EnginePrompt:
    """One prompt.

    Attributes:
        tokens: int32, as the policy trains on it.
        engine_prompt_ids: int32, as vLLM takes it: with one placeholder for each medium. The same without
            media.
        media: In their order.
    """

    tokens: NDArray[np.int32]
    engine_prompt_ids: NDArray[np.int32]
    media: tuple[Medium, ...] = ()

    def followed_by(self, tokens: NDArray[np.int32]) -> EnginePrompt:
        """The prompt with what was said since."""
        if not len(tokens):
            return self
        return replace(
            self,
            tokens=np.concatenate([self.tokens, tokens]),
            engine_prompt_ids=np.concatenate([self.engine_prompt_ids, tokens]),
        )
