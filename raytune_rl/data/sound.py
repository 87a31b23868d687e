"""Sound: from an encoded file to samples. PyAV (FFmpeg) decodes."""

from __future__ import annotations

import io

import av
import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.example import FileRef
from raytune_rl.data.media import MediaError, shown


def decode_audio(data: bytes, name: FileRef, rate: int) -> NDArray[np.float32]:
    """The sound of a file (or of a video) in one channel.

    Args:
        data: The encoded bytes.
        name: What an error calls it.
        rate: Samples a second of the result.

    Returns:
        float32 `[samples]`, between -1 and 1.

    Raises:
        MediaError: The bytes are nothing that FFmpeg knows, or have no sound.
    """
    parts: list[NDArray[np.float32]] = []
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.audio:
                raise MediaError(f"audio {shown(name)} has no sound in it")
            resampler = av.AudioResampler(format="fltp", rate=rate)
            for frame in container.decode(container.streams.audio[0]):
                parts += [_samples(piece) for piece in resampler.resample(frame)]
            parts += [_samples(piece) for piece in resampler.resample(None)]
    except (av.FFmpegError, ValueError, EOFError) as error:
        known = not isinstance(error, av.InvalidDataError)
        why = str(error) if known else "it is no sound in a known format"
        raise MediaError(f"audio {shown(name)} cannot be decoded: {why}") from error
    samples = np.concatenate(parts) if parts else np.empty(0, np.float32)
    if not len(samples):
        raise MediaError(f"audio {shown(name)} is empty")
    return samples


def _samples(frame: av.AudioFrame) -> NDArray[np.float32]:
    # The mean of the channels, as librosa has it: FFmpeg's own mix of two is louder.
    return frame.to_ndarray().mean(axis=0, dtype=np.float32)
