"""The policy worker with a scalar head on real DeepSpeed: a critic of two ranks, a reward model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from raytune_rl.algorithms.aggregation import pair_weights, row_weights
from raytune_rl.algorithms.losses.ppo import ValueSettings, clipped_value_loss
from raytune_rl.algorithms.losses.rm import RMSettings
from raytune_rl.algorithms.pairs import PAIR, pair_numbers
from raytune_rl.config import deepspeed
from raytune_rl.data.microbatch import plan_micro_batches
from raytune_rl.groups.world import TrainerWorld, rank_share
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.scalar import ScalarScorer
from raytune_rl.models.weights import save_model
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.model import ModelSpec, ScoreSettings, TunerSettings
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import OptimizerSpec, TrainerSpec
from raytune_rl.runtime.cluster import reserve
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.workers.scoring import forward_inputs
from raytune_rl.workers.trainer import TrainerWorker, trainer_env
from tests.cluster.conftest import Tiny
from tests.columns import collate_rows

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
ROWS = 10


def spec(model: Path, loss: str, settings: Any, tuner: Any) -> TrainerSpec:
    return TrainerSpec(
        model=ModelSpec(str(model), "float32", None, "padded"),
        tuner=TunerSettings(tuner_type=tuner, lora_dropout=0.0),
        optimizer=OptimizerSpec(1e-2, "constant", 0, 10, (0.9, 0.95), 1e-8, 0.0, 1.0, deepspeed.load(None)),
        loss=loss,
        loss_settings=settings,
        score=ScoreSettings(1.0, 60.0),
        seed=1,
        gradient_checkpointing=False,
    )


class World:
    """A started group with a scalar head."""

    def __init__(self, given: TrainerSpec, size: int, max_tokens: int, slots: Any) -> None:
        self.group = WorkerGroup(
            GroupSpec("critic", size, cpus=0.5),
            slots,
            TrainerWorker,
            lambda rank: {"spec": given, "rank": rank, "world_size": size},
            trainer_env(1, on_gpu=False),
            120.0,
        )
        self.policy = TrainerWorld(self.group, given, max_tokens, 240.0)


@pytest.fixture(scope="module")
def headed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has its head already."""
    directory = tmp_path_factory.mktemp("headed")
    torch.manual_seed(1)
    save_model(load_model(str(tiny.untied), scalar=True).model, directory, load_tokenizer(str(tiny.untied)))
    return directory


@pytest.fixture(scope="module")
def worlds(cluster: None, tiny: Tiny, headed: Path) -> Iterator[dict[str, World]]:
    critic = spec(headed, "ppo_value", ValueSettings(), "full")
    model = spec(tiny.untied, "rm", RMSettings(), "lora")
    sizes = {"two": 2, "rm": 1}
    with reserve([GroupSpec(name, size, cpus=0.5) for name, size in sizes.items()], 60.0) as slots:
        made = {
            "two": World(critic, 2, 64, slots["two"]),
            "rm": World(model, 1, 10_000, slots["rm"]),
        }
        assert not any("head" in notice for notice in made["two"].policy.ready().notices)
        assert any("random" in notice for notice in made["rm"].policy.ready().notices)
        yield made
        for world in made.values():
            world.group.shutdown()


def rows() -> tuple[Columns, list[int]]:
    rng = np.random.default_rng(7)
    prompts, completions = rng.integers(4, 12, ROWS), rng.integers(1, 30, ROWS)
    sizes = list(zip(prompts.tolist(), completions.tolist(), strict=True))
    columns: Columns = {
        "tokens": Ragged.from_rows([rng.integers(20, 300, p + c) for p, c in sizes], np.int32),
        "loss_mask": Ragged.from_rows([np.arange(p + c) >= p for p, c in sizes], np.bool_),
        "logprobs": Ragged.from_rows([-rng.uniform(4, 7, c) for _, c in sizes], np.float32),
        "old_values": Ragged.from_rows([0.3 * rng.normal(size=c) for _, c in sizes], np.float32),
        "returns": Ragged.from_rows([rng.normal(size=c) for _, c in sizes], np.float32),
    }
    return columns, completions.tolist()


def test_a_critics_step_is_that_of_one_process(worlds: dict[str, World], headed: Path) -> None:
    """Two ranks with small micro-batches against one plain pass over all rows: loss, gradient, values."""
    columns, lengths = rows()
    ref = ray.put(columns)
    pointers = [RowPointer(ref, i) for i in range(ROWS)]
    tokens: Any = columns["tokens"]
    weight = row_weights(lengths, "dapo")
    extra_columns = {"old_values": pointers, "returns": pointers}
    batch = TrainBatch(pointers, tokens.lengths, extra_columns, {"weight": weight})
    step = worlds["two"].policy.train(batch, 0).metrics

    model = load_model(str(headed), scalar=True).model
    masks: Any = columns["loss_mask"]
    micro = collate_rows(tokens, masks, range(ROWS), layout="padded", pad_token_id=0)
    values = ScalarScorer(model)(**forward_inputs(micro, "values"))
    old, returns = (torch.from_numpy(columns[n].values) for n in ("old_values", "returns"))  # type: ignore[union-attr]
    loss = clipped_value_loss(values, old, returns)[0].mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert step["value"] == pytest.approx(values.mean().item(), abs=1e-5)
    assert "rollout_correction/logp_abs_diff_max" not in step, "a critic has no log-probs to compare"


def test_a_reward_model_learns_and_transformers_gives_its_scores(
    worlds: dict[str, World], tiny: Tiny, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    columns, lengths = rows()
    ref = ray.put(columns)
    pointers = [RowPointer(ref, i) for i in range(ROWS)]
    tokens = columns["tokens"].lengths.tolist()  # type: ignore[union-attr]
    weights = pair_weights(lengths)
    scalars = {"row_weight": weights.row_weight, PAIR: pair_numbers(ROWS // 2)}
    policy = worlds["rm"].policy
    whole = TrainBatch(pointers, np.asarray(tokens), scalars=scalars)
    steps = [policy.train(whole, step).metrics for step in range(4)]
    assert steps[-1]["loss"] < steps[0]["loss"]
    schedule = plan_micro_batches(tokens, world_size=1, max_tokens=10_000, layout="padded")
    batch = rank_share(schedule, 0, whole).batch
    mine = worlds["rm"].group.map("evaluate", [batch])[0].result()
    policy.save(tmp_path, only_model=True)
    base = AutoModelForSequenceClassification.from_pretrained(tiny.untied, num_labels=1)
    model = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        scores = [
            float(model(input_ids=torch.from_numpy(columns["tokens"][i].astype(np.int64))[None]).logits)  # type: ignore[index,union-attr]
            for i in range(ROWS)
        ]
    assert mine["rewards/chosen"] == pytest.approx(np.mean(scores[0::2]), abs=1e-5)
    assert mine["rewards/rejected"] == pytest.approx(np.mean(scores[1::2]), abs=1e-5)
    assert mine["rewards/max"] == pytest.approx(max(scores), abs=1e-5)
