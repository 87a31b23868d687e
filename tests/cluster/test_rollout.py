"""The rollout engine pulls weights from the store: what it samples with is what was published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raytune_rl.errors import StaleWeightsError
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.rollout import EngineSpec, Sampling
from raytune_rl.protocol.trajectory import EpisodeRequest
from raytune_rl.protocol.weights import Manifest, TensorEntry
from raytune_rl.runtime.weights import plan_buckets, start_store, to_bytes
from raytune_rl.workers.rollout import RolloutWorker, rollout_env
from tests.cluster.conftest import Tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
PROMPTS = {"prompt": Ragged.from_rows([list(range(5, 25)), list(range(30, 90))], np.int32)}
REQUESTS = [EpisodeRequest(0, 0, (1, 2, 3)), EpisodeRequest(1, 1, (4, 5, 6))]
SAMPLING = Sampling(temperature=0.9, max_tokens=24)


class Publisher:
    """A trainer without training: it publishes weights that change a lot from version to version."""

    def __init__(self, path: Path, store: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.store = start_store(store)

    def publish(self, version: int, bucket_bytes: int = 40_000) -> None:
        named = list(self.model.named_parameters())
        entries = [TensorEntry.of(n, p) for n, p in named]
        buckets = plan_buckets(entries, bucket_bytes)
        assert len(buckets) > 3
        refs = tuple(ray.put([to_bytes(named[i][1]) for i in bucket]) for bucket in buckets)
        index = tuple(tuple(entries[i] for i in bucket) for bucket in buckets)
        ray.get(self.store.publish.remote(Manifest(version, "full", refs, index)), timeout=30)

    def perturb(self) -> None:
        with self.torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(self.torch.randn_like(parameter) * 0.1)

    def gap(self, columns: Columns) -> float:
        """Largest difference between the engine's log-probs and this model's."""
        worst = 0.0
        for row, tokens in enumerate(_rows(columns["tokens"])):
            ids = self.torch.tensor(tokens).long()[None]
            logits = self.model(ids).logits[0, :-1].float() / SAMPLING.temperature
            mine = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].detach().numpy()
            mask = _rows(columns["loss_mask"])[row]
            worst = max(worst, float(np.abs(mine[mask[1:]] - _rows(columns["logprobs"])[row]).max()))
        return worst


def _rows(column: Any) -> list[np.ndarray]:
    return [column[i] for i in range(len(column))]


def engine(model: Path, store: str, rank: int = 0) -> Any:
    spec = EngineSpec(
        str(model),
        "float32",
        128,
        store,
        60.0,
        kv_cache_bytes=64 * 2**20,
        max_num_seqs=128,
        enforce_eager=True,
        seed=rank,
    )
    env = rollout_env(1, 1, on_gpu=False)
    return ray.remote(RolloutWorker).options(num_cpus=1, runtime_env={"env_vars": env}).remote(spec)


def generate(worker: Any, version: int) -> tuple[Any, Columns, list[str]]:
    refs = worker.generate.options(num_returns=4).remote(PROMPTS, REQUESTS, SAMPLING, version)
    return tuple(ray.get(refs, timeout=120)[:3])  # type: ignore[return-value]


@pytest.fixture(scope="module")
def late_engine(cluster: None, tiny: Tiny) -> Iterator[tuple[Publisher, Any]]:
    """A tied model, three versions already published, and an engine that is started only then."""
    publisher = Publisher(tiny.tied, "store-tied")
    for version in range(3):
        publisher.perturb()
        publisher.publish(version)
    worker = engine(tiny.tied, "store-tied")
    yield publisher, worker
    ray.kill(worker)


def test_a_late_engine_serves_nothing_before_it_pulled_the_newest(late_engine: tuple[Publisher, Any]) -> None:
    publisher, worker = late_engine
    assert ray.get(worker.ping.remote(), timeout=240)["version"] is None
    with pytest.raises(ray.exceptions.RayTaskError) as refused:
        generate(worker, 2)
    assert isinstance(refused.value.cause, StaleWeightsError)
    assert ray.get(worker.load_weights.remote(None), timeout=60)[0] == 2
    _, columns, _ = generate(worker, 2)
    assert publisher.gap(columns) < 1e-4


def test_tied_head_follows_every_version(late_engine: tuple[Publisher, Any]) -> None:
    """A tied head keeps a packed copy on a CPU; a reload that missed it would be off by more than a nat."""
    publisher, worker = late_engine
    for version in (3, 4):
        publisher.perturb()
        publisher.publish(version)
        assert ray.get(worker.load_weights.remote(version), timeout=60)[0] == version
        episodes, columns, texts = generate(worker, version)
        assert publisher.gap(columns) < 1e-4
        assert {m.version for m in episodes} == {version}
        assert set(columns["versions"].values.tolist()) == {version}  # type: ignore[union-attr]
        assert len(texts) == 6


def test_an_engine_never_answers_for_another_version(late_engine: tuple[Publisher, Any]) -> None:
    _, worker = late_engine
    with pytest.raises(ray.exceptions.RayTaskError, match="asked to sample with weight version 3"):
        generate(worker, 3)
    with pytest.raises(ray.exceptions.RayTaskError, match="not in the store"):
        ray.get(worker.load_weights.remote(0), timeout=60)
    # A pull that failed acknowledges nothing: the engine must be loaded before it serves again.
    assert ray.get(worker.ping.remote(), timeout=30)["version"] is None
    assert ray.get(worker.load_weights.remote(None), timeout=60)[0] == 4


def test_trajectories_are_what_was_sampled(late_engine: tuple[Publisher, Any]) -> None:
    _, worker = late_engine
    episodes, columns, texts = generate(worker, 4)
    again = generate(worker, 4)
    for row, episode in enumerate(episodes):
        tokens, mask = columns["tokens"][row], columns["loss_mask"][row]  # type: ignore[index]
        prompt = PROMPTS["prompt"][REQUESTS[episode.prompt_id].row]
        np.testing.assert_array_equal(tokens[: episode.prompt_tokens], prompt)
        assert mask.sum() == episode.completion_tokens == len(columns["logprobs"][row])  # type: ignore[index]
        assert not mask[: episode.prompt_tokens].any()
        assert episode.finish_reason in ("stop", "length")
        assert (episode.finish_reason == "length") == (
            episode.completion_tokens == SAMPLING.max_tokens and tokens[-1] != 2
        )
        np.testing.assert_array_equal(tokens, again[1]["tokens"][row])  # type: ignore[index]
    assert len({columns["tokens"][i].tobytes() for i in range(3)}) == 3, "seeds give different completions"  # type: ignore[index]
    assert texts == again[2]


def test_more_prompts_than_one_prefill_holds(late_engine: tuple[Publisher, Any]) -> None:
    """Each completion has a seed of its own, and no prompt may be cut over two steps of the engine."""
    publisher, worker = late_engine
    many = [EpisodeRequest(0, 1, tuple(range(100)))]
    refs = worker.generate.options(num_returns=4).remote(PROMPTS, many, Sampling(0.9, 2), 4)
    episodes, columns, _, _ = ray.get(refs, timeout=120)
    assert len(episodes) == 100
    assert publisher.gap(columns) < 1e-4
