"""The modalities, and how much of a picture or video the model is shown."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

DEFAULT_FPS = 2.0
"""Frames a second of a video where neither the user nor the model's processor says, as in Qwen's own
preparation of videos."""


@dataclass(frozen=True)
class MediaLimits:
    """The user's limits; None leaves it to the model's processor.

    Attributes:
        max_pixels: Most pixels of a picture.
        video_max_pixels: Most pixels of a frame of a video.
        fps: Frames that are taken of a second of video. A video given as its frames is shown whole, and is
            taken to have so many of them a second.
        fps_max_frames: Most frames of a video; of a longer one, so many at equal distances.
    """

    max_pixels: int | None = None
    video_max_pixels: int | None = None
    fps: float | None = None
    fps_max_frames: int | None = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """The limits among the user's settings, by their names."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


NO_LIMITS = MediaLimits()
"""No limits but those of the model's processor."""


Modality = Literal["image", "video", "audio"]
