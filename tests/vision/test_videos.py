"""Rows with videos: the frames by the processor's rule, and the losses of plain Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from raytune_rl.data.collate import MicroBatch
from raytune_rl.data.encode import EncodedSFT, MediaSettings, encode_prompts, encode_sft
from raytune_rl.data.example import Example, Message, RowError
from raytune_rl.data.media import MediaError
from raytune_rl.data.media_batch import MediaCollator
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import count_media, media_of
from raytune_rl.data.video import decode_video
from raytune_rl.errors import ModelError
from raytune_rl.models.load import load_model
from raytune_rl.protocol.media import MediaLimits
from tests.vision.films import film, tone
from tests.vision.scoring import score

BOT = Message("assistant", "A grey film it is.")
# (width, height) as they come: (rows, columns) of tokens, of 28 pixels each.
SIZES = {(64, 48): (2, 2), (60, 40): (1, 2)}


@pytest.fixture(scope="module")
def media(tiny_vl: Path) -> MediaProcessor:
    return MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl))


@pytest.fixture(scope="module")
def model(tiny_vl: Path) -> Any:
    return load_model(str(tiny_vl)).model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("films")
    (root / "long.mp4").write_bytes(film(frames=40, fps=10))
    (root / "short.mp4").write_bytes(film(frames=5, fps=10, size=(96, 64)))
    for number in range(3):
        Image.new("RGB", (60, 40), (80 * number, 10, 200)).save(root / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def encoded(media: MediaProcessor, folder: Path) -> EncodedSFT:
    """A video; a picture; a picture before a video, in two turns; texts; a video given as its frames."""
    one = (Message("user", "<video>What is it?"), BOT)
    examples = [
        Example(one, videos=("long.mp4",)),
        Example((Message("user", "<image>What?"), BOT), images=("0.png",)),
        Example(
            (
                Message("user", "<image>What?"),
                BOT,
                Message("user", "And <video>?"),
                Message("assistant", "Grey."),
            ),
            images=("1.png",),
            videos=(film(8, 4),),
        ),
        Example((Message("user", "How are you?"), Message("assistant", "Well."))),
        Example(one, videos=(("0.png", "1.png", "2.png"),)),
    ]
    settings = MediaSettings(media, root=str(folder))
    return encode_sft(examples, media.processor.tokenizer, media=settings)


def collate(collator: MediaCollator, encoded: EncodedSFT, rows: list[int]) -> MicroBatch:
    return collator.collate(
        [encoded.tokens[row] for row in rows],
        [encoded.loss_mask[row] for row in rows],
        [media_of(encoded.media, row) for row in rows],
        pad_token_id=0,
    )


def positions(model: Any, types: np.ndarray, known: list[Any]) -> torch.Tensor:
    """int64 [3, 1, T], by the rule of the paper: every piece begins after the largest position before it. A
    frame of a video is as far from the next as `tokens_per_second` says."""
    per_second = model.config.vision_config.tokens_per_second
    media = iter(known)
    axes: list[np.ndarray] = []
    start, at = 0, 0
    while at < len(types):
        count = int(np.argmax(types[at:] != types[at])) or len(types) - at
        if types[at] == 0:
            piece = np.tile(np.arange(count), (3, 1))
        else:
            one = next(media)
            still = isinstance(one, Image.Image)
            times = 1 if still else -(-len(one.frames) // 2)
            apart = 1 if still else per_second * 2 * one.metadata["duration"] / len(one.frames)
            width, height = one.size if still else one.frames.shape[2:0:-1]
            grid = SIZES[(width, height)]
            when, row, column = np.indices((times, *grid))
            piece = np.stack([(when * apart).astype(np.int64), row, column]).reshape(3, -1)
        axes.append(piece + start)
        start = int(axes[-1].max()) + 1
        at += count
    return torch.from_numpy(np.concatenate(axes, axis=1)).long()[:, None]


def plain_logprobs(model: Any, media: MediaProcessor, encoded: EncodedSFT, row: int) -> torch.Tensor:
    """Transformers' own log-probs of a row alone, with what its processor makes of the frames."""
    tokens, mask = encoded.tokens[row], encoded.loss_mask[row]
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    known = [media.read(medium).content for medium in media_of(encoded.media, row)]
    images = [one for one in known if isinstance(one, Image.Image)]
    videos = [one for one in known if not isinstance(one, Image.Image)]
    inputs: dict[str, Any] = {}
    if images:
        inputs |= dict(media.processor.image_processor(images, return_tensors="pt"))
    if videos:
        inputs |= dict(media.processor.video_processor([one.frames for one in videos], return_tensors="pt"))
        seconds = [2 * len(one.frames) ** -1 * one.metadata["duration"] for one in videos]
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    types = media.token_types(ids.numpy())
    places = positions(model, types[0], known)
    logits = model(input_ids=ids, position_ids=places, **inputs).logits
    trained = np.flatnonzero(mask)
    chosen = logits[0, trained - 1].float().log_softmax(-1)
    return chosen.gather(-1, ids[0, trained, None]).squeeze(-1)


def test_frames_are_two_a_second_unless_the_processor_knows_better(
    media: MediaProcessor, encoded: EncodedSFT, folder: Path
) -> None:
    (medium,) = media_of(encoded.media, 0)
    video: Any = media.read(medium).content
    assert video.metadata["frames_indices"] == [0, 5, 10, 15, 20, 25, 30, 35]
    assert (video.metadata["total_num_frames"], video.metadata["fps"]) == (40, 10.0)
    assert video.frames.shape == (8, 48, 64, 3)
    seen = [int(frame.mean()) for frame in video.frames]
    wanted = [16 * number % 256 for number in video.metadata["frames_indices"]]
    assert all(abs(a - b) <= 3 for a, b in zip(seen, wanted, strict=True)), (seen, wanted)


def test_a_short_video_is_shown_as_far_as_it_goes(media: MediaProcessor, folder: Path) -> None:
    short = media.decode("video", [(folder / "short.mp4").read_bytes()], ["short.mp4"]).content
    assert len(short.frames) == 4, "the least that the processor takes, of five"  # type: ignore[union-attr]
    single = media.decode("video", [film(1, 10)], ["single.mp4"]).content
    assert len(single.frames) == 1  # type: ignore[union-attr]


def test_rows_are_scored_as_by_transformers(media: MediaProcessor, model: Any, encoded: EncodedSFT) -> None:
    rows = [4, 2, 0, 3, 1]
    micro = collate(MediaCollator(media), encoded, rows)
    mine = score(model, micro)
    theirs = torch.cat([plain_logprobs(model, media, encoded, row) for row in rows])
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_the_film_is_looked_at(media: MediaProcessor, model: Any, encoded: EncodedSFT) -> None:
    micro = collate(MediaCollator(media), encoded, [0])
    right = score(model, micro)
    dark = dict(micro.model_inputs)
    dark["pixel_values_videos"] = torch.zeros_like(dark["pixel_values_videos"])
    micro.model_inputs.update(dark)
    assert (score(model, micro) - right).abs().max() > 1e-3


def test_only_answers_are_trained_on(media: MediaProcessor, encoded: EncodedSFT) -> None:
    tokenizer = media.processor.tokenizer
    for row, said in ((0, BOT.content + "<|im_end|>"), (2, BOT.content + "<|im_end|>Grey.<|im_end|>")):
        assert tokenizer.decode(encoded.tokens[row][encoded.loss_mask[row]]) == said
    types = media.token_types(encoded.tokens[2])
    assert {1, 2} <= set(types.tolist())
    counts = count_media(encoded.media)
    assert (counts.shown, counts.most) == ({"image": 2, "video": 3}, {"image": 1, "video": 1})
    assert counts.stored_bytes == len(film(8, 4)), "files on disk are named, what came as bytes is held"


def test_every_micro_batch_passes_the_tower_for_every_kind(
    media: MediaProcessor, model: Any, encoded: EncodedSFT
) -> None:
    always = MediaCollator(media, always=("image", "video"))
    for rows in ([3], [0], [1], [2]):
        micro = collate(always, encoded, rows)
        assert {"pixel_values", "pixel_values_videos"} <= micro.model_inputs.keys()
        bare = collate(MediaCollator(media), encoded, rows)
        torch.testing.assert_close(score(model, micro), score(model, bare), atol=2e-5, rtol=1e-4)


def test_numbers_about_a_video_keep_their_precision(media: MediaProcessor, encoded: EncodedSFT) -> None:
    inputs = collate(MediaCollator(media, dtype=torch.bfloat16), encoded, [0]).model_inputs
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    assert inputs["second_per_grid_ts"].dtype == torch.float32


def test_what_the_user_asks_of_videos(tiny_vl: Path, folder: Path) -> None:
    data = (folder / "long.mp4").read_bytes()

    def frames(**limits: Any) -> Any:
        made = MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl), MediaLimits(**limits))
        return made.decode("video", [data], ["long.mp4"]).content

    assert len(frames(fps=5.0).frames) == 20
    assert len(frames(fps=5.0, fps_max_frames=6).frames) == 6
    assert len(frames(fps_max_frames=2).frames) == 2
    assert frames(video_max_pixels=1200).frames.shape[1:] == (30, 40, 3)
    with pytest.raises(ModelError, match="--video_max_pixels 100 is below the 784"):
        frames(video_max_pixels=100)


def test_prompts_keep_one_placeholder_for_the_engine(media: MediaProcessor, folder: Path) -> None:
    asked = [Example((Message("user", "<video>What?"),), videos=("long.mp4",))]
    settings = MediaSettings(media, root=str(folder))
    found = encode_prompts(asked, media.processor.tokenizer, media=settings)
    assert found.engine_prompt_ids is not None
    pad = media.processor.video_token_id
    assert (found.engine_prompt_ids[0] == pad).sum() == 1
    assert (found.prompts[0] == pad).sum() > 1


@pytest.mark.parametrize(
    ("videos", "reason"),
    [
        ((b"nonsense" * 20,), r"video of 160 bytes cannot be decoded: it is no video"),
        (("gone.mp4",), "video 'gone.mp4': there is no file"),
        ((tone(0.2),), "has no picture, only sound"),
        ((("0.png", "long.mp4"),), "image '.*long.mp4' cannot be decoded"),
    ],
)
def test_what_cannot_be_shown_names_row_and_file(
    media: MediaProcessor, folder: Path, videos: tuple, reason: str
) -> None:
    bad = Example((Message("user", "<video>What?"), BOT), videos=videos, source="data.jsonl", line=5)
    settings = MediaSettings(media, root=str(folder))
    with pytest.raises(RowError, match=rf"^data.jsonl:5: an image, .* cannot be read: .*{reason}"):
        encode_sft([bad], media.processor.tokenizer, media=settings)


def test_a_model_without_ears_says_so(media: MediaProcessor) -> None:
    bad = Example((Message("user", "<audio>What?"), BOT), audios=(tone(),), source="data.jsonl", line=5)
    with pytest.raises(RowError, match=r"data.jsonl:5: the row has audios, but the model takes images"):
        encode_sft([bad], media.processor.tokenizer, media=MediaSettings(media))
    texts = encode_sft([Example((Message("user", "Say <audio>"), BOT))], media.processor.tokenizer)
    assert "<audio>" in media.processor.tokenizer.decode(texts.tokens[0]), "a text about a tag stays a text"


def test_frames_of_two_sizes_are_refused(media: MediaProcessor, folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "other.png")
    names = [str(folder / "0.png"), str(tmp_path / "other.png")]
    files = [Path(name).read_bytes() for name in names]
    with pytest.raises(MediaError, match="frames of a video have 2 sizes"):
        media.decode("video", files, names, as_frames=True)


def test_a_video_with_sound_is_seen_and_one_with_a_wrong_count_is_read() -> None:
    shown = decode_video(film(6, 4, sound=True), "a.mp4", lambda facts: range(facts["total_num_frames"]))
    assert len(shown.frames) == 6
