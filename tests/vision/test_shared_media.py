"""Completions of a prompt with media: the medium passes through the model once, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from raytune_rl.data.collate import MicroBatch
from raytune_rl.data.encode import MediaSettings, encode_prompts
from raytune_rl.data.example import Example, Message
from raytune_rl.data.media_batch import MediaCollator
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import Medium, media_of
from raytune_rl.models.prefix_attention import let_share
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.protocol.rows import Prefixes
from raytune_rl.tiny.shapes import draw
from raytune_rl.workers import isolation
from tests.vision.films import film
from tests.vision.test_other_models import gemma3, llava

Rows = tuple[list[np.ndarray], list[np.ndarray], list[list[Medium]], Prefixes]


def completions(media: MediaProcessor, asked: list[Example]) -> Rows:
    """Three completions of each prompt, in turns."""
    prompts = encode_prompts(asked, media.processor.tokenizer, media=MediaSettings(media))
    draws = np.random.default_rng(0)
    text = [token for token in range(20, 60) if token not in media.placeholder_ids]
    tokens, masks, shown, groups = [], [], [], []
    for length in (4, 1, 7):
        for number in range(len(asked)):
            prompt = prompts.prompts[number]
            tokens.append(np.append(prompt, draws.choice(text, length + number)).astype(np.int32))
            masks.append(np.arange(len(tokens[-1])) >= len(prompt))
            shown.append(media_of(prompts.media, number))
            groups.append(number)
    lengths = prompts.prompts.lengths[groups]
    return tokens, masks, shown, Prefixes(np.array(groups), lengths)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    made = []
    for number, size in enumerate([(56, 56), (112, 56), (84, 140)]):
        draw("blue", "circle", random.Random(number)).resize(size).save(tmp_path / f"{number}.png")
        made.append(str(tmp_path / f"{number}.png"))
    return made


def gradient(scorer: TokenScorer, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    scorer.zero_grad()
    seen = (micro.input_ids, micro.position_ids, micro.attention_mask, micro.predict_index, micro.targets)
    found = scorer(*seen, shared=micro.shared, **micro.model_inputs).logprobs
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    grads = [p.grad.flatten() for p in scorer.parameters() if p.grad is not None]
    return found.detach(), torch.cat(grads)


def assert_shared_as_padded(model: Any, media: MediaProcessor, asked: list[Example]) -> MicroBatch:
    tokens, masks, shown, prefixes = completions(media, asked)
    scorer, collator = TokenScorer(model), MediaCollator(media)
    padded = collator.collate(tokens, masks, shown, pad_token_id=0)
    wanted = gradient(scorer, padded)
    assert isolation.settle_sharing(scorer, "true", collator) == ("true", ())
    shared = collator.collate(tokens, masks, shown, pad_token_id=0, prefixes=prefixes)
    assert len(shared.shared) == len(asked)
    for mine, theirs in zip(gradient(scorer, shared), wanted, strict=True):
        assert (mine - theirs).abs().max() <= 5e-6 * max(1.0, theirs.abs().max().item())
    return shared


def test_pictures_of_qwen(tiny_vl: Path, pictures: list[str]) -> None:
    a, b, c = pictures
    asked = [
        Example((Message("user", "<image>Which shape is it?"),), images=(a,)),
        Example((Message("user", "How are you?"),)),
        Example((Message("user", "<image> and <image>?"),), images=(c, b)),
    ]
    model = AutoModelForImageTextToText.from_pretrained(tiny_vl).eval()
    media = MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl))
    micro = assert_shared_as_padded(model, media, asked)
    assert micro.model_inputs["image_grid_thw"].shape == (3, 3), "once a group, not once a row"


def test_a_video_of_qwen(tiny_vl: Path, tmp_path: Path, pictures: list[str]) -> None:
    (tmp_path / "film.mp4").write_bytes(film(frames=40, fps=10))
    asked = [
        Example((Message("user", "<video>What?"),), videos=(str(tmp_path / "film.mp4"),)),
        Example((Message("user", "<image>What?"),), images=(pictures[1],)),
    ]
    model = AutoModelForImageTextToText.from_pretrained(tiny_vl).eval()
    media = MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl))
    assert_shared_as_padded(model, media, asked)


def test_a_model_that_counts_along_one_axis(pictures: list[str]) -> None:
    torch.manual_seed(0)
    model, processor = llava()
    asked = [Example((Message("user", f"<image>Which? {n}"),), images=(pictures[n],)) for n in range(2)]
    micro = assert_shared_as_padded(model.eval(), MediaProcessor.of(processor), asked)
    assert len(micro.model_inputs["pixel_values"]) == 2


def test_a_model_whose_pictures_see_both_ways_does_not_share() -> None:
    torch.manual_seed(0)
    model, processor = gemma3()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
    scorer, collator = TokenScorer(model.eval()), MediaCollator(MediaProcessor.of(processor))
    sharing, notices = isolation.settle_sharing(scorer, "auto", collator)
    assert sharing == "false"
    assert notices[0].endswith("(tokens of its media see each other both ways)")
    assert let_share(model) == "", "of texts alone it can"
    assert isolation.shared_gap(scorer) < 1e-4
    assert isolation.media_gap(scorer, collator) > 1e-3, "and trying it shows why not of media"


def test_media_that_are_not_shared_stay_with_their_rows(tiny_vl: Path, pictures: list[str]) -> None:
    """Rows of one number with other pictures, or with pictures behind what they share."""
    media = MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl))
    asked = [Example((Message("user", "<image>Which?"),), images=(pictures[0],))]
    tokens, masks, shown, prefixes = completions(media, asked)
    later = Prefixes(prefixes.groups, np.full(3, 3))
    collator = MediaCollator(media)
    for given, of in ((shown, later), ([shown[0], shown[0], [*shown[0], *shown[0]]], prefixes)):
        if given is shown:
            micro = collator.collate(tokens, masks, given, pad_token_id=0, prefixes=of)
            assert [len(group) for group in micro.shared] == [1, 1, 1]
        else:
            assert len(collator._groups(tokens, given, of)) == 3


def test_a_grey_picture_where_every_rank_needs_one(tiny_vl: Path) -> None:
    media = MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl))
    tokens, masks, shown, prefixes = completions(media, [Example((Message("user", "Well?"),))])
    collator: Any = MediaCollator(media, always=("image",))
    micro = collator.collate(tokens, masks, shown, pad_token_id=0, prefixes=prefixes)
    assert len(micro.shared) == 2
    assert micro.n_rows == 3 == len(micro.row_ends)
    assert micro.model_inputs["image_grid_thw"].shape == (1, 3)
    make: Callable[[], MicroBatch] = lambda: collator.collate([], [], [], pad_token_id=0, prefixes=prefixes)  # noqa: E731
    assert make().n_rows == 0
