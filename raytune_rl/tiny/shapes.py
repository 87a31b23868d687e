"""Pictures of coloured shapes, with what is to be said about them: chats to imitate, problems for RL."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 40, 180),
    "black": (20, 20, 20),
}
SHAPES = ("square", "circle", "triangle")
QUESTION = "Which shape is it?"


@dataclass(frozen=True)
class ShapeFiles:
    """Where `write_shapes` put its splits (JSONL, UTF-8) and its pictures (PNG)."""

    sft: Path
    held_out: Path
    rl: Path
    images: Path


def draw(colour: str, shape: str, rng: random.Random, side: int = 56) -> Image.Image:
    """A shape of random size and place on a pale ground, RGB of `side` x `side` pixels."""
    pale = rng.randrange(225, 256)
    image = Image.new("RGB", (side, side), (pale, pale, pale))
    width = rng.randrange(side // 2, side - 8)
    left, top = rng.randrange(2, side - width - 2), rng.randrange(2, side - width - 2)
    right, bottom = left + width, top + width
    pen = ImageDraw.Draw(image)
    if shape == "square":
        pen.rectangle((left, top, right, bottom), fill=COLOURS[colour])
    elif shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=COLOURS[colour])
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=COLOURS[colour])
    return image


def write_shapes(
    directory: str | Path, *, train: int = 96, held_out: int = 16, seed: int = 0, side: int = 56
) -> ShapeFiles:
    """Writes `images/*.png`, `sft.jsonl`, `held_out.jsonl` and `rl.jsonl`; deterministic.

    SFT rows (both SFT files) are `{"messages": [user with <image>, assistant], "images": [path]}`; RL rows
    are `{"image": path, "problem": question, "solution": "red square"}`, without a tag, over the training
    pictures. Paths are absolute.

    Args:
        directory: Made if missing; files of those names are replaced.
        train: Pictures to train on.
        held_out: Further pictures.
        seed: Of all draws.
        side: Width and height of a picture, pixels.
    """
    rng = random.Random(seed)
    root = Path(directory).absolute()
    files = ShapeFiles(root / "sft.jsonl", root / "held_out.jsonl", root / "rl.jsonl", root / "images")
    files.images.mkdir(parents=True, exist_ok=True)
    captions: list[tuple[str, str]] = []
    for number in range(train + held_out):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        path = files.images / f"{number:04}.png"
        draw(colour, shape, rng, side).save(path)
        captions.append((str(path), f"{colour} {shape}"))
    _write_jsonl(files.sft, (_chat(*caption) for caption in captions[:train]))
    _write_jsonl(files.held_out, (_chat(*caption) for caption in captions[train:]))
    _write_jsonl(
        files.rl, ({"image": p, "problem": QUESTION, "solution": caption} for p, caption in captions[:train])
    )
    return files


def corpus() -> list[str]:
    """The text that a tokenizer learns the captions' words from."""
    return [f"{QUESTION} A {colour} {shape}." for colour in COLOURS for shape in SHAPES] * 5


def _chat(path: str, caption: str) -> dict[str, object]:
    user = {"role": "user", "content": f"<image>{QUESTION}"}
    answer = {"role": "assistant", "content": f"A {caption}."}
    return {"messages": [user, answer], "images": [path]}


def _write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
