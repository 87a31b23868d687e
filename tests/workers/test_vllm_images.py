"""A prompt with pictures on its way into vLLM: what is handed over, and what is refused on the way back."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raytune_rl.data.media import MediaFile, digest_of
from raytune_rl.data.media_processor import Decoded
from raytune_rl.data.media_table import Medium
from raytune_rl.errors import DataError
from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.media import MediaLimits
from raytune_rl.protocol.rollout import EngineSpec
from raytune_rl.tiny.vision import make_tiny_vision_model
from raytune_rl.workers.episodes import read_prompt
from raytune_rl.workers.vllm_media import EngineMedia, check_prompt
from tests.columns import media_columns


def picture(side: int) -> Medium:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return Medium.of("image", [MediaFile(file.getvalue(), None, digest_of(file.getvalue()))], inline=True)


def columns() -> dict:
    """One prompt with two pictures, one without."""
    return {
        "prompt": Ragged.from_rows([[1, 9, 9, 2, 9], [3, 4]], np.int32),
        "engine_prompt_ids": Ragged.from_rows([[1, 9, 2, 9], [3, 4]], np.int32),
        **media_columns([[picture(56), picture(28)], []]),
    }


def test_what_vllm_expands_must_be_what_the_policy_has() -> None:
    shown, text = read_prompt(columns(), 0), read_prompt(columns(), 1)
    assert shown.engine_prompt_ids.tolist() == [1, 9, 2, 9]
    assert text.media == ()
    check_prompt(shown, [1, 9, 9, 2, 9])
    with pytest.raises(DataError, match="a prompt with images as 4 tokens, the policy as 5"):
        check_prompt(shown, [1, 9, 2, 9])


def test_pictures_are_decoded_once_and_named_by_their_digest(tmp_path: Path) -> None:
    model = str(make_tiny_vision_model(tmp_path / "model"))
    spec = EngineSpec(
        model, "float32", 64, "store", 10.0, prompt_limits={"image": 2}, media_limits=MediaLimits(1568)
    )
    images = EngineMedia.of(model, spec)
    assert images is not None
    assert images.processor_settings == {"max_pixels": 1568}, "this processor has such a limit of its own"
    prompt = read_prompt(columns(), 0)
    decoded: dict[str, Decoded] = {}
    request = images.request(prompt, decoded)
    assert request["prompt_token_ids"] == [1, 9, 2, 9]
    assert [image.size for image in request["multi_modal_data"]["image"]] == [(56, 56), (28, 28)]
    assert len(set(request["multi_modal_uuids"]["image"])) == 2
    again = images.request(prompt, decoded)
    assert again["multi_modal_data"]["image"][0] is request["multi_modal_data"]["image"][0]
    assert EngineMedia.of(model, EngineSpec(model, "float32", 64, "store", 10.0)) is None
