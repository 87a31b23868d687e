"""Rows with sound: decoded to the model's rate, and scored as by plain Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from raytune_rl.data.encode import EncodedSFT, MediaSettings, encode_sft
from raytune_rl.data.example import Example, Message, RowError
from raytune_rl.data.media import MediaError
from raytune_rl.data.media_batch import MediaCollator
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import count_media, media_of
from raytune_rl.data.sound import decode_audio
from raytune_rl.models.load import load_model
from raytune_rl.models.tuner import apply_tuner, trains_vision
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.tiny.audio import make_tiny_audio_model
from tests.vision.films import film, tone
from tests.vision.scoring import score

BOT = Message("assistant", "A tone it is.")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_audio_model(tmp_path_factory.mktemp("tiny_audio") / "model")


@pytest.fixture(scope="module")
def media(path: Path) -> MediaProcessor:
    return MediaProcessor.of(AutoProcessor.from_pretrained(path))


@pytest.fixture(scope="module")
def encoded(media: MediaProcessor) -> EncodedSFT:
    """A sound; two sounds of other lengths; texts."""
    examples = [
        Example((Message("user", "<audio>What is it?"), BOT), audios=(tone(0.5),)),
        Example((Message("user", "<audio> or <audio>?"), BOT), audios=(tone(1.1), tone(0.3, hertz=880))),
        Example((Message("user", "How are you?"), Message("assistant", "Well."))),
    ]
    return encode_sft(examples, media.processor.tokenizer, media=MediaSettings(media))


def test_sound_is_brought_to_one_channel_and_rate() -> None:
    samples = decode_audio(tone(0.5, rate=44100, channels=2), "a.wav", 16000)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 8000) <= 32
    assert abs(float(np.abs(samples[1000:7000]).max()) - 0.5) < 0.02
    crossings = int((np.diff(np.sign(samples)) != 0).sum())
    assert abs(crossings - 440) <= 4, "440 Hz for half a second"


def test_the_sound_of_a_film_is_heard() -> None:
    assert len(decode_audio(film(6, 4, sound=True), "a.mp4", 16000)) >= 15000
    with pytest.raises(MediaError, match=r"audio 'mute.mp4' has no sound in it"):
        decode_audio(film(2, 4), "mute.mp4", 16000)
    with pytest.raises(
        MediaError, match=r"audio 'x.wav' cannot be decoded: it is no sound in a known format"
    ):
        decode_audio(b"nonsense" * 20, "x.wav", 16000)


def test_rows_are_scored_as_by_transformers(path: Path, media: MediaProcessor, encoded: EncodedSFT) -> None:
    model = load_model(str(path)).model
    rows = [1, 2, 0]
    micro = MediaCollator(media).collate(
        [encoded.tokens[row] for row in rows],
        [encoded.loss_mask[row] for row in rows],
        [media_of(encoded.media, row) for row in rows],
        pad_token_id=0,
    )
    mine = score(model, micro)
    theirs = []
    for row in rows:
        ids = torch.from_numpy(encoded.tokens[row].astype(np.int64))[None]
        sounds: list[Any] = [media.read(medium).content for medium in media_of(encoded.media, row)]
        inputs: dict[str, Any] = {}
        if sounds:
            made = media.processor.feature_extractor(
                sounds, sampling_rate=16000, return_attention_mask=True, return_tensors="pt"
            )
            inputs = {
                "input_features": made["input_features"],
                "feature_attention_mask": made["attention_mask"],
            }
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
        places = np.flatnonzero(encoded.loss_mask[row])
        chosen = logits[0, places - 1].float().log_softmax(-1)
        theirs.append(chosen.gather(-1, ids[0, places, None]).squeeze(-1))
    torch.testing.assert_close(mine, torch.cat(theirs), atol=2e-5, rtol=1e-4)
    counts = count_media(encoded.media)
    assert (counts.shown, counts.most) == ({"audio": 3}, {"audio": 2})


def test_lora_keeps_out_of_the_ears_unless_asked(path: Path) -> None:
    assert not trains_vision(apply_tuner(load_model(str(path)).model, TunerSettings()).model)
    asked = TunerSettings(freeze_vit=False)
    assert trains_vision(apply_tuner(load_model(str(path)).model, asked).model)


def test_a_sound_longer_than_the_model_hears_is_an_error(media: MediaProcessor) -> None:
    bad = Example(
        (Message("user", "<audio>What?"), BOT), audios=(tone(31, rate=8000),), source="data.jsonl", line=5
    )
    with pytest.raises(RowError, match=r"data.jsonl:5: .* lasts 31.0 s, and the model hears 30 s"):
        encode_sft([bad], media.processor.tokenizer, media=MediaSettings(media))
