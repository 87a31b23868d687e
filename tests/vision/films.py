"""Films and sounds as files, made here."""

from __future__ import annotations

import io
import wave

import av
import numpy as np


def film(frames: int = 12, fps: int = 4, size: tuple[int, int] = (64, 48), *, sound: bool = False) -> bytes:
    """An MP4 whose frame `i` is a grey of `16 * i`; MPEG-4, which every build of FFmpeg writes."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps, options={"qscale:v": "1"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if sound:
            heard = container.add_stream("aac", rate=16000)
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 16 * number % 256, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
        if sound:
            samples = np.zeros((1, 16000), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16000
            for packet in [*heard.encode(frame), *heard.encode()]:
                container.mux(packet)
    return file.getvalue()


def tone(seconds: float = 1.0, *, rate: int = 44100, channels: int = 2, hertz: float = 440.0) -> bytes:
    """A WAV of a sine of half the full loudness."""
    at = np.arange(int(seconds * rate)) / rate
    samples = (np.sin(2 * np.pi * hertz * at) * 2**14).astype(np.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.repeat(samples, channels).tobytes())
    return file.getvalue()
