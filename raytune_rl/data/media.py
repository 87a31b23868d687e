"""Media by reference: from what a row names to encoded bytes, and from those of a picture to an RGB image.

A medium travels encoded (a path or the bytes of its file), never as pixels or samples, which are some twenty
times larger; whoever needs those decodes it.
"""

from __future__ import annotations

import base64
import binascii
import io
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from PIL import Image, ImageOps

from raytune_rl.data.example import FileRef
from raytune_rl.errors import DataError

URL_TIMEOUT_S = 20.0
URL_ATTEMPTS = 3
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


def fetch_medium(ref: FileRef, root: str | None = None, kind: str = "image") -> MediaFile:
    """Reads the encoded bytes of a file.

    Args:
        ref: A path, a `file://`, `http://` or `https://` URL, a base64 data URI, or encoded bytes.
        root: Folder that relative paths start from; the current one unless given.
        kind: What an error calls it: image, video or audio.

    Raises:
        MediaError: There is no such file, the URL does not answer, or the text is none of these.
    """
    if isinstance(ref, bytes):
        return MediaFile(ref, None, digest_of(ref))
    if ref.startswith("data:"):
        data = _from_data_uri(ref, kind)
        return MediaFile(data, None, digest_of(data))
    if ref.startswith(("http://", "https://")):
        data = _download(ref, kind)
        return MediaFile(data, None, digest_of(data))
    path = Path(root or ".").absolute() / Path(ref.removeprefix("file://")).expanduser()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        hint = "" if Path(ref).is_absolute() or "://" in ref else " (--root_image_dir is where they start)"
        raise MediaError(f"{kind} {shown(ref)}: there is no file {shown(str(path))}{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise MediaError(f"{kind} {shown(ref)} cannot be read: {error}") from error
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
    """A reference in an error message: data URIs and bytes only by their beginning or size."""
    if isinstance(ref, bytes):
        return f"of {len(ref)} bytes"
    return repr(ref) if len(ref) <= 200 else f"{ref[:60]!r}..."


def _from_data_uri(uri: str, kind: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise MediaError(f"{kind} {shown(uri)}: a data URI must read data:{kind}/...;base64,...")
    try:
        # Line breaks inside are common, other foreign characters are damage.
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{kind} {shown(uri)}: its base64 text is damaged: {error}") from error


def _download(url: str, kind: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": _AGENT})
    failure: Exception | None = None
    for _ in range(URL_ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT_S) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            failure = error
            if error.code < 500:
                break
        except (OSError, ValueError) as error:
            failure = error
    raise MediaError(f"{kind} {shown(url)} cannot be downloaded: {failure}") from failure


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
