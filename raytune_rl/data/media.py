"""Media by reference: from what a row names to encoded bytes, and from those of a picture to an RGB image.

A medium travels encoded (a path or the bytes of its file), never as pixels or samples, which are some twenty
times larger; whoever needs those decodes it.
"""

from __future__ import annotations

import base64
import binascii
import io
import time
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from hashlib import blake2b
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from PIL import Image, ImageOps

from raytune_rl.data.example import FileRef
from raytune_rl.errors import DataError
from raytune_rl.redaction import redact_text

URL_TIMEOUT_S = 20.0
"""The longest silence of a server."""
URL_DOWNLOAD_S = 300.0
"""The longest that one file may take from its URL, however steadily it comes."""
URL_MAX_BYTES = 512 * 2**20
"""The largest file that is taken from a URL; what lies on disk may be larger."""
URL_ATTEMPTS = 3
_CHUNK = 2**16
# Some hosts answer the default agent of urllib with 403.
_AGENT = "Mozilla/5.0 (compatible; raytune_rl)"


class MediaError(DataError):
    """A picture, video or sound cannot be read; the message names it and says why."""


@dataclass(frozen=True)
class MediaFile:
    """A medium's file in memory.

    Attributes:
        data: The encoded bytes (PNG, JPEG, MP4, WAV, ...).
        path: Absolute path, for a local file.
        digest: 64 bits of BLAKE2 over `data`: its name in caches, and proof that a file is still the same.
    """

    data: bytes
    path: str | None
    digest: int


def fetch_medium(ref: FileRef, root: str | None = None, modality: str = "image") -> MediaFile:
    """Reads the encoded bytes of a file.

    Args:
        ref: A path, a `file://`, `http://` or `https://` URL, a base64 data URI, or encoded bytes.
        root: Folder that relative paths start from; the current one unless given.
        modality: What an error calls it: image, video or audio.

    Raises:
        MediaError: There is no such file, the text is none of these, or the URL does not answer, gives more
            than `URL_MAX_BYTES` or takes longer than `URL_DOWNLOAD_S`.
    """
    if isinstance(ref, bytes):
        return MediaFile(ref, None, digest_of(ref))
    if ref.startswith("data:"):
        data = _from_data_uri(ref, modality)
        return MediaFile(data, None, digest_of(data))
    if ref.startswith(("http://", "https://")):
        data = _download(ref, modality)
        return MediaFile(data, None, digest_of(data))
    path = Path(root or ".").absolute() / Path(ref.removeprefix("file://")).expanduser()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        hint = "" if Path(ref).is_absolute() or "://" in ref else " (--root_image_dir is where they start)"
        raise MediaError(f"{modality} {shown(ref)}: there is no file {shown(str(path))}{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise MediaError(f"{modality} {shown(ref)} cannot be read: {error}") from error
    return MediaFile(data, str(path), digest_of(data))


def decode_image(data: bytes, name: FileRef = b"", max_pixels: int | None = None) -> Image.Image:
    """The picture as RGB, turned as its EXIF data says; transparent parts become white.

    Args:
        data: Encoded bytes.
        name: What the error calls it.
        max_pixels: A larger picture is scaled down to this many pixels, keeping its shape.

    Raises:
        MediaError: The bytes are no picture that Pillow knows, or are cut off.
    """
    try:
        with warnings.catch_warnings():
            # A bomb that Pillow would only warn of is still a picture; the one it refuses is an error below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            image.load()
            image = _rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's message holds the address of the buffer, which tells nobody anything.
        why = "it is no picture in a known format" if "cannot identify" in str(error) else str(error)
        raise MediaError(f"image {shown(name)} cannot be decoded: {why}") from error
    return image if max_pixels is None else within(image, max_pixels)


def within(image: Image.Image, max_pixels: int) -> Image.Image:
    """The picture, scaled down to this many pixels if it has more, keeping its shape."""
    width, height = image.size
    if width * height <= max_pixels:
        return image
    factor = (max_pixels / (width * height)) ** 0.5
    size = (max(int(width * factor), 1), max(int(height * factor), 1))
    return image.resize(size, Image.Resampling.BICUBIC)


def digest_of(data: bytes) -> int:
    """The digest of `MediaFile`."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def shown(ref: FileRef) -> str:
    """A reference in an error message: data URIs and bytes only by their beginning or size, URLs without
    their secrets.
    """
    if isinstance(ref, bytes):
        return f"of {len(ref)} bytes"
    ref = ref if ref.startswith("data:") else redact_text(ref)
    return repr(ref) if len(ref) <= 200 else f"{ref[:60]!r}..."


def _from_data_uri(uri: str, modality: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise MediaError(f"{modality} {shown(uri)}: a data URI must read data:{modality}/...;base64,...")
    try:
        # Line breaks inside are common, other foreign characters are damage.
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{modality} {shown(uri)}: its base64 text is damaged: {error}") from error


def _download(url: str, modality: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": _AGENT})
    failure: Exception | None = None
    deadline = time.monotonic() + URL_DOWNLOAD_S
    for _ in range(URL_ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT_S) as answer:
                return _within_limits(answer, f"{modality} {shown(url)}", deadline)
        except urllib.error.HTTPError as error:
            failure = error
            if error.code < 500:
                break
        except (OSError, HTTPException, ValueError) as error:
            failure = error
    raise MediaError(f"{modality} {shown(url)} cannot be downloaded: {failure}") from failure


def _within_limits(answer: HTTPResponse, name: str, deadline: float) -> bytes:
    """The body, given up where it becomes too large or takes too long."""
    announced = int(answer.headers.get("Content-Length") or 0)
    parts, size = [], 0
    while announced <= URL_MAX_BYTES and size <= URL_MAX_BYTES:
        # Whatever has arrived, or a server that sends a byte a second would be waited for.
        part = answer.read1(_CHUNK)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise MediaError(
                f"{name} took longer than {URL_DOWNLOAD_S:.0f} s to download ({size:,} bytes came): download "
                "it yourself, and give its path"
            )
    if max(announced, size) > URL_MAX_BYTES:
        raise MediaError(
            f"{name} is larger than {URL_MAX_BYTES:,} bytes, the most that is taken from a URL: download it "
            "yourself, and give its path"
        )
    if size < announced:
        raise HTTPException(f"the connection ended after {size:,} of {announced:,} bytes")
    return b"".join(parts)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
