"""A vision model on real DeepSpeed: any cut of mixed rows gives one gradient, it learns, saves what loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.losses.sft import SFTSettings
from raytune_rl.config import deepspeed
from raytune_rl.data.encode import EncodedSFT, MediaSettings, encode_sft
from raytune_rl.data.example import Example, Message
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import media_of
from raytune_rl.data.microbatch import Schedule, plan_micro_batches
from raytune_rl.groups.trainer import PolicyGroup
from raytune_rl.groups.world import TrainerWorld, rank_share
from raytune_rl.protocol.model import ModelSpec, ScoreSettings, TunerSettings
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import OptimizerSpec, TrainerSpec
from raytune_rl.runtime.cluster import reserve
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.tiny.shapes import write_shapes
from raytune_rl.tiny.vision import make_tiny_vision_model
from raytune_rl.workers.trainer import trainer_env
from tests.cluster.test_policy import InspectedPolicy, assert_same
from tests.vision.films import film

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
TOWER = TunerSettings("full", freeze_vit=False, freeze_aligner=False)
TOWER_LORA = TunerSettings("lora", lora_dropout=0.0, freeze_vit=False)


@dataclass(frozen=True)
class Rows:
    """Mixed conversations: some show one picture, some two, some a film, some none."""

    model: Path
    encoded: EncodedSFT
    ref: Any

    @property
    def pointers(self) -> list[RowPointer]:
        return [RowPointer(self.ref, row) for row in range(len(self.encoded.tokens))]

    @property
    def lengths(self) -> list[int]:
        return self.encoded.tokens.lengths.tolist()

    @property
    def scalars(self) -> dict[str, Any]:
        counts = [int(self.encoded.loss_mask[row].sum()) for row in range(len(self.encoded.tokens))]
        return {"weight": row_weights(counts, "sft")}

    @property
    def batch(self) -> TrainBatch:
        return TrainBatch(self.pointers, self.encoded.tokens.lengths, scalars=self.scalars)


@pytest.fixture(scope="module")
def rows(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    root = tmp_path_factory.mktemp("sft_images")
    model = make_tiny_vision_model(root / "model")
    chats = [json.loads(line) for line in write_shapes(root / "data", train=16).sft.read_text().splitlines()]
    examples = []
    for number, chat in enumerate(chats):
        question, answer = (Message(m["role"], m["content"]) for m in chat["messages"])
        picture = chat["images"][0]
        other = chats[number - 1]["images"][0]
        if number % 4 == 1:
            examples.append(Example((Message("user", "How are you?"), Message("assistant", "Very well."))))
        elif number % 8 == 3:
            asked = Message("user", "<video>What is it?")
            examples.append(Example((asked, answer), videos=(film(8, 4),)))
        elif number % 4 == 2:
            twice = Message("user", f"<image>{question.content}")
            examples.append(Example((twice, answer), images=(other, picture)))
        else:
            examples.append(Example((question, answer), images=(picture,)))
    vision = MediaProcessor.of(AutoProcessor.from_pretrained(model))
    encoded = encode_sft(examples, vision.processor.tokenizer, media=MediaSettings(vision))
    columns = {"tokens": encoded.tokens, "loss_mask": encoded.loss_mask, **encoded.media}
    return Rows(model, encoded, ray.put(columns))


class World:
    """A started policy group on the tiny vision model."""

    def __init__(self, name: str, rows: Rows, size: int, tuner: TunerSettings, slots: Any) -> None:
        optimizer = OptimizerSpec(5e-3, "constant", 0, 99, (0.9, 0.95), 1e-8, 0.0, 1.0, deepspeed.load(None))
        spec = TrainerSpec(
            model=ModelSpec(str(rows.model), "float32", None, "padded", modalities=("image", "video")),
            tuner=tuner,
            optimizer=optimizer,
            loss="sft",
            loss_settings=SFTSettings(),
            score=ScoreSettings(1.0, 60.0),
            seed=1,
            gradient_checkpointing=False,
        )
        self.rows = rows
        self.group = WorkerGroup(
            GroupSpec(name, size, cpus=0.5),
            slots[name],
            InspectedPolicy,
            lambda rank: {"spec": spec, "rank": rank, "world_size": size},
            trainer_env(1, on_gpu=False),
            120.0,
        )
        self.policy = PolicyGroup(TrainerWorld(self.group, spec, 256, 240.0))

    def gradient(self, schedule: Schedule) -> dict[str, np.ndarray]:
        rows = self.rows
        batches = [rank_share(schedule, r, rows.batch).batch for r in range(len(self.group))]
        pending = [self.group.submit(r, "gradient", b, "padded") for r, b in enumerate(batches)]
        return ray.get([p.ref for p in pending], timeout=120)[0]

    def train(self, step: int) -> float:
        rows = self.rows
        return self.policy.world.train(rows.batch, step).metrics["loss"]

    def logprobs(self) -> list[np.ndarray]:
        found = self.policy.logprobs(self.rows.batch).columns
        objects = {p.ref: ray.get(p.ref, timeout=60) for p in found}
        return [objects[p.ref]["logprobs"][p.row] for p in found]


@pytest.fixture(scope="module")
def worlds(rows: Rows) -> Iterator[dict[str, World]]:
    """One and two ranks that train everything, and one that trains adapters, the tower's among them."""
    sizes = {"one": (1, TOWER), "two": (2, TOWER), "lora": (1, TOWER_LORA)}
    specs = [GroupSpec(name, size, cpus=0.5) for name, (size, _) in sizes.items()]
    with reserve(specs, 60.0) as slots:
        made = {name: World(name, rows, size, tuner, slots) for name, (size, tuner) in sizes.items()}
        for world in made.values():
            world.policy.ready()
        yield made
        for world in made.values():
            world.group.shutdown()


def plain_logprobs(model: Any, rows: Rows, row: int) -> np.ndarray:
    """The row's loss tokens under Transformers, its inputs from Transformers' own image processor."""
    processor = AutoProcessor.from_pretrained(rows.model)
    tokens, mask = rows.encoded.tokens[row], rows.encoded.loss_mask[row]
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    images = [Image.open(p.files[0].path) for p in media_of(rows.encoded.media, row) if p.files[0].path]
    inputs = dict(processor.image_processor(images, return_tensors="pt")) if images else {}
    with torch.no_grad():
        logits = model(
            input_ids=ids, mm_token_type_ids=(ids == processor.image_token_id).int(), **inputs
        ).logits
    each = logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return each.numpy()[mask[1:]]


def without_film(rows: Rows) -> list[int]:
    """Rows whose positions are those of Transformers; the others are compared in tests/vision."""
    shown = [media_of(rows.encoded.media, row) for row in range(len(rows.lengths))]
    assert any(medium.modality == "video" for media in shown for medium in media)
    return [row for row, media in enumerate(shown) if all(m.modality == "image" for m in media)]


def test_mixed_rows_give_one_gradient_however_they_are_cut(worlds: dict[str, World], rows: Rows) -> None:
    """The tower's gradient is a collective: ranks and micro-batches without a picture take part in it."""

    def plan(size: int, max_rows: int | None) -> Schedule:
        return plan_micro_batches(
            rows.lengths, world_size=size, max_tokens=10_000, layout="padded", max_rows=max_rows
        )

    whole = worlds["one"].gradient(plan(1, None))
    tower = [name for name in whole if ".visual." in name]
    assert max(float(np.abs(whole[name]).max()) for name in tower) > 1e-4
    assert_same(whole, worlds["one"].gradient(plan(1, 1)), 1e-5)
    assert_same(whole, worlds["two"].gradient(plan(2, None)), 1e-5)
    assert_same(whole, worlds["two"].gradient(plan(2, 1)), 1e-5)

    texts = [row for row in range(len(rows.lengths)) if not media_of(rows.encoded.media, row)]
    shown = [row for row in range(len(rows.lengths)) if row not in texts]
    apart = replace(plan(2, None), ranks=((tuple(texts), ()), (tuple(shown[:6]), tuple(shown[6:]))))
    assert_same(whole, worlds["two"].gradient(apart), 1e-5)


def test_it_learns_and_transformers_loads_what_it_saves(
    worlds: dict[str, World], rows: Rows, tmp_path: Path
) -> None:
    losses = [worlds["two"].train(step) for step in range(30)]
    print(f"loss over 30 steps: {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[0] > 4
    assert losses[-1] < losses[0] / 3
    mine = worlds["two"].logprobs()
    worlds["two"].policy.world.save(tmp_path, only_model=True)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    for row in without_film(rows):
        np.testing.assert_allclose(mine[row], plain_logprobs(model, rows, row), atol=1e-4)
    assert AutoProcessor.from_pretrained(tmp_path).image_token == "<|image_pad|>"


def test_adapters_in_the_tower_train_and_peft_loads_them(
    worlds: dict[str, World], rows: Rows, tmp_path: Path
) -> None:
    losses = [worlds["lora"].train(step) for step in range(8)]
    assert losses[-1] < losses[0] - 0.2
    mine = worlds["lora"].logprobs()
    worlds["lora"].policy.world.save(tmp_path, only_model=True)
    base = AutoModelForImageTextToText.from_pretrained(rows.model)
    model = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    moved = [n for n, p in model.named_parameters() if ".visual." in n and "lora_B" in n and p.detach().any()]
    assert moved
    for row in without_film(rows):
        np.testing.assert_allclose(mine[row], plain_logprobs(model, rows, row), atol=1e-4)
