"""What an engine takes, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.media_table import Medium
from raytune_rl.protocol.rollout import Sampling


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


@dataclass(frozen=True)
class Ask:
    """One completion that is wanted.

    Attributes:
        prompt: To be completed.
        seed: Of the completion.
        sampling: How tokens are drawn.
        limit: Most tokens.
    """

    prompt: EnginePrompt
    seed: int
    sampling: Sampling
    limit: int


@dataclass(frozen=True)
class Sampled:
    """One completion as the engine gave it.

    Attributes:
        tokens: int32 `[n]`, the end token included.
        logprobs: float32 `[n]`, of the distribution that was sampled from (after temperature and the like).
        text: Decoded without special tokens.
        finish_reason: "stop" or "length".
        versions: int32 `[n]`, the weights that each token was sampled with.
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    text: str
    finish_reason: str
    versions: NDArray[np.int32]
