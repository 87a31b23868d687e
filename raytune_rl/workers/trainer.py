"""The policy worker: one rank of the DeepSpeed world that trains the model.

A rank is told by the controller which rows to train on, in which micro-batches and with which weights; it
reads them, runs forward and backward, and steps. It knows no algorithm: the loss comes from the registry by
name, and with it the head of the model: over the vocabulary for a policy, of one output for a reward model or
a critic. Nothing here divides by a count: the row weights already hold the global normaliser
(`algorithms.aggregation`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raytune_rl.errors import ModelError
from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.protocol.train import (
    EstimateFacts,
    EstimateSettings,
    SnapshotPart,
    TokenOrder,
    TrainerFacts,
    TrainerSpec,
    TrainResult,
)
from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.runtime.device_env import one_device, pinned_as_asked
from raytune_rl.runtime.imports import import_once
from raytune_rl.workers import estimates, publishing, row_stats, scoring
from raytune_rl.workers.collectives import limit_collectives
from raytune_rl.workers.micro_steps import MicroSteps
from raytune_rl.workers.publishing import Publisher
from raytune_rl.workers.saving import writing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raytune_rl.algorithms.metrics import MetricSums
    from raytune_rl.algorithms.moments import Moments


def trainer_env(threads: int, on_gpu: bool) -> dict[str, str]:
    """Environment that must be set before torch and DeepSpeed are imported in the worker's process."""
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return {**env, **(pinned_as_asked(os.environ) if on_gpu else {"DS_ACCELERATOR": "cpu"})}


class TrainerWorker:
    """One rank. Constructed cheaply; `join` loads the model inside the torch.distributed world."""

    PROBED = True
    """`progress` is answered beside whatever else the rank is doing."""

    def __init__(self, spec: TrainerSpec, rank: int, world_size: int) -> None:
        self._spec = spec
        self._rank = rank
        self._world_size = world_size
        self._counted = 0

    def progress(self) -> int:
        """A number that grows with every micro-batch that is trained on."""
        return self._counted

    def ping(self) -> dict[str, Any]:
        """Proves that the process is there."""
        return {"rank": self._rank, "pid": os.getpid()}

    def open_store(self, timeout_s: float) -> tuple[str, int]:
        """Rank 0: opens the meeting point of the world on a port the system chooses. Returns host and
        port.
        """
        import_once("torch")
        import ray
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self._meeting = TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        return host, self._meeting.port

    def join(self, host: str, port: int, timeout_s: float) -> TrainerFacts:
        """Joins the world, loads the model and hands it to DeepSpeed."""
        import_once("torch")
        import torch
        from torch import distributed

        os.environ |= {
            "RANK": str(self._rank),
            "WORLD_SIZE": str(self._world_size),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            **one_device(os.environ),
        }
        timeout = timedelta(seconds=timeout_s)
        if self._rank != 0:
            self._meeting = distributed.TCPStore(host, port, is_master=False, timeout=timeout)
        longest = max(timeout_s, self._spec.score.timeout_s)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=self._meeting,
            rank=self._rank,
            world_size=self._world_size,
            timeout=timedelta(seconds=longest),
        )
        facts = self._build()
        limit_collectives(longest)  # those of groups that DeepSpeed made
        return facts

    def _build(self) -> TrainerFacts:
        import_once("raytune_rl.models.load", "raytune_rl.workers.isolation", "deepspeed")
        import torch

        from raytune_rl.algorithms.registry import get_loss
        from raytune_rl.models.adapters import head_of_its_own
        from raytune_rl.models.load import DTYPES, enable_gradient_checkpointing, load_tokenizer
        from raytune_rl.models.routing import check_balanced
        from raytune_rl.models.sharding import is_sharded
        from raytune_rl.models.tuner import apply_tuner, narrow_adapters, trains_vision
        from raytune_rl.models.weights import WeightExporter, whole
        from raytune_rl.rewards.plugins import load_plugins
        from raytune_rl.workers import isolation
        from raytune_rl.workers.engine import gathered, rounded_sums, shards_parameters, start_engine
        from raytune_rl.workers.offload import Offload

        spec = self._spec
        torch.manual_seed(spec.seed)
        load_plugins(spec.plugin_files)
        loss, given = get_loss(spec.loss), spec.loss_settings
        settings = loss.settings_type(**given) if isinstance(given, Mapping) else given
        zero = spec.optimizer.deepspeed.get("zero_optimization", {})
        sharded = zero.get("stage") == 3
        loaded = scoring.load(spec.model, loss.forward, zero if sharded else None)
        own_head = head_of_its_own(loaded.model)  # its files have one, and so the engine's
        if spec.router_aux_loss_coef:
            check_balanced(loaded.model)
        tuned = apply_tuner(loaded.model, spec.tuner, scoring.adapters(spec.model))
        wanted_dtype = spec.model.dtype
        computes_in = loaded.model.dtype if wanted_dtype is None else DTYPES[wanted_dtype]
        if scoring.device().type == "cuda" and computes_in == torch.bfloat16:
            narrow_adapters(tuned.model, computes_in)
        if spec.gradient_checkpointing:
            enable_gradient_checkpointing(tuned.model)
        scorer = scoring.scorer_of(tuned.model, loss.forward)
        cut = is_sharded(scorer)  # and so not checked yet
        self._media = scoring.media_collator(spec.model, loaded, always=sharded or trains_vision(tuned.model))
        self._tokenizer = (
            load_tokenizer(loaded.path, trust_remote_code=spec.model.trust_remote_code)
            if self._media is None
            else self._media.media.processor
        )
        # Planned before the engine cuts up what is whole.
        exporter = WeightExporter(scorer, spec.publish_mode) if spec.publish_mode else None  # type: ignore[arg-type]
        # An adapter that travels alone leaves both as they are.
        alone = exporter is None or exporter.mode == "adapter"
        if exporter is not None and not alone and exporter.unties != (spec.untied or own_head):
            raise ModelError(publishing.UNTIED)
        self._engine, self._rate = start_engine(scorer, spec.optimizer, computes_in)
        if cut:
            scorer.verify()
        settled = isolation.settle_rows(scorer, spec.model, self._media)
        self._spec = replace(spec, model=replace(spec.model, layout=settled.layout))
        self._micro = MicroSteps(self._engine, loss, settings, self._spec, self._media)
        self._offload = Offload(self._engine)
        self._gather = gathered if shards_parameters(self._engine) else whole
        self._publisher = (
            None
            if exporter is None
            else Publisher(exporter, self._gather, self._rank, self._world_size, spec.score.timeout_s)
        )
        dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
        notices = loaded.notices + tuned.notices + settled.notices
        notices += rounded_sums(self._engine)
        notices += scoring.end_of_turn_in_files(loaded, self._tokenizer)
        if loaded.new_head and not spec.model.adapters:
            start = "starts at 0" if loss.forward == "values" else "has random weights"
            notices += (f"the head that gives {loss.forward} is new and {start}",)
        return TrainerFacts(tuned.trainable, tuned.total, dtype, settled.layout, notices, settled.sharing)

    # -- training
    # ---------------------------------------------------------------------------------------------

    def train_step(self, batch: RowBatch, step: int) -> TrainResult:
        """One optimizer step over this rank's rows.

        Args:
            batch: Rows with the scalars "weight" (of the row's summed token loss, over the whole step and all
                ranks), "row_weight" (of the row's own loss) and "advantage", where the loss needs them; other
                scalars and extra columns go to the loss under their own names. An extra column "advantages"
                has one a token.
            step: Number of the step, from 0: it alone decides learning rate and dropout, so a resumed run
                repeats them.
        """
        from raytune_rl.workers import engine

        started = time.perf_counter()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._rate(step)
        metrics, tokens = self._backward(batch, step)
        return TrainResult(
            metrics=metrics,
            grad_norm=engine.step(self._engine),
            learning_rate=self._rate(step),
            seconds=time.perf_counter() - started,
            tokens=tokens,
            memory_gib=peak_memory_gib(),
        )

    def _backward(self, batch: RowBatch, step: int) -> tuple[MetricSums, int]:
        """Forward and backward of every micro-batch: the whole step's gradient, ready for `engine.step`."""
        import torch

        from raytune_rl.algorithms.metrics import merge_all

        torch.manual_seed(step_seed(self._spec.seed, step, self._rank))
        rows = scoring.read_rows(batch, self._spec.score.timeout_s)
        scoring.expect_media(rows, batch, self._media)
        load = self._micro.expert_load(rows, batch) if self._spec.router_aux_loss_coef else None
        self._engine.train()
        parts = []
        tokens = 0
        last = len(batch.micro_batches) - 1
        for number, members in enumerate(batch.micro_batches):
            self._engine.set_gradient_accumulation_boundary(number == last)
            loss, metrics, size = self._micro.loss_of(rows, batch, members, load)
            # DeepSpeed averages over ranks; the weights already hold the global normaliser, so undo that
            # mean.
            self._engine.backward(loss * self._world_size, scale_wrt_gas=False)
            if number != last:
                self._engine.step()  # only counts the micro-batch: the boundary is the last one
            parts.append(metrics.host())
            tokens += size
            self._counted += 1
        return merge_all(parts), tokens

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """Log-probs under the present weights; see `scoring.score`."""
        self._engine.eval()
        return scoring.score(self._engine, batch, self._spec.model, self._spec.score, self._media)

    def base_logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """The same of the base model: the adapter is off, and what it saves beside itself as it was."""
        from raytune_rl.models.unwrap import peft_model

        peft = peft_model(self._engine)
        assert peft is not None
        with peft.disable_adapter():
            return self.logprobs(batch)

    def entropies(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """The same, and the entropy at every loss token."""
        self._engine.eval()
        return scoring.score(self._engine, batch, self._spec.model, self._spec.score, self._media, True)

    def squares(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """The same, and the sum of the squared probabilities at every loss token."""
        self._engine.eval()
        spec = self._spec
        return scoring.score(self._engine, batch, spec.model, spec.score, self._media, with_squares=True)

    def token_baseline(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `row_stats.token_baseline`."""
        return row_stats.token_baseline(batch, self._spec.score.timeout_s)

    def count_entropies(self, batch: RowBatch, bucket: int | None) -> NDArray[np.int64]:
        """See `row_stats.count_entropies`."""
        return row_stats.count_entropies(batch, bucket, self._spec.score.timeout_s)

    def count_tokens(self, batch: RowBatch, order: TokenOrder, bucket: int | None) -> NDArray[np.int64]:
        """See `row_stats.count_tokens`."""
        return row_stats.count_tokens(batch, order, bucket, self._spec.score.timeout_s)

    def select_tokens(self, batch: RowBatch, order: TokenOrder, last: float) -> tuple[int, Columns]:
        """See `row_stats.select_tokens`."""
        return row_stats.select_tokens(batch, order, last, self._spec.score.timeout_s)

    def row_kl(self, batch: RowBatch, estimator: str) -> NDArray[np.float64]:
        """See `row_stats.row_kl`."""
        return row_stats.row_kl(batch, estimator, self._spec.score.timeout_s)

    def values(self, batch: RowBatch) -> tuple[int, Columns]:
        """A critic's values under the present weights; see `scoring.values`."""
        self._engine.eval()
        return scoring.values(self._engine, batch, self._spec.model, self._spec.score, self._media)

    def reward_moments(self, batch: RowBatch, settings: EstimateSettings) -> Moments:
        """See `estimates.reward_moments`; rows have the scalar "score"."""
        rows = scoring.read_rows(batch, self._spec.score.timeout_s)
        return estimates.reward_moments(rows, batch.scalars["score"], settings)

    def estimate(
        self, batch: RowBatch, settings: EstimateSettings, rewards: Moments | None
    ) -> tuple[EstimateFacts, Columns]:
        """See `estimates.estimate`; rows have the scalar "score"."""
        rows = scoring.read_rows(batch, self._spec.score.timeout_s)
        return estimates.estimate(rows, batch.scalars["score"], settings, rewards)

    def whiten(self, batch: RowBatch, advantages: Moments) -> tuple[NDArray[np.float64], Columns]:
        """See `estimates.whitened`; rows have the scalar "score"."""
        rows = scoring.read_rows(batch, self._spec.score.timeout_s)
        return estimates.whitened(rows, batch.scalars["score"], advantages)

    def evaluate(self, batch: RowBatch) -> MetricSums:
        """The loss and its metrics on rows, without training on them."""
        import torch

        from raytune_rl.algorithms.metrics import merge_all

        rows = scoring.read_rows(batch, self._spec.score.timeout_s)
        scoring.expect_media(rows, batch, self._media)
        self._engine.eval()
        with torch.no_grad():
            parts = [self._micro.loss_of(rows, batch, members)[1].host() for members in batch.micro_batches]
        return merge_all(parts)

    def offload(self, weights: bool, optimizer: bool) -> None:
        """Moves weights and optimizer state from the GPU to the CPU while somebody else needs the GPU."""
        self._offload.away(weights, optimizer)

    def reload(self) -> None:
        """Brings back what `offload` moved."""
        self._offload.back()

    # -- weights
    # ----------------------------------------------------------------------------------------------

    def weight_index(self) -> tuple[tuple[TensorEntry, ...], ...]:
        """The buckets this rank publishes: each a tuple of entries. Ranks share the work bucket by bucket."""
        assert self._publisher is not None
        return self._publisher.index()

    def publish(self, bases: Sequence[Any] = ()) -> tuple[Any, ...]:
        """The present weights; see `Publisher.publish`."""
        assert self._publisher is not None
        return self._publisher.publish(bases)

    def adapter_config(self) -> str:
        """The adapter's PEFT configuration as JSON text, as in adapter_config.json."""
        return publishing.adapter_config(self._engine)

    # -- snapshots
    # ------------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[SnapshotPart, list[NDArray[np.uint8]]]:
        """This rank's whole state: what it consists of, and its bytes."""
        from raytune_rl.workers.snapshot import take

        return take(self._engine, self._world_size)

    def put_back(self, part: SnapshotPart, arrays: list[NDArray[np.uint8]]) -> None:
        """Makes this rank what it was as `snapshot` was called; all ranks at once."""
        from raytune_rl.workers.snapshot import put_back

        put_back(self._engine, part, arrays)

    # -- checkpoints
    # ------------------------------------------------------------------------------------------

    def save_model(self, directory: str) -> None:
        """Rank 0 writes what Transformers or PEFT loads; the others give their shares of sharded weights."""
        from raytune_rl.models.weights import save_model

        with writing(directory):
            save_model(self._engine, directory, self._tokenizer, gather=self._gather, writes=self._rank == 0)

    def save_optimizer(self, directory: str) -> None:
        """Every rank writes its part of the optimizer's state."""
        from raytune_rl.workers.optimizer_state import save

        with writing(directory):
            save(self._engine, Path(directory), self._rank, self._world_size)

    def load_checkpoint(self, directory: str) -> None:
        """Restores weights and optimizer state; the saved world may have had another size."""
        from raytune_rl.workers.optimizer_state import load

        load(self._engine, Path(directory), self._rank, self._world_size)


def peak_memory_gib() -> float:
    """Peak memory reserved on the GPU, or the process's peak resident memory on a CPU, GiB."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each step and rank, so that dropout repeats when a step is repeated."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
