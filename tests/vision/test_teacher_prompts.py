"""A teacher asked something else about the same picture: its log-probs are those of plain Transformers."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from raytune_rl.data.encode import MediaSettings, encode_prompts
from raytune_rl.data.example import Example, Message
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import ROW_COLUMN
from raytune_rl.data.teacher_prompts import encode_teacher_prompts
from raytune_rl.groups.teachers import as_seen
from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.data import TEACHER_PROMPT, TEACHER_PROMPT_TOKENS, Account, PromptSet
from raytune_rl.protocol.model import ModelSpec, ScoreSettings
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.trajectory import EpisodeFacts, Trajectory
from raytune_rl.tiny.shapes import draw
from raytune_rl.workers import scoring
from raytune_rl.workers.teacher import TeacherWorker


def test_it_sees_the_policys_picture_behind_its_own_words(
    tiny_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(tmp_path / f"{n}.png") for n in range(2)]
    for number, name in enumerate(names):
        draw("blue", "circle", random.Random(number), side=56 * (number + 1)).save(name)
    vision = MediaProcessor.of(AutoProcessor.from_pretrained(tiny_vl))
    examples = [
        Example((Message("user", "<image>What?"),), images=(name,), extra={TEACHER_PROMPT: hint})
        for name, hint in zip(names, ("It is a blue circle: <image> What?", "Blue."), strict=True)
    ]
    encode = partial(
        encode_prompts, tokenizer=vision.processor.tokenizer, media=MediaSettings(vision, str(tmp_path))
    )
    asked, own = encode_teacher_prompts(examples, encode, strict=True).prompts, encode(examples)
    answers = [np.array([40, 41, 42 + row], dtype=np.int32) for row in range(2)]
    tokens = [np.concatenate([own.prompts[row], answers[row]]) for row in range(2)]
    masks = [np.arange(len(t)) >= len(t) - 3 for t in tokens]
    store = {
        "prompts": {"prompt": own.prompts, TEACHER_PROMPT: asked, **own.media},
        "rollout": {
            "tokens": Ragged.from_rows(tokens, np.int32),
            "loss_mask": Ragged.from_rows(masks, np.bool_),
        },
    }
    monkeypatch.setattr(scoring.ray, "get", lambda refs, timeout: [store[ref] for ref in refs])
    made = [
        Trajectory(
            row, row, RowPointer("rollout", row), RowPointer("texts", row),
            EpisodeFacts(row, 0, row, len(own.prompts[row]), 3, "stop", 0),
        )
        for row in range(2)
    ]  # fmt: skip
    values = {TEACHER_PROMPT_TOKENS: asked.lengths.astype(np.float64)}
    prompts = PromptSet(
        "prompts", None, None, own.prompts.lengths, Account((), {}, None, (), None, ()), values
    )
    places = {ROW_COLUMN: [RowPointer("prompts", row) for row in range(2)]}
    batch = TrainBatch([t.data for t in made], np.array([len(t) for t in tokens]), places)
    worker = TeacherWorker(
        ModelSpec(str(tiny_vl), "float32", None, "padded", modalities=("image",)), ScoreSettings(1.0, 10.0)
    )
    _, scored = worker.logprobs(as_seen(batch, made, prompts).message([[0, 1]]))
    plain = AutoModelForImageTextToText.from_pretrained(tiny_vl).eval()
    for row in range(2):
        ids = torch.from_numpy(np.concatenate([asked[row], answers[row]])).long()[None]
        pixels = vision.processor.image_processor([Image.open(names[row])], return_tensors="pt")
        types = (ids == vision.processor.image_token_id).int()
        with torch.no_grad():
            logits = plain(input_ids=ids, mm_token_type_ids=types, **pixels).logits[0, -4:-1]
        wanted = logits.log_softmax(-1).gather(-1, ids[0, -3:, None]).squeeze(-1)
        np.testing.assert_allclose(scored["logprobs"][row], wanted.numpy(), rtol=0, atol=2e-5)
