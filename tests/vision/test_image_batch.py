"""Micro-batches with pictures give the losses and gradients that plain Transformers gives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from raytune_rl.data.collate import MicroBatch
from raytune_rl.data.encode import EncodedSFT, MediaSettings, encode_sft
from raytune_rl.data.example import Example, Message
from raytune_rl.data.media_batch import MediaCollator
from raytune_rl.data.media_processor import Decoded, MediaProcessor
from raytune_rl.data.media_table import media_of
from raytune_rl.errors import DataError
from raytune_rl.models.tuner import apply_tuner, trains_vision
from raytune_rl.protocol.media import MediaLimits
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.tiny.shapes import draw
from tests.vision.scoring import score

PAD = 0
BOT = Message("assistant", "A red square.")


@pytest.fixture(scope="module")
def vision(tiny_vl: Path) -> MediaProcessor:
    return MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl))


@pytest.fixture
def model(tiny_vl: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny_vl).eval()


@pytest.fixture(scope="module")
def encoded(vision: MediaProcessor, tmp_path_factory: pytest.TempPathFactory) -> EncodedSFT:
    """One picture; none; two of other sizes over two turns; the first one again."""
    root = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(56, 56), (112, 56), (84, 140)]):
        draw("blue", "circle", random.Random(number)).resize(size).save(root / f"{number}.png")
    a, b, c = (str(root / f"{n}.png") for n in range(3))
    examples = [
        Example((Message("user", "<image>Which shape is it?"), BOT), images=(a,)),
        Example((Message("user", "How are you?"), Message("assistant", "Well."))),
        Example(
            (
                Message("user", "<image>What?"),
                BOT,
                Message("user", "And <image>?"),
                Message("assistant", "Blue."),
            ),
            images=(c, b),
        ),
        Example((Message("user", "Look <image>"), Message("assistant", "A circle it is.")), images=(a,)),
    ]
    return encode_sft(examples, vision.processor.tokenizer, media=MediaSettings(vision))


def collate(collator: MediaCollator, encoded: EncodedSFT, rows: list[int]) -> MicroBatch:
    return collator.collate(
        [encoded.tokens[row] for row in rows],
        [encoded.loss_mask[row] for row in rows],
        [media_of(encoded.media, row) for row in rows],
        pad_token_id=PAD,
    )


def plain_loss(model: Any, vision: MediaProcessor, encoded: EncodedSFT, row: int) -> tuple[float, int]:
    """Transformers' own loss for a row alone, from its own processor, and its number of loss tokens."""
    tokens, mask = encoded.tokens[row], encoded.loss_mask[row]
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    images = [Image.open(p.files[0].path) for p in media_of(encoded.media, row) if p.files[0].path]
    inputs = dict(vision.processor.image_processor(images, return_tensors="pt")) if images else {}
    labels = ids.masked_fill(~torch.from_numpy(mask)[None], -100)
    types = (ids == vision.processor.image_token_id).int()
    loss = model(input_ids=ids, labels=labels, mm_token_type_ids=types, **inputs).loss
    return float(loss), int(mask.sum())


def gradients(model: Any) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_the_padded_loss_is_that_of_plain_transformers(
    vision: MediaProcessor, encoded: EncodedSFT, model: Any
) -> None:
    micro = collate(MediaCollator(vision), encoded, [2, 1, 0, 3])
    assert micro.position_ids is None
    assert micro.model_inputs["image_grid_thw"].shape == (4, 3)
    with torch.no_grad():
        logprobs = score(model, micro)
        alone = [plain_loss(model, vision, encoded, row) for row in (2, 1, 0, 3)]
    for row, (loss, count) in enumerate(alone):
        mine = -logprobs[micro.row_of == row]
        assert len(mine) == count
        assert mine.mean().item() == pytest.approx(loss, abs=1e-5), row
    whole = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    assert -logprobs.mean().item() == pytest.approx(whole, abs=1e-5)


def test_what_the_picture_shows_matters(vision: MediaProcessor, encoded: EncodedSFT, model: Any) -> None:
    micro = collate(MediaCollator(vision), encoded, [0])
    with torch.no_grad():
        right = score(model, micro)
        micro.model_inputs["pixel_values"].neg_()
        wrong = score(model, micro)
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [[0, 3], [2, 1], [0], [3, 2]])
def test_pixels_put_together_are_those_made_together(
    vision: MediaProcessor, encoded: EncodedSFT, rows: list[int]
) -> None:
    collator = MediaCollator(vision)
    again = [collate(collator, encoded, rows).model_inputs for _ in range(2)]
    images = [
        [vision.read(p).content for p in media_of(encoded.media, row)]
        for row in rows
        if media_of(encoded.media, row)
    ]
    together = vision.processor(images=images, return_tensors="pt")
    for name in ("pixel_values", "image_grid_thw"):
        torch.testing.assert_close(again[0][name], together[name])
        torch.testing.assert_close(again[1][name], again[0][name], rtol=0, atol=0)


def test_rows_of_unlike_shapes_are_left_to_the_processor(
    vision: MediaProcessor, encoded: EncodedSFT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for models that pad pictures to each other: joined only where the shapes agree."""
    calls: list[int] = []

    def tiles(self: MediaProcessor, rows: Any) -> dict[str, torch.Tensor]:
        calls.append(len(rows))
        return {"pixel_values": torch.ones(len(rows), max(len(row) for row in rows), 2)}

    monkeypatch.setattr(MediaProcessor, "pixels", tiles)
    made = collate(MediaCollator(vision), encoded, [0, 2]).model_inputs["pixel_values"]
    assert made.shape == (2, 2, 2)
    assert calls == [1, 1, 2]
    calls.clear()
    made = collate(MediaCollator(vision), encoded, [0, 3]).model_inputs["pixel_values"]
    assert made.shape == (2, 1, 2)
    assert calls == [1], "the second row shows the same picture"


def test_pixels_are_kept_within_a_limit(
    vision: MediaProcessor, encoded: EncodedSFT, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = MediaProcessor.pixels
    monkeypatch.setattr(MediaProcessor, "pixels", lambda self, rows: made.append(rows) or real(self, rows))
    size = real(vision, [[Decoded("image", Image.new("RGB", (56, 56)))]])["pixel_values"].nbytes + 24
    roomy, narrow = MediaCollator(vision, cache_bytes=10 * size), MediaCollator(vision, cache_bytes=size)
    for _ in range(3):
        collate(roomy, encoded, [0])
        collate(roomy, encoded, [2])
    assert len(made) == 2
    made.clear()
    for _ in range(3):
        collate(narrow, encoded, [0])
        collate(narrow, encoded, [2])
    assert len(made) == 6


def test_pixels_made_ahead_are_the_same(vision: MediaProcessor, encoded: EncodedSFT) -> None:
    plain, ahead = MediaCollator(vision), MediaCollator(vision, threads=2)
    ahead.expect(media_of(encoded.media, row) for row in (2, 1, 0, 3))
    for rows in ([2, 1], [0, 3]):
        mine, theirs = (collate(c, encoded, rows).model_inputs for c in (ahead, plain))
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)


def test_pixels_come_in_the_models_type(vision: MediaProcessor, encoded: EncodedSFT) -> None:
    inputs = collate(MediaCollator(vision, dtype=torch.bfloat16), encoded, [0]).model_inputs
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["image_grid_thw"].dtype == torch.int64


@pytest.mark.parametrize("rows", [[1], []])
def test_a_grey_picture_touches_the_tower_with_a_gradient_of_exactly_zero(
    vision: MediaProcessor, encoded: EncodedSFT, model: Any, rows: list[int]
) -> None:
    bare, always = MediaCollator(vision), MediaCollator(vision, always=("image",))
    without, with_grey = collate(bare, encoded, rows), collate(always, encoded, rows)
    assert "pixel_values" not in without.model_inputs
    assert with_grey.model_inputs["pixel_values"].shape[0] > 0
    assert with_grey.n_rows == without.n_rows == len(rows)
    assert with_grey.targets.tolist() == without.targets.tolist()

    score(model, without).sum().backward()
    expected = gradients(model)
    assert all(expected[name] is None for name in expected if ".visual." in name)
    model.zero_grad()
    score(model, with_grey).sum().backward()
    for name, found in gradients(model).items():
        assert found is not None, f"{name} takes no part in the collective"
        if expected[name] is None:
            assert not found.any(), name
        else:
            torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-4)


def test_a_row_with_a_picture_needs_no_grey_one(vision: MediaProcessor, encoded: EncodedSFT) -> None:
    micro = collate(MediaCollator(vision, always=("image",)), encoded, [1, 0])
    assert micro.model_inputs["image_grid_thw"].shape == (1, 3)
    assert micro.input_ids.shape[0] == 2


def test_placeholders_that_do_not_fit_the_pixels_are_refused(tiny_vl: Path, encoded: EncodedSFT) -> None:
    other = MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl), MediaLimits(28 * 28 * 2))
    with pytest.raises(DataError, match=r"4 image tokens for [12] features of a micro-batch's images"):
        collate(MediaCollator(other), encoded, [0])


@pytest.mark.parametrize(
    ("tuner", "trains"),
    [
        (TunerSettings("full"), False),
        (TunerSettings("full", freeze_vit=False), True),
        (TunerSettings("full", freeze_aligner=False), True),
        (TunerSettings("lora"), False),
        (TunerSettings("lora", freeze_vit=False), True),
    ],
)
def test_whether_the_tower_trains_is_read_off_the_model(
    model: Any, tuner: TunerSettings, trains: bool
) -> None:
    tuned = apply_tuner(model, tuner).model
    assert trains_vision(tuned) == trains
    names = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert any(".visual." in name for name in names) == trains
    assert any(".language_model." in name for name in names)
