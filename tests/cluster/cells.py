"""A policy world whose ranks can become another run's: one start of DeepSpeed for many small trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.losses.sft import SFTSettings
from raytune_rl.config import SFTConfig
from raytune_rl.groups import specs
from raytune_rl.groups.trainer import PolicyGroup
from raytune_rl.groups.world import TrainerWorld
from raytune_rl.prepare.places import MediaPlaces
from raytune_rl.prepare.task import encode_rows_task
from raytune_rl.protocol.model import ScoreSettings
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import TrainerSpec
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.workers.trainer import TrainerWorker, trainer_env


class Chameleon(TrainerWorker):
    """A policy worker that can start over with another model, tuner and engine."""

    def become(self, spec: TrainerSpec) -> tuple[str, ...]:
        """Builds what `spec` says in the world that is joined already; returns the notices."""
        self._spec = spec
        return self._build().notices

    def share(self) -> float:
        """Loads the model anew; the part of its bytes that this rank then holds."""
        from raytune_rl.models.sharding import numel_of
        from raytune_rl.workers import scoring

        zero = self._spec.optimizer.deepspeed["zero_optimization"]
        parameters = list(scoring.load(self._spec.model, zero3=zero).model.parameters())
        held = sum(p.numel() + getattr(p, "ds_tensor", p[:0]).numel() for p in parameters)
        return held / sum(map(numel_of, parameters))

    def logits(self, directory: str) -> np.ndarray:
        """Logits of the probe that exports are checked with, float32 [tokens, vocabulary]."""
        from raytune_rl.export.parity import logits, make_probe
        from raytune_rl.models.unwrap import hf_model, tuned_model

        self._engine.eval()
        probe = make_probe(hf_model(self._engine).config, Path(directory), trust_remote_code=False)
        return logits(tuned_model(self._engine), probe).numpy()


@dataclass(frozen=True)
class Rows:
    """Tokenized rows of a run, in the object store."""

    pointers: list[RowPointer]
    lengths: list[int]
    weights: np.ndarray


def rows_of(config: SFTConfig, directory: Path) -> Rows:
    """The rows of `config.dataset`, as the data task makes them."""
    bad_rows = str(directory / "quarantine.jsonl")
    places = MediaPlaces(".", inline=False, one_machine=False)
    items = encode_rows_task(config, "sft", bad_rows, places, str(directory / "cache"))
    facts, columns, *_ = (item for item in items if not isinstance(item, str))
    ref = ray.put(columns)
    lengths, loss_lengths = facts.lengths, facts.loss_lengths
    pointers = [RowPointer(ref, row) for row in range(len(lengths))]
    return Rows(pointers, lengths.tolist(), row_weights(loss_lengths, "sft"))


def spec_of(config: SFTConfig, *, vision: bool = False, publish_mode: str | None = None) -> TrainerSpec:
    """The settings by `specs.policy_spec` for the ranks on a machine without a GPU."""
    return TrainerSpec(
        model=specs.model_spec(config, on_gpu=False, takes_media=vision),
        tuner=specs.tuner(config, config.lora_dropout),
        optimizer=specs.optimizer(config, total_steps=10),
        loss="sft",
        loss_settings=SFTSettings(),
        score=ScoreSettings(1.0, 60.0),
        seed=config.seed,
        gradient_checkpointing=bool(config.gradient_checkpointing),
        publish_mode=publish_mode,
    )


class World:
    """Ranks that are one run after another."""

    def __init__(self, size: int, slots: Any, first: TrainerSpec) -> None:
        self.group = WorkerGroup(
            GroupSpec("policy", size, cpus=0.5),
            slots,
            Chameleon,
            lambda rank: {"spec": first, "rank": rank, "world_size": size},
            trainer_env(1, on_gpu=False),
            120.0,
        )
        self.policy = PolicyGroup(TrainerWorld(self.group, first, 512, 240.0))

    def become(self, spec: TrainerSpec) -> tuple[str, ...]:
        """Every rank starts over; returns rank 0's notices."""
        notices = self.group.call("become", spec)[0]
        self.policy.world.spec = spec
        self.policy.world.weight_index = self.group.call("weight_index") if spec.publish_mode else []
        return tuple(notices)

    def train(self, rows: Rows, steps: range) -> list[float]:
        """Trains on all rows in each step; the losses."""
        batch = TrainBatch(rows.pointers, np.asarray(rows.lengths), scalars={"weight": rows.weights})
        return [self.policy.world.train(batch, step).metrics["loss"] for step in steps]

    def logits(self, directory: Path) -> np.ndarray:
        """Rank 0's logits of the probe text that the tokenizer in `directory` makes."""
        return self.group.call("logits", str(directory))[0]
