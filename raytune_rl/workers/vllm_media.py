"""Prompts with pictures as vLLM takes them, and the proof that it reads them as the policy does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image

from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.errors import DataError
from raytune_rl.models.load import load_media_processor
from raytune_rl.workers.rollout import EnginePrompt, EngineSpec


@dataclass(frozen=True)
class EngineMedia:
    """The model's processor, as policy and data task set it up.

    vLLM calls the processor itself. It is given the pictures decoded in the policy's way, and the prompt with
    one placeholder a picture.
    """

    vision: MediaProcessor
    max_pixels: int | None

    @classmethod
    def of(cls, path: str, spec: EngineSpec) -> EngineMedia | None:
        """For the model in a local directory; None if it takes texts only."""
        if spec.media_limits is None:
            return None
        processor = load_media_processor(path, trust_remote_code=spec.trust_remote_code)
        return (
            None if processor is None else cls(MediaProcessor.of(processor, spec.max_pixels), spec.max_pixels)
        )

    @property
    def processor_settings(self) -> dict[str, int] | None:
        """What vLLM is to set in its own copy of the processor; None if pictures come scaled already."""
        own_limit = self.max_pixels is not None and self.vision.max_pixels is None
        return {"max_pixels": self.max_pixels} if own_limit and self.max_pixels else None

    def request(self, prompt: EnginePrompt, decoded: dict[int, Image]) -> dict[str, Any]:
        """vLLM's form of a prompt.

        Args:
            prompt: With at least one picture.
            decoded: Pictures by digest, kept between the prompts of one call.

        Raises:
            MediaError: A picture's file is gone or is not the one that was tokenized.
        """
        for picture in prompt.pictures:
            if picture.digest not in decoded:
                decoded[picture.digest] = self.vision.decode(picture.read(), picture.name)
        return {
            "prompt_token_ids": prompt.given.tolist(),
            "multi_modal_data": {"image": [decoded[p.digest] for p in prompt.pictures]},
            # The digest names a picture in vLLM's caches, so that it need not hash pixels.
            "multi_modal_uuids": {"image": [f"{p.digest:016x}" for p in prompt.pictures]},
        }


def check_prompt(prompt: EnginePrompt, read: Any) -> None:
    """Compares what vLLM made of a prompt with what the policy will train on.

    Raises:
        DataError: They are not the same tokens.
    """
    if prompt.pictures and not np.array_equal(prompt.tokens, np.asarray(read)):
        raise DataError(
            f"vLLM reads a prompt with {len(prompt.pictures)} images as {len(read)} tokens, the policy as "
            f"{len(prompt.tokens)}: their image processors differ, so what is sampled could not be trained on"
        )
