"""The rollout engine pulls weights from the store: what it samples with is what was published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raytune_rl.errors import StaleWeightsError
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.rollout import EngineSpec, Sampling
from raytune_rl.protocol.tickets import Burst, EngineProgress, InFlight, WeightUpdate
from raytune_rl.protocol.trajectory import EpisodeFacts, EpisodeRequest
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

    def gap(self, columns: Columns, version: int | None = None, never: tuple[int, ...] = ()) -> float:
        """Largest difference between the engine's log-probs and this model's; of the tokens that a version
        sampled, where some were `never` drawn."""
        worst = 0.0
        for row, tokens in enumerate(_rows(columns["tokens"])):
            ids = self.torch.tensor(tokens).long()[None]
            logits = self.model(ids).logits[0, :-1].float() / SAMPLING.temperature
            logits[:, list(never)] = float("-inf")
            mine = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].detach().numpy()
            mask = _rows(columns["loss_mask"])[row]
            gaps = np.abs(mine[mask[1:]] - _rows(columns["logprobs"])[row])
            if version is not None:
                gaps = gaps[_rows(columns["versions"])[row] == version]
            worst = max(worst, float(gaps.max()))
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


def ask(
    worker: Any, requests: Sequence[EpisodeRequest], version: int | None, sampling: Sampling = SAMPLING
) -> list[Any]:
    """Starts groups that begin in the same step; the references of each."""
    return [
        worker.run_group.options(num_returns=4).remote(
            PROMPTS, r, sampling, version, None, Burst(f"burst {id(requests)}", len(requests), index)
        )
        for index, r in enumerate(requests)
    ]


def answers(asked: list[Any]) -> tuple[list[EpisodeFacts], Columns, list[str]]:
    """Of all groups, one after the other."""
    groups = [ray.get(refs, timeout=120) for refs in asked]
    rows = {name: [row for g in groups for row in _rows(g[1][name])] for name in groups[0][1]}
    columns: Columns = {name: Ragged.from_rows(r, r[0].dtype) for name, r in rows.items()}
    return [f for g in groups for f in g[0]], columns, [text for g in groups for text in g[2]]


def generate(worker: Any, version: int) -> tuple[list[EpisodeFacts], Columns, list[str]]:
    return answers(ask(worker, REQUESTS, version))


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
    assert ray.get(worker.load_weights.remote(None), timeout=60).version == 2
    _, columns, _ = generate(worker, 2)
    assert publisher.gap(columns) < 1e-4


def test_tied_head_follows_every_version(late_engine: tuple[Publisher, Any]) -> None:
    """A tied head keeps a packed copy on a CPU; a reload that missed it would be off by more than a nat."""
    publisher, worker = late_engine
    for version in (3, 4):
        publisher.perturb()
        publisher.publish(version)
        assert ray.get(worker.load_weights.remote(version), timeout=60).version == version
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
    assert ray.get(worker.load_weights.remote(None), timeout=60).version == 4


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
    episodes, columns, _ = answers(ask(worker, many, 4, Sampling(0.9, 2)))
    assert len(episodes) == 100
    assert publisher.gap(columns) < 1e-4


LONG = Sampling(temperature=0.9, max_tokens=66)
END = (2,)
NO_END = replace(LONG, disallowed_token_ids=END)


def half_written(worker: Any) -> None:
    """Waits until the engine is in the middle of what it was asked."""
    begun: EngineProgress | None = None
    for _ in range(10_000):
        now: EngineProgress = ray.get(worker.progress.remote(), timeout=60)
        begun = now if begun is None and now.unfinished else begun
        if begun is not None and now.steps >= begun.steps + 8:
            assert now.unfinished, "too fast for this test: ask for longer completions"
            return
    raise AssertionError("the engine makes no steps")


@pytest.mark.parametrize("in_flight", ["keep", "recompute", "abort", "drain"])
def test_new_weights_while_requests_run(late_engine: tuple[Publisher, Any], in_flight: InFlight) -> None:
    """Every token bears the version that sampled it: its log-prob is that version's, given what is before."""
    publisher, worker = late_engine
    old = ray.get(worker.ping.remote(), timeout=30)["version"]
    new, before = old + 1, copy(publisher)
    before.model = deepcopy(publisher.model)
    publisher.perturb()
    publisher.publish(new)
    asked = ask(worker, REQUESTS, None, NO_END)
    half_written(worker)
    update: WeightUpdate = ray.get(worker.load_weights.remote(new, in_flight), timeout=60)
    assert update.version == new
    counts = {"keep": update.kept, "recompute": update.recomputed, "abort": update.aborted}
    assert {name for name, count in counts.items() if count} == {in_flight} - {"drain"}
    facts, columns, _ = answers(asked)
    of_each = {"drain": [old], "abort": [new]}.get(in_flight, [old, new])
    versions = [row.tolist() for row in _rows(columns["versions"])]
    assert all(row == sorted(row) for row in versions)
    half = counts.get(in_flight, 6)  # the others had ended before
    assert sum(sorted(set(row)) == of_each for row in versions) == half
    assert {version for row in versions for version in row} <= {old, new}
    for fact, row in zip(facts, versions, strict=True):
        newest = row[-1] if row[-1] != row[0] else None
        assert (fact.version, fact.newest_version, fact.completion_tokens) == (row[0], newest, len(row))
    if in_flight != "abort":
        assert before.gap(columns, old, END) < 1e-4
    if in_flight in ("recompute", "abort"):
        assert publisher.gap(columns, new, END) < 1e-4
    if in_flight == "keep":  # each new token by the new weights, from keys and values of the old ones
        assert publisher.gap(columns, new, END) > 1e-2
    # What comes later is computed from nothing that the old weights have left.
    assert publisher.gap(generate(worker, new)[1]) < 1e-4


def test_what_nobody_wants_any_more_makes_room(late_engine: tuple[Publisher, Any]) -> None:
    _, worker = late_engine
    asked = ask(worker, REQUESTS, None, NO_END)
    half_written(worker)
    ray.cancel(asked[0][0])
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(asked[0][0], timeout=60)
    while ray.get(worker.progress.remote(), timeout=60).unfinished > 3:  # aborted between two steps
        pass
    answers(asked[1:])
    done = ray.get(worker.progress.remote(), timeout=60)
    assert (done.unfinished, done.busy) == (0, False)


def test_groups_that_come_alone_are_answered_beside_others(late_engine: tuple[Publisher, Any]) -> None:
    """Without a burst each group begins as it comes, and ends as it ends."""
    publisher, worker = late_engine
    long = ask(worker, REQUESTS[:1], None, NO_END)
    half_written(worker)
    facts, columns, _ = answers(ask(worker, REQUESTS[1:], None, Sampling(0.9, 2)))
    assert max(f.completion_tokens for f in facts) <= 2
    assert publisher.gap(columns) < 1e-4
    assert publisher.gap(answers(long)[1], never=END) < 1e-4
