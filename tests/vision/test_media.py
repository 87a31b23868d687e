"""Reading pictures: wherever they come from, the same pixels; and what is said when they cannot be read."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from raytune_rl.data import media
from raytune_rl.data.media import MediaError, decode_image, fetch_medium
from raytune_rl.data.media_table import Medium, count_media, media_of
from raytune_rl.protocol.data import MediaCounts
from tests.columns import media_columns


def png(colour: tuple[int, ...] = (200, 10, 10), size: tuple[int, int] = (8, 6), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


class Server(BaseHTTPRequestHandler):
    """Serves one picture; `/flaky.png` fails the first time, `/large.png` says that it has 2000 bytes, and
    `/endless.png` does not end.
    """

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        bad = {"/gone.png": 404, "/flaky.png": 503 if self.asked.count("/flaky.png") == 1 else 200}
        self.send_response(bad.get(self.path, 200))
        if self.path == "/large.png":
            self.send_header("Content-Length", "2000")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(png())
            while self.path == "/endless.png":
                self.wfile.write(b"more")
                time.sleep(0.001)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Server)
    Server.asked.clear()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_every_kind_of_reference_gives_the_same_picture(tmp_path: Path, site: str) -> None:
    data = png()
    (tmp_path / "a.png").write_bytes(data)
    refs = [
        str(tmp_path / "a.png"),
        f"file://{tmp_path}/a.png",
        f"{site}/a.png",
        f"{site}/flaky.png",
        "data:image/png;base64," + base64.b64encode(data).decode(),
        data,
    ]
    found = [fetch_medium(ref) for ref in refs]
    assert {image.data for image in found} == {data}
    assert len({image.digest for image in found}) == 1
    assert [image.path for image in found] == [str(tmp_path / "a.png")] * 2 + [None] * 4
    assert fetch_medium("a.png", str(tmp_path)).path == str(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("nowhere.png", r"'nowhere.png': there is no file '/.*nowhere.png' \(--root_image_dir"),
        ("data:image/png,abc", "must read data:image"),
        ("data:image/png;base64,a$b", "base64 text is damaged"),
        ("{site}/gone.png", "cannot be downloaded: HTTP Error 404"),
        ("/", "cannot be read"),
    ],
)
def test_what_cannot_be_fetched_is_named(ref: str, reason: str, site: str) -> None:
    with pytest.raises(MediaError, match=reason):
        fetch_medium(ref.format(site=site))


def test_a_url_gives_neither_too_much_nor_for_too_long(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MediaError, match=r"cannot be downloaded: .* of 2,000 bytes"):
        fetch_medium(f"{site}/large.png")
    monkeypatch.setattr(media, "URL_DOWNLOAD_S", 0.3)
    with pytest.raises(MediaError, match=r"endless\.png' took longer than 0 s .* give its path"):
        fetch_medium(f"{site}/endless.png", modality="video")
    monkeypatch.setattr(media, "URL_MAX_BYTES", 1000)
    with pytest.raises(MediaError, match=r"large\.png' is larger than 1,000 bytes"):
        fetch_medium(f"{site}/large.png")
    monkeypatch.setattr(media, "URL_MAX_BYTES", 10)
    with pytest.raises(MediaError, match=r"video '.*\?token=\*\*\*' is larger than 10 bytes"):
        fetch_medium(f"{site}/a.png?token=abc", modality="video")
    assert Server.asked.count("/endless.png") == 1, "what is too long is not tried again"


def test_what_cannot_be_decoded_is_named() -> None:
    with pytest.raises(MediaError, match=r"image 'x.png' cannot be decoded: it is no picture"):
        decode_image(b"not a picture", "x.png")
    with pytest.raises(MediaError, match=r"image of 60 bytes cannot be decoded"):
        decode_image(png(size=(300, 300))[:60], png(size=(300, 300))[:60])


def test_colours_alpha_and_orientation_are_settled_here() -> None:
    grey = decode_image(png((77,), mode="L"))
    assert grey.mode == "RGB"
    assert grey.getpixel((0, 0)) == (77, 77, 77)
    half = decode_image(png((0, 0, 0, 0), mode="RGBA"))
    assert half.getpixel((0, 0)) == (255, 255, 255), "transparent is white, not black"
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 6)).save(file, "JPEG", exif=exif)
    assert decode_image(file.getvalue()).size == (6, 8)


def test_max_pixels_scales_down_only_and_keeps_the_shape() -> None:
    data = png(size=(400, 200))
    small = decode_image(data, max_pixels=5000)
    assert small.size == (100, 50)
    assert decode_image(data, max_pixels=10**6).size == (400, 200)


def test_distinct_pictures_lie_in_the_table_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = Medium.of("image", [fetch_medium(str(tmp_path / "a.png"))], inline=False)
    inline = Medium.of("image", [fetch_medium(png((1, 2, 3)))], inline=False)
    columns = media_columns([[path], [], [inline, path], [path]])
    size = len(png((1, 2, 3)))
    assert count_media(columns) == MediaCounts({"image": 4}, {"image": 2}, size, {"image": 2})
    assert all(isinstance(values, np.ndarray) or hasattr(values, "offsets") for values in columns.values())
    rows = [media_of(columns, row) for row in range(4)]
    assert [[p.key for p in row] for row in rows] == [
        [path.key], [], [inline.key, path.key], [path.key]
    ]  # fmt: skip
    assert rows[2][0].read() == [png((1, 2, 3))]
    assert rows[0][0].files[0].path == str(tmp_path / "a.png")
    assert rows[0][0].read() == [png()]
    assert media_columns([[], []]) == {}
    assert media_of({}, 3) == []


def test_a_file_that_changed_after_tokenization_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png())
    (picture,) = media_of(media_columns([[Medium.of("image", [fetch_medium(str(file))], inline=False)]]), 0)
    file.write_bytes(png(size=(99, 99)))
    with pytest.raises(MediaError, match=r"a\.png' has changed since"):
        picture.read()
    inline = Medium.of("image", [fetch_medium(str(file))], inline=True)
    file.unlink()
    assert inline.read() == [png(size=(99, 99))]
    with pytest.raises(MediaError, match="there is no file"):
        picture.read()
