"""Rows with pictures to tokens: placeholders as many as features, and exactly the answers are trained on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from raytune_rl.data.encode import EncodedSFT, MediaSettings, encode_prompts, encode_sft
from raytune_rl.data.encode_preferences import encode_labelled, encode_pairs
from raytune_rl.data.example import Example, Message, RowError
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import count_media, media_of
from raytune_rl.errors import DataError, ModelError
from raytune_rl.protocol.media import MediaLimits
from raytune_rl.tiny.shapes import draw

USER, BOT = Message("user", "<image>Which shape is it?"), Message("assistant", "A red square.")
USER_2, BOT_2 = Message("user", "And <image><image> these?"), Message("assistant", "Both are blue.")
TEXT = Message("user", "How are you?")


@pytest.fixture(scope="module")
def vision(tiny_vl: Path) -> MediaProcessor:
    return MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of 4, 4, 8 and 16 tokens."""
    root = tmp_path_factory.mktemp("pictures")
    sizes = [(56, 56), (56, 56), (112, 56), (300, 200)]
    for number, size in enumerate(sizes):
        draw("red", "circle", random.Random(number)).resize(size).save(root / f"{number}.png")
    return [str(root / f"{number}.png") for number in range(len(sizes))]


def row(*messages: Message, images: tuple[Any, ...] = (), line: int = 1) -> Example:
    return Example(messages, images=images, source="data.jsonl", line=line)


def encode(vision: MediaProcessor, *examples: Example, **options: Any) -> EncodedSFT:
    settings = MediaSettings(vision, options.pop("root", None), options.pop("inline", False))
    return encode_sft(list(examples), vision.processor.tokenizer, media=settings, **options)


def trained(vision: MediaProcessor, encoded: EncodedSFT, at: int = 0) -> list[str]:
    tokens, mask = encoded.tokens[at], encoded.loss_mask[at]
    borders = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    decode = vision.processor.tokenizer.decode
    return [decode(tokens[a:b]) for a, b in zip(borders[::2], borders[1::2], strict=True)]


def test_tokens_are_the_processors_and_only_answers_are_trained_on(
    vision: MediaProcessor, pictures: list[str]
) -> None:
    turns = (Message("system", "Be brief."), USER, BOT, USER_2, BOT_2)
    encoded = encode(vision, row(*turns, images=(pictures[0], pictures[2], pictures[3])))
    assert trained(vision, encoded) == ["A red square.<|im_end|>", "Both are blue.<|im_end|>"]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which shape is it?"}]},
        {"role": "assistant", "content": "A red square."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And "},
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": " these?"},
            ],
        },
        {"role": "assistant", "content": "Both are blue."},
    ]
    text = vision.processor.apply_chat_template(chat, tokenize=False)
    images = [Image.open(pictures[i]) for i in (0, 2, 3)]
    whole = vision.processor(text=[text], images=[images])
    assert encoded.tokens[0].tolist() == whole["input_ids"][0]
    pads = (encoded.tokens[0] == vision.processor.image_token_id).sum()
    assert pads == (whole["image_grid_thw"].prod(-1) // 4).sum()
    assert [p.files[0].path for p in media_of(encoded.media, 0)] == [pictures[i] for i in (0, 2, 3)]


def test_loss_scale_all_still_leaves_out_what_stands_for_pictures(
    vision: MediaProcessor, pictures: list[str]
) -> None:
    encoded = encode(vision, row(USER, BOT, images=(pictures[0],)), loss_scale="all")
    tokens, mask = encoded.tokens[0], encoded.loss_mask[0]
    assert not mask[tokens == vision.processor.image_token_id].any()
    assert mask.sum() == len(tokens) - 1 - 4, "all but the first token and the four of the picture"


def test_a_picture_in_the_assistants_turn_is_seen_but_not_trained(
    vision: MediaProcessor, pictures: list[str]
) -> None:
    answer = Message("assistant", "See <image> there.")
    encoded = encode(vision, row(TEXT, answer, images=(pictures[0],)))
    joined = "".join(trained(vision, encoded))
    assert joined == "See <|vision_start|><|vision_end|> there.<|im_end|>"


def test_rows_without_pictures_are_tokenized_as_text_beside_them(
    vision: MediaProcessor, pictures: list[str]
) -> None:
    examples = [row(TEXT, BOT), row(USER, BOT, images=(pictures[0],)), row(TEXT, BOT_2)]
    encoded = encode(vision, *examples)
    alone = encode(vision, examples[2])
    assert encoded.tokens[2].tolist() == alone.tokens[0].tolist()
    assert trained(vision, encoded, 2) == ["Both are blue.<|im_end|>"]
    assert [len(media_of(encoded.media, i)) for i in range(3)] == [0, 1, 0]
    assert alone.media == {}


def test_processes_give_the_same_as_one(vision: MediaProcessor, pictures: list[str]) -> None:
    data = Path(pictures[1]).read_bytes()
    examples = [row(USER, BOT, images=(data if n % 3 == 0 else pictures[n % 4],), line=n) for n in range(70)]
    one, two = encode(vision, *examples), encode(vision, *examples, num_proc=2)
    np.testing.assert_array_equal(one.tokens.values, two.tokens.values)
    np.testing.assert_array_equal(one.loss_mask.values, two.loss_mask.values)
    np.testing.assert_array_equal(one.media["media_data"].values, two.media["media_data"].values)  # type: ignore[union-attr]
    counts = count_media(one.media)
    assert counts == count_media(two.media)
    assert (counts.shown, counts.distinct) == ({"image": 70}, {"image": 4})


@pytest.mark.parametrize(
    ("content", "count", "reason"),
    [
        (
            "<image>See <|image_pad|>",
            1,
            r"2 times the model's own image token '<\|image_pad\|>' for 1 images",
        ),
        ("See <|image_pad|>", 0, r"holds the model's own token '<\|image_pad\|>', but no medium"),
        ("See <|video_pad|>", 0, r"holds the model's own token '<\|video_pad\|>', but no medium"),
    ],
)
def test_a_placeholder_in_the_rows_own_text_is_an_error(
    vision: MediaProcessor, pictures: list[str], content: str, count: int, reason: str
) -> None:
    bad = row(Message("user", content), BOT, images=tuple(pictures[:count]), line=7)
    with pytest.raises(RowError, match=rf"^data.jsonl:7: .*{reason}"):
        encode(vision, bad)


def test_a_broken_picture_names_row_and_path_and_is_counted_by_kind(
    vision: MediaProcessor, pictures: list[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(Path(pictures[0]).read_bytes()[:70])
    bad = row(USER, BOT, images=("bad.png",), line=3)
    gone = row(USER, BOT, images=("gone.png",), line=4)
    with pytest.raises(
        RowError, match=r"^data.jsonl:3: an image, video or audio cannot be read: image '.*bad.png' cannot"
    ):
        encode(vision, bad, root=str(tmp_path))
    good = row(USER, BOT, images=(pictures[0],))
    encoded = encode(vision, bad, good, gone, root=str(tmp_path), strict=False)
    assert encoded.index.tolist() == [1]
    assert encoded.reasons == {"an image, video or audio cannot be read": 2}
    assert [drop.unusable for drop in encoded.dropped] == [True, True]
    assert "gone.png" in encoded.dropped[1].detail
    with pytest.raises(DataError, match=r"none of 1 rows can be used.*gone\.png"):
        encode(vision, gone, strict=False)


def test_a_picture_that_the_processor_refuses_names_row_and_picture(
    vision: MediaProcessor, tmp_path: Path
) -> None:
    Image.new("RGB", (2000, 4)).save(tmp_path / "strip.png")
    with pytest.raises(RowError, match=r"data.jsonl:1: .*aspect ratio.*strip\.png"):
        encode(vision, row(USER, BOT, images=(str(tmp_path / "strip.png"),)))


def test_a_dropped_long_row_and_a_cut_through_a_picture(vision: MediaProcessor, pictures: list[str]) -> None:
    long = row(USER, BOT, images=(pictures[3],))
    short = row(USER, BOT, images=(pictures[0],))
    size = len(encode(vision, short).tokens[0])
    encoded = encode(vision, long, short, max_length=size)
    assert encoded.index.tolist() == [1]
    assert encoded.reasons == {f"longer than max_length {size}": 1}
    encoded = encode(vision, long, short, max_length=size, truncation_strategy="left")
    assert encoded.reasons == {f"truncation to max_length {size} would cut into an image, video or audio": 1}
    cut = encode(vision, short, max_length=size - 2, truncation_strategy="right")
    assert len(cut.tokens[0]) == size - 2
    assert trained(vision, cut) == ["A red square."]


def test_max_pixels_is_the_processors_own_limit(tiny_vl: Path, pictures: list[str]) -> None:
    few = MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl), MediaLimits(28 * 28 * 6))
    assert few.limits.max_pixels is None, "this processor scales by itself"
    encoded = encode(few, row(USER, BOT, images=(pictures[3],)))
    assert (encoded.tokens[0] == few.processor.image_token_id).sum() <= 6
    with pytest.raises(ModelError, match="--max_pixels 100 is below the 784"):
        MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl), MediaLimits(100))


def test_prompts_end_where_the_answer_begins(vision: MediaProcessor, pictures: list[str]) -> None:
    settings = MediaSettings(vision)
    examples = [row(USER, images=(pictures[0],)), row(USER, images=(pictures[0],))]
    prompts = encode_prompts(examples, vision.processor.tokenizer, media=settings)
    text = vision.processor.tokenizer.decode(prompts.prompts[0])
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    counts = count_media(prompts.media)
    shown = counts.shown, counts.distinct
    assert shown == ({"image": 2}, {"image": 1}), "one picture however many prompts show it"


def test_a_prompt_is_also_kept_with_one_placeholder_a_picture(
    vision: MediaProcessor, pictures: list[str]
) -> None:
    """So vLLM takes it; it expands placeholders by itself. Truncation takes the same tokens from both."""
    tokenizer, pad = vision.processor.tokenizer, vision.processor.image_token_id
    long = Message("user", "Look at this, please: <image> and <image>. What?")
    examples = [row(long, images=(pictures[0], pictures[1])), row(Message("user", "How are you?"))]

    def encode_all(limit: int | None = None) -> Any:
        settings = MediaSettings(vision)
        return encode_prompts(examples, tokenizer, limit, "left", media=settings)

    whole = encode_all()
    assert (
        whole.engine_prompt_ids.lengths[0] == whole.prompts.lengths[0] - (whole.prompts[0] == pad).sum() + 2
    )
    assert (whole.engine_prompt_ids[0] == pad).sum() == 2
    assert whole.engine_prompt_ids[1].tolist() == whole.prompts[1].tolist()
    cut = encode_all(int(whole.prompts.lengths[0]) - 3)
    assert cut.engine_prompt_ids[0].tolist() == whole.engine_prompt_ids[0][3:].tolist()
    assert cut.prompts[0].tolist() == whole.prompts[0][3:].tolist()
    texts = encode_prompts(examples[1:], tokenizer, media=MediaSettings(vision))
    assert texts.engine_prompt_ids is None
    assert vision.placeholder_ids == (pad, tokenizer.convert_tokens_to_ids("<|video_pad|>"))


def test_both_sides_of_a_pair_show_the_pictures(vision: MediaProcessor, pictures: list[str]) -> None:
    wrong = Message("assistant", "A green circle, perhaps.")
    pair = Example((USER, BOT), images=(pictures[2],), rejected=(USER, wrong), source="data.jsonl", line=1)
    tokenizer, settings = vision.processor.tokenizer, MediaSettings(vision)
    found = encode_pairs([pair], tokenizer, media=settings)
    assert trained(vision, found) == ["A red square.<|im_end|>"]
    assert trained(vision, found, 1) == ["A green circle, perhaps.<|im_end|>"]
    pads = [(found.tokens[i] == vision.processor.image_token_id).sum() for i in (0, 1)]
    assert pads == [8, 8]
    assert [[p.files[0].path for p in media_of(found.media, i)] for i in (0, 1)] == [[pictures[2]]] * 2
    with pytest.raises(DataError, match="might cut into an image"):
        encode_pairs([pair], tokenizer, int(found.tokens.lengths.max()) - 1, "left", media=settings)


def test_a_labelled_row_keeps_its_pictures_with_another_answer(
    vision: MediaProcessor, pictures: list[str]
) -> None:
    examples = [
        Example((USER, BOT), images=(pictures[0],), label=True, source="data.jsonl", line=1),
        Example((TEXT, Message("assistant", "Fine.")), label=False, source="data.jsonl", line=2),
    ]
    found = encode_labelled(examples, vision.processor.tokenizer, media=MediaSettings(vision))
    assert [len(media_of(found.media, i)) for i in range(4)] == [1, 1, 0, 0]
    assert trained(vision, found, 1) == ["Fine.<|im_end|>"]
    assert trained(vision, found, 3) == ["A red square.<|im_end|>"]


def test_a_tag_without_a_medium_is_a_word(vision: MediaProcessor, pictures: list[str]) -> None:
    encoded = encode(
        vision,
        row(Message("user", "Is it <image> or <video>?"), Message("assistant", "<image>.")),
        row(Message("user", "<image>Is it a <video>?"), BOT, images=(pictures[0],)),
    )
    decode = vision.processor.tokenizer.decode
    assert "Is it <image> or <video>?" in decode(encoded.tokens[0])
    assert trained(vision, encoded) == ["<image>.<|im_end|>"]
    assert "<|vision_end|>Is it a <video>?" in decode(encoded.tokens[1])
