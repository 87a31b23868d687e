"""Prompts with media as vLLM takes them, and the proof that it reads them as the policy does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raytune_rl.data.media_processor import Decoded, MediaProcessor
from raytune_rl.data.video import Video
from raytune_rl.errors import DataError
from raytune_rl.models.load import load_media_processor
from raytune_rl.protocol.media import MediaLimits
from raytune_rl.protocol.rollout import EngineSpec
from raytune_rl.workers.engine_prompt import EnginePrompt


@dataclass(frozen=True)
class EngineMedia:
    """The model's processor, as policy and data task set it up.

    vLLM calls the processor itself. It is given the media decoded in the policy's way, and the prompt with
    one placeholder a medium.
    """

    media: MediaProcessor
    limits: MediaLimits
    videos: bool

    @classmethod
    def of(cls, path: str, spec: EngineSpec) -> EngineMedia | None:
        """For the model in a local directory; None if it takes texts only."""
        if spec.prompt_limits is None:
            return None
        processor = load_media_processor(path, trust_remote_code=spec.trust_remote_code)
        if processor is None:
            return None
        videos = spec.prompt_limits.get("video", 0) > 0
        return cls(MediaProcessor.of(processor, spec.media_limits), spec.media_limits, videos)

    @property
    def processor_settings(self) -> Mapping[str, Any] | None:
        """Settings for vLLM's own copy of the processor; None if pictures come scaled already."""
        max_pixels = self.limits.max_pixels
        if not max_pixels or self.media.limits.max_pixels is not None:
            return None
        # Alone, the name would be taken as the limit of videos too.
        return {"images_kwargs": {"max_pixels": max_pixels}} if self.videos else {"max_pixels": max_pixels}

    def request(self, prompt: EnginePrompt, decoded: dict[str, Decoded]) -> dict[str, Any]:
        """vLLM's form of a prompt.

        Args:
            prompt: With at least one medium.
            decoded: Media by modality and key, kept between the prompts of one call.

        Raises:
            MediaError: A medium's file is gone or is not the one that was tokenized.
        """
        data: dict[str, list[Any]] = {}
        names: dict[str, list[str]] = {}
        for medium in prompt.media:
            key = f"{medium.modality}:{medium.key}"
            if key not in decoded:
                decoded[key] = self.media.read(medium)
            data.setdefault(medium.modality, []).append(_as_engine_takes(decoded[key]))
            # The digests name a medium in vLLM's caches, so that it need not hash pixels.
            names.setdefault(medium.modality, []).append(medium.key)
        return {
            "prompt_token_ids": prompt.engine_prompt_ids.tolist(),
            "multi_modal_data": data,
            "multi_modal_uuids": names,
        }


def _as_engine_takes(decoded: Decoded) -> Any:
    if isinstance(decoded.content, Video):
        # Frames were chosen already: it must not choose among them again.
        return decoded.content.frames, {**decoded.content.metadata, "do_sample_frames": False}
    return decoded.content


def check_prompt(prompt: EnginePrompt, read: Any) -> None:
    """Compares what vLLM made of a prompt with what the policy will train on.

    Raises:
        DataError: They are not the same tokens.
    """
    if prompt.media and not np.array_equal(prompt.tokens, np.asarray(read)):
        modalities = " and ".join(sorted({f"{medium.modality}s" for medium in prompt.media}))
        raise DataError(
            f"vLLM reads a prompt with {modalities} as {len(read)} tokens, the policy as "
            f"{len(prompt.tokens)}: "
            "their processors differ, so what is sampled could not be trained on"
        )
