"""A head of one output over a vision model: what a critic sees in a picture, trained, saved and loaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from raytune_rl.data.collate import MicroBatch
from raytune_rl.data.encode import MediaSettings, encode_sft
from raytune_rl.data.example import Example, Message
from raytune_rl.data.media_batch import MediaCollator
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import media_of
from raytune_rl.models.load import load_model
from raytune_rl.models.scalar import ScalarScorer
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import save_model
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.tiny.shapes import draw
from raytune_rl.workers.scoring import forward_inputs


def micro_batch(tiny_vl: Path, root: Path, color: str) -> MicroBatch:
    """A row with a picture of this colour, and one without."""
    vision = MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl))
    draw(color, "circle", random.Random(1)).save(root / f"{color}.png")
    turns = (Message("user", "<image>Which colour?"), Message("assistant", "It is red."))
    examples = [
        Example(turns, images=(str(root / f"{color}.png"),)),
        Example((Message("user", "How are you?"), Message("assistant", "Well."))),
    ]
    rows = encode_sft(examples, vision.processor.tokenizer, media=MediaSettings(vision))
    return MediaCollator(vision).collate(
        [rows.tokens[row] for row in range(2)],
        [rows.loss_mask[row] for row in range(2)],
        [media_of(rows.media, row) for row in range(2)],
        pad_token_id=0,
    )


@pytest.mark.parametrize("tuner_type", ["full", "lora"])
def test_values_depend_on_the_picture_and_survive_a_checkpoint(
    tiny_vl: Path, tmp_path: Path, tuner_type: Any
) -> None:
    torch.manual_seed(1)
    settings = TunerSettings(tuner_type, lora_dropout=0.0)
    tuned = apply_tuner(load_model(str(tiny_vl), scalar=True).model, settings)
    trained = [name for name, p in tuned.model.named_parameters() if p.requires_grad]
    assert any("score" in name for name in trained)
    assert not any("visual" in name for name in trained), "the tower is frozen, the head is not part of it"
    scorer = ScalarScorer(tuned.model).eval()
    scorer.verify()
    red, blue = (micro_batch(tiny_vl, tmp_path, color) for color in ("red", "blue"))
    values = scorer(**forward_inputs(red, "values"))
    with torch.no_grad():
        for parameter in tuned.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
        values = scorer(**forward_inputs(red, "values"))
        others = scorer(**forward_inputs(blue, "values"))
    of_picture = (red.row_of == 0).numpy()
    assert (np.abs((values - others).numpy())[of_picture] > 1e-4).all()
    torch.testing.assert_close(values[~of_picture], others[~of_picture], rtol=0, atol=1e-6)
    save_model(scorer, tmp_path / "saved")
    if tuner_type == "full":
        found = load_model(str(tmp_path / "saved"), scalar=True)
        assert not found.new_head
        again = ScalarScorer(found.model)
    else:
        base = load_model(str(tiny_vl), scalar=True).model
        again = ScalarScorer(apply_tuner(base, settings, [str(tmp_path / "saved")]).model)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**forward_inputs(red, "values")), values, rtol=0, atol=1e-6)
