"""Videos: which frames are shown to a model, and their pixels. PyAV (FFmpeg) decodes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raytune_rl.data.example import FileRef
from raytune_rl.data.media import MediaError, shown, within

Choose = Callable[[dict[str, Any]], Sequence[int]]
"""From what is known of a video (see `Video.metadata`) to the numbers of the frames wanted, ascending."""


@dataclass(frozen=True)
class Video:
    """Frames of a video, decoded.

    Attributes:
        frames: uint8 RGB `[n, height, width, 3]`.
        metadata: As Transformers' `VideoMetadata`: total_num_frames, fps, width, height, duration in seconds,
            and frames_indices, the numbers of these frames among all.
    """

    frames: NDArray[np.uint8]
    metadata: dict[str, Any]


def decode_video(data: bytes, name: FileRef, choose: Choose, max_pixels: int | None = None) -> Video:
    """The chosen frames of a video's file.

    Args:
        data: The encoded bytes.
        name: What an error calls it.
        choose: Says which frames are wanted.
        max_pixels: Larger frames are scaled down to this many pixels, keeping their shape.

    Raises:
        MediaError: The bytes are no video that FFmpeg knows, or it has no frame.
    """
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            total, fps = _counted(container, name)
        while True:
            wanted = np.asarray(choose(_metadata(total, fps)), dtype=np.int64)
            frames, seen = _read(data, set(wanted.tolist()), max_pixels)
            if len(frames) == len(set(wanted.tolist())):
                break
            # Not every packet has become a frame (an edit list, a damaged end): what there is counts.
            if not seen or seen >= total:
                raise MediaError(f"video {shown(name)} cannot be decoded: it has no frame that can be shown")
            total = seen
    except (av.FFmpegError, ValueError, EOFError) as error:
        raise MediaError(f"video {shown(name)} cannot be decoded: {_why(error)}") from error
    picked = np.stack([frames[number] for number in wanted.tolist()])
    return Video(picked, _metadata(total, fps, picked.shape[2], picked.shape[1], wanted))


def video_of_frames(pictures: Sequence[Image.Image], fps: float, max_pixels: int | None = None) -> Video:
    """A video that is given as its frames, all of which are shown.

    Raises:
        MediaError: They are not of one size.
    """
    pictures = [picture if max_pixels is None else within(picture, max_pixels) for picture in pictures]
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        raise MediaError(f"the frames of a video have {len(sizes)} sizes, such as {sizes[0]} and {sizes[1]}")
    width, height = sizes[0]
    frames = np.stack([np.asarray(picture) for picture in pictures])
    return Video(frames, _metadata(len(frames), fps, width, height, np.arange(len(frames))))


def _counted(container: Any, name: FileRef) -> tuple[int, float]:
    """Frames, and frames a second."""
    if not container.streams.video:
        raise MediaError(f"video {shown(name)} has no picture, only sound")
    stream = container.streams.video[0]
    fps = float(stream.average_rate or stream.guessed_rate or 0) or 1.0
    total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    if not total:
        raise MediaError(f"video {shown(name)} has no frames")
    return int(total), fps


def _read(data: bytes, wanted: set[int], max_pixels: int | None) -> tuple[dict[int, NDArray[np.uint8]], int]:
    """The wanted frames by number, as far as they are there, and how many were seen."""
    found: dict[int, NDArray[np.uint8]] = {}
    seen = 0
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            seen = number + 1
            if number in wanted:
                found[number] = _pixels(frame, max_pixels)
            if len(found) == len(wanted):
                break
    return found, seen


def _pixels(frame: Any, max_pixels: int | None) -> NDArray[np.uint8]:
    picture = frame.to_image() if max_pixels is None else within(frame.to_image(), max_pixels)
    pixels = np.asarray(picture.convert("RGB"))
    turned = int(getattr(frame, "rotation", 0) or 0)  # a phone's, degrees counterclockwise
    return np.ascontiguousarray(np.rot90(pixels, turned // 90)) if turned % 90 == 0 and turned else pixels


def _metadata(
    total: int,
    fps: float,
    width: int | None = None,
    height: int | None = None,
    indices: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    return {
        "total_num_frames": total,
        "fps": fps,
        "width": width,
        "height": height,
        "duration": total / fps,
        "video_backend": "pyav",
        "frames_indices": None if indices is None else indices.tolist(),
    }


def _why(error: Exception) -> str:
    return "it is no video in a known format" if isinstance(error, av.InvalidDataError) else str(error)
