"""The policy world on real DeepSpeed: the same data gives the same gradient however it is cut, and state
survives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raytune_rl.algorithms.aggregation import pair_weights, row_weights, single_weights
from raytune_rl.algorithms.correction import RolloutCorrection
from raytune_rl.algorithms.losses.cispo import CISPOSettings
from raytune_rl.algorithms.losses.cpo import CPOSettings
from raytune_rl.algorithms.losses.dpo import DPOSettings
from raytune_rl.algorithms.losses.fipo import FIPOSettings
from raytune_rl.algorithms.losses.grpo import GRPOSettings
from raytune_rl.algorithms.losses.kto import KTOSettings
from raytune_rl.algorithms.losses.orpo import ORPOSettings
from raytune_rl.algorithms.losses.sapo import SAPOSettings
from raytune_rl.algorithms.losses.sft import SFTSettings
from raytune_rl.algorithms.pairs import PAIR, pair_numbers
from raytune_rl.algorithms.registry import get_loss
from raytune_rl.config import deepspeed
from raytune_rl.data.microbatch import plan_micro_batches
from raytune_rl.data.prefix_plan import Budget, plan_step
from raytune_rl.errors import CheckpointError, WorkerFailedError
from raytune_rl.groups.trainer import PolicyGroup
from raytune_rl.groups.world import TOKENS_SAVED, TrainerWorld, rank_share
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.model import ModelSpec, ScoreSettings, TunerSettings
from raytune_rl.protocol.rows import Prefixes, RowPointer, TrainBatch
from raytune_rl.protocol.train import OptimizerSpec, TrainerSpec
from raytune_rl.runtime.cluster import reserve
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.runtime.wait import fetch
from raytune_rl.workers.reference import ReferenceWorker
from raytune_rl.workers.trainer import TrainerWorker, trainer_env
from tests.algorithms.thresholds import step_threshold
from tests.cluster.conftest import Tiny

pytestmark = pytest.mark.cluster
ROWS = 12


class InspectedPolicy(TrainerWorker):
    """A policy worker that shows what a test wants to see."""

    def gradient(
        self, batch: Any, layout: str, loss: str | None = None, settings: Any = None
    ) -> dict[str, np.ndarray]:
        """Full gradient of the step's loss (the worker's own, or another), by parameter name, without
        stepping.
        """
        from deepspeed.utils import safe_get_full_grad

        own = self._micro
        self._micro = replace(
            own,
            spec=replace(own.spec, model=replace(own.spec.model, layout=layout)),
            loss=own.loss if loss is None else get_loss(loss),
            settings=settings or own.settings,
        )
        self._backward(batch, step=0)
        self._micro = own
        found = {n: safe_get_full_grad(p).numpy().copy() for n, p in self._engine.module.named_parameters()}
        self._engine.optimizer.zero_grad()
        self._engine.optimizer.averaged_gradients = {}
        return found

    def weights(self) -> dict[str, np.ndarray]:
        return {n: p.detach().numpy().copy() for n, p in self._engine.module.named_parameters()}


def rows() -> tuple[Columns, list[int], np.ndarray]:
    """Trajectories of very different lengths, four a prompt, with log-probs of another policy, and
    advantages."""
    rng = np.random.default_rng(7)
    of_groups = [rng.integers(5, 300, length) for length in rng.integers(4, 12, ROWS // 4)]
    completions = rng.integers(1, 40, ROWS)
    prompts = [len(of_groups[row // 4]) for row in range(ROWS)]
    tokens = [np.append(of_groups[row // 4], rng.integers(5, 300, completions[row])) for row in range(ROWS)]
    columns: Columns = {
        "tokens": Ragged.from_rows(tokens, np.int32),
        "loss_mask": Ragged.from_rows(
            [np.arange(p + c) >= p for p, c in zip(prompts, completions, strict=True)], np.bool_
        ),
        "logprobs": Ragged.from_rows([-rng.uniform(4, 7, c) for c in completions], np.float32),
    }
    return columns, [int(c) for c in completions], rng.normal(size=ROWS)


def prefixes_of(columns: Columns) -> Prefixes:
    masks = columns["loss_mask"]
    prompts = [int(np.argmax(masks[row])) for row in range(ROWS)]  # type: ignore[index]
    return Prefixes(np.arange(ROWS) // 4, np.array(prompts))


def spec(tiny: Tiny) -> TrainerSpec:
    return TrainerSpec(
        model=ModelSpec(str(tiny.tied), "float32", None, "padded", sharing="true"),
        tuner=TunerSettings(tuner_type="full"),
        optimizer=OptimizerSpec(1e-2, "constant", 0, 10, (0.9, 0.95), 1e-8, 0.1, 1.0, deepspeed.load(None)),
        loss="grpo",
        loss_settings=GRPOSettings(beta=0.04),
        score=ScoreSettings(0.9, 60.0),
        seed=1,
        gradient_checkpointing=False,
        publish_mode="full",
    )


@dataclass(frozen=True)
class Case:
    """A loss, with the row scalars that it is told and the columns beside "ref_logprobs"."""

    loss: str
    settings: Any
    weights: Callable[[np.ndarray], dict[str, Any]]
    extra: tuple[str, ...] = ()


def mean_of(kind: str) -> Callable[[np.ndarray], dict[str, Any]]:
    return lambda lengths: {"weight": row_weights(lengths, kind, 40)}


def of_pairs(lengths: np.ndarray) -> dict[str, Any]:
    shift = np.full(len(lengths), 0.3)
    return {**vars(pair_weights(lengths)), PAIR: pair_numbers(len(lengths) // 2), "bco_shift": shift}


def of_labels(lengths: np.ndarray) -> dict[str, Any]:
    labels, point = np.arange(len(lengths)) % 2.0, np.full(len(lengths), 0.2)
    return {**vars(single_weights(lengths)), "label": labels, "reference_point": point}


TIS = RolloutCorrection("sequence_truncate", 1.5)
CASES = {
    "dapo": Case("grpo", GRPOSettings(epsilon_high=0.28, beta=0.0), mean_of("dapo"), ("old_logprobs",)),
    "dr_grpo": Case("grpo", GRPOSettings(kl_estimator="k2", correction=TIS), mean_of("dr_grpo")),
    "gspo": Case(
        "grpo", GRPOSettings(importance_sampling_level="sequence"), mean_of("grpo"), ("old_logprobs",)
    ),
    "cispo": Case("cispo", CISPOSettings(epsilon_high=5.0), mean_of("cispo"), ("old_logprobs",)),
    "sapo": Case("sapo", SAPOSettings(off_policy_delta=0.1), mean_of("sapo"), ("old_logprobs",)),
    "fipo": Case("fipo", FIPOSettings(beta=0.0), mean_of("fipo"), ("old_logprobs",)),
    "sft": Case("sft", SFTSettings(), mean_of("sft")),
    "dpo": Case("dpo", DPOSettings(rpo_alpha=0.5, ld_alpha=0.5), of_pairs),
    "mpo": Case("dpo", DPOSettings(loss_type=("sigmoid", "bco_pair", "sft", "ipo")), of_pairs),
    "kto": Case("kto", KTOSettings(), of_labels),
    "orpo": Case("orpo", ORPOSettings(), of_pairs),
    "cpo": Case("cpo", CPOSettings(), of_pairs),
    "simpo": Case("cpo", CPOSettings(loss_type="simpo", beta=2.0), of_pairs),
}


class World:
    """A started policy group of the inspected kind."""

    def __init__(self, tiny: Tiny, size: int, slots: Any) -> None:
        group_spec = GroupSpec("policy", size, cpus=0.5)
        self.spec = spec(tiny)
        self.group = WorkerGroup(
            group_spec,
            slots,
            InspectedPolicy,
            lambda rank: {"spec": self.spec, "rank": rank, "world_size": size},
            trainer_env(1, on_gpu=False),
            120.0,
        )
        self.policy = PolicyGroup(TrainerWorld(self.group, self.spec, 256, 240.0))

    def batches(
        self, max_tokens: int, layout: str, max_rows: int | None = None, case: Case | None = None
    ) -> list[Any]:
        columns, lengths, advantages = rows()
        ref = ray.put(columns)
        pointers = [RowPointer(ref, i) for i in range(ROWS)]
        totals = columns["tokens"].lengths.tolist()  # type: ignore[union-attr]
        together = 2 if case and get_loss(case.loss).rows == "pairs" else 1
        prefixes = prefixes_of(columns)
        if layout == "shared":
            budget = Budget(len(self.group), max_tokens, "padded", "true", together)
            schedule = plan_step(np.array(totals), prefixes, budget)
        else:
            schedule = plan_micro_batches(
                totals,
                world_size=len(self.group),
                max_tokens=max_tokens,
                layout=layout,  # type: ignore[arg-type]
                max_rows=max_rows,
                together=together,
            )
        scalars = {"weight": row_weights(lengths, "grpo"), "advantage": advantages}
        extra = {"ref_logprobs": pointers}
        if case is not None:
            scalars |= case.weights(np.array(lengths))
            extra |= dict.fromkeys(case.extra, pointers)
        batch = TrainBatch(pointers, np.asarray(totals), extra, scalars, prefixes)
        return [rank_share(schedule, r, batch).batch for r in range(len(self.group))]

    def gradient(
        self, max_tokens: int, layout: str, max_rows: int | None = None, case: Case | None = None
    ) -> dict[str, np.ndarray]:
        batches = self.batches(max_tokens, layout, max_rows, case)
        which = () if case is None else (case.loss, case.settings)
        pending = [self.group.submit(r, "gradient", b, layout, *which) for r, b in enumerate(batches)]
        return ray.get([p.ref for p in pending], timeout=120)[0]

    def train(self, step: int) -> dict[str, float]:
        columns, lengths, advantages = rows()
        ref = ray.put(columns)
        pointers = [RowPointer(ref, i) for i in range(ROWS)]
        batch = TrainBatch(
            pointers,
            columns["tokens"].lengths,  # type: ignore[union-attr]
            {"ref_logprobs": pointers},
            {"weight": row_weights(lengths, "grpo"), "advantage": advantages},
        )
        return self.policy.world.train(batch, step).metrics

    def weights(self) -> dict[str, np.ndarray]:
        return self.group.call("weights")[0]


@pytest.fixture(scope="module")
def worlds(cluster: None, tiny: Tiny) -> Iterator[dict[int, World]]:
    """A world of one rank and one of two."""
    one, two = GroupSpec("one", 1, cpus=0.5), GroupSpec("two", 2, cpus=0.5)
    with reserve([one, two], 60.0) as slots:
        made = {1: World(tiny, 1, slots["one"]), 2: World(tiny, 2, slots["two"])}
        for world in made.values():
            world.policy.ready()
        yield made
        for world in made.values():
            world.group.shutdown()


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    worst = max(float(np.abs(a[n] - b[n]).max()) for n in a)
    assert worst < tolerance, worst


@pytest.mark.timeout(400)
def test_gradient_does_not_depend_on_how_the_step_is_cut(worlds: dict[int, World]) -> None:
    whole = worlds[1].gradient(10_000, "padded")
    assert max(float(np.abs(g).max()) for g in whole.values()) > 1e-3
    cuts = [
        (1, 10_000, "padded", 1),
        (1, 10_000, "padded", 8),
        (1, 10_000, "packed", None),
        (1, 128, "packed", None),
        (1, 10_000, "shared", None),
        (1, 96, "shared", None),
    ]
    cuts += [
        (2, 10_000, "padded", None),
        (2, 64, "padded", None),
        (2, 10_000, "padded", 1),
        (2, 128, "packed", None),
        (2, 10_000, "shared", None),
        (2, 64, "shared", None),
    ]
    for size, max_tokens, layout, max_rows in cuts:
        assert_same(whole, worlds[size].gradient(max_tokens, layout, max_rows))


@pytest.mark.parametrize("name", CASES)
def test_no_loss_depends_on_how_its_step_is_cut(worlds: dict[int, World], name: str) -> None:
    """One micro-batch of one rank against several, packed and with shared prompts, of one and of two
    ranks."""
    whole = worlds[1].gradient(10_000, "padded", case=CASES[name])
    size = max(float(np.abs(g).max()) for g in whole.values())
    assert size > 1e-3
    for ranks, layout in ((1, "packed"), (2, "padded"), (2, "packed"), (1, "shared"), (2, "shared")):
        cut = worlds[ranks].gradient(96, layout, case=CASES[name])
        assert_same(whole, cut, 1e-6 * max(size, 1.0))


def test_loss_and_norm_are_those_of_the_whole_step(worlds: dict[int, World], tmp_path: Path) -> None:
    """Steps in worlds of one and of two ranks go the same way, and a checkpoint of one continues in the
    other.
    """
    first = {size: world.train(0) for size, world in worlds.items()}
    assert first[1]["loss"] == pytest.approx(first[2]["loss"], abs=1e-6)
    assert first[1]["grad_norm"] == pytest.approx(first[2]["grad_norm"], rel=1e-5)
    assert first[1]["kl"] == pytest.approx(first[2]["kl"], rel=1e-5)
    # Adam divides by the gradient's size: where that is near 0, its rounding is a few percent of a step.
    assert_same(worlds[1].weights(), worlds[2].weights(), 5e-4)

    worlds[2].policy.world.save(tmp_path / "two", only_model=False)
    moved = [worlds[2].train(step)["loss"] for step in (1, 2)]
    worlds[1].policy.world.load(tmp_path / "two")
    assert [worlds[1].train(step)["loss"] for step in (1, 2)] == pytest.approx(moved, abs=1e-6)
    worlds[2].policy.world.load(tmp_path / "two")
    again = [worlds[2].train(step)["loss"] for step in (1, 2)]
    assert again == moved, "the same world resumes bit by bit"


def test_checkpoint_is_what_transformers_loads(worlds: dict[int, World], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    worlds[1].policy.world.save(tmp_path, only_model=True)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    trained = {n.removeprefix("model."): w for n, w in worlds[1].weights().items()}
    assert loaded.keys() == trained.keys()
    for name, weight in trained.items():
        np.testing.assert_array_equal(loaded[name].detach().numpy(), weight)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"


def test_a_checkpoint_without_optimizer_is_refused_by_name(worlds: dict[int, World], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="save_only_model"):
        worlds[1].policy.world.load(tmp_path)


def test_an_error_in_a_worker_has_its_name(worlds: dict[int, World]) -> None:
    refused = worlds[1].group.submit(0, "gradient", None, "padded")
    with pytest.raises(WorkerFailedError, match=r"policy\[0\] failed during 'gradient'"):
        fetch(refused)


def test_ranks_share_the_publication_and_miss_nothing(worlds: dict[int, World]) -> None:
    from raytune_rl.runtime.weights import read

    manifest = worlds[2].policy.publish(0)
    arrays = [array for bucket in manifest.buckets for array in ray.get(bucket, timeout=30)]
    # Each kind lies together in DeepSpeed's flat buffer: somewhat more than 1 MiB of matrices, and vectors.
    assert len(arrays) == 3 < len(manifest.index[0])
    published = {name: tensor.numpy() for name, tensor in read(manifest, 30.0)}
    expected = {n.removeprefix("model."): w for n, w in worlds[2].weights().items()}
    assert published.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(published[name], weight)


def test_a_version_stands_on_an_older_one_until_most_of_it_changed(
    worlds: dict[int, World], tmp_path: Path
) -> None:
    """Of two ranks one has no bucket. Ranks that went back to a checkpoint need nothing of before."""
    from raytune_rl.runtime.weights import read

    world = worlds[2]
    policy = PolicyGroup(world.policy.world, weight_delta=True)

    def published(version: int) -> float:
        manifest = policy.publish(version)
        expected = {n.removeprefix("model."): w for n, w in world.weights().items()}
        found = {name: tensor.numpy() for name, tensor in read(manifest, 30.0)}
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            np.testing.assert_array_equal(found[name], weight)
        return manifest.sent_nbytes / manifest.nbytes

    world.train(0)
    world.policy.world.save(tmp_path, only_model=False)
    assert published(0) == 1
    assert published(1) < 0.01, "nothing has changed"
    world.train(1)
    assert published(2) == 1, "float32 and a large step"
    world.policy.world.load(tmp_path)
    assert published(3) == 1
    assert published(4) < 0.01


def test_a_reference_moves_towards_the_policy_and_comes_back(
    worlds: dict[int, World], tmp_path: Path
) -> None:
    """As `sync_ref_model` has it; a tied head moves with its embedding, once."""
    spec = worlds[1].spec
    reference = ReferenceWorker(spec.model, spec.score)
    start = {n: p.detach().clone().numpy() for n, p in reference._model.scorer.named_parameters()}
    reference.save(str(tmp_path / "start"))
    worlds[2].train(0)
    reference.mix(worlds[2].policy.publish(1), 0.25)
    policy = worlds[2].weights()
    moved = {n: p.detach().numpy() for n, p in reference._model.scorer.named_parameters()}
    assert start.keys() == policy.keys() == moved.keys()
    for name, before in start.items():
        np.testing.assert_allclose(moved[name], 0.25 * policy[name] + 0.75 * before, atol=1e-6)
    assert max(float(np.abs(moved[n] - start[n]).max()) for n in start) > 1e-3
    reference.load(str(tmp_path / "start"))
    for name, parameter in reference._model.scorer.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), start[name])
    with pytest.raises(CheckpointError, match="saved without --sync_ref_model"):
        reference.load(str(tmp_path))


def test_log_probs_and_a_step_are_the_same_with_shared_prompts(worlds: dict[int, World]) -> None:
    columns, lengths, advantages = rows()
    ref = ray.put(columns)
    pointers = [RowPointer(ref, i) for i in range(ROWS)]
    totals = columns["tokens"].lengths  # type: ignore[union-attr]
    apart = TrainBatch(
        pointers,
        totals,
        {"ref_logprobs": pointers},
        {"weight": row_weights(lengths, "grpo"), "advantage": advantages},
    )
    alike = replace(apart, prefixes=prefixes_of(columns))
    once = sum(int(np.argmax(columns["loss_mask"][row])) for row in range(0, ROWS, 4))  # type: ignore[index]
    for world in worlds.values():
        assert world.policy.world.settled.sharing == "true"
        scored, shared = world.policy.logprobs(apart), world.policy.logprobs(alike)
        np.testing.assert_allclose(shared.sums, scored.sums, rtol=0, atol=1e-4)
    step = worlds[1].policy.world.train(alike, 0)
    assert step.tokens == sum(lengths) + once
    assert step.metrics[TOKENS_SAVED] == sum(totals) - step.tokens
    assert TOKENS_SAVED not in worlds[2].policy.world.train(apart, 0).metrics


# Of log pi - log pi_ref, as long as none is clamped.
KL = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.minimum(np.exp(-d) + d - 1, 10.0)}


def test_numbers_of_rows_do_not_depend_on_the_ranks(worlds: dict[int, World]) -> None:
    """The KL of each row, and the entropy that the top fifth of the step's tokens have."""
    columns, lengths, _ = rows()
    ref = ray.put(columns)
    pointers = [RowPointer(ref, i) for i in range(ROWS)]
    batch = TrainBatch(pointers, columns["tokens"].lengths)  # type: ignore[union-attr]
    for world in worlds.values():
        scored = world.policy.entropies(batch)
        counted = batch.with_columns(entropy=scored)
        found = [ray.get(p.ref) for p in scored]
        entropies = np.concatenate([f["entropy"][p.row] for f, p in zip(found, scored, strict=True)])
        assert len(entropies) == sum(lengths)
        assert entropies.min() > 0
        for share in (0.2, 1.0):
            threshold = world.policy.entropy_threshold(counted, lengths, share)
            assert threshold == step_threshold([entropies], share)
        some = [i for i in range(ROWS) if i % 3]
        part = world.policy.entropy_threshold(counted.part(some), [lengths[i] for i in some], 0.5)
        picked = [f["entropy"][p.row] for i, (f, p) in enumerate(zip(found, scored, strict=True)) if i % 3]
        assert part == step_threshold(picked, 0.5)

        for name, estimate in KL.items():
            both = batch.with_columns(old_logprobs=scored, ref_logprobs=pointers)
            kl = world.policy.row_kl(both, name)
            for i, (f, p) in enumerate(zip(found, scored, strict=True)):
                gap = f["logprobs"][p.row].astype(np.float64) - columns["logprobs"][i]  # type: ignore[index]
                assert kl[i] == pytest.approx(estimate(gap).sum(), rel=1e-12)
