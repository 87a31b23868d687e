"""The loss of one micro-batch: what a rank of a training world computes between two sums over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytune_rl.algorithms.distillation import TEACHER_COLUMNS
from raytune_rl.data.media_table import ROW_COLUMN
from raytune_rl.data.read_rows import ReadRows
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.protocol.train import TrainerSpec
from raytune_rl.workers import scoring

if TYPE_CHECKING:
    from torch import Tensor

    from raytune_rl.algorithms.metrics import MetricSums
    from raytune_rl.data.collate import MicroBatch
    from raytune_rl.models.distribution import TeacherDistribution
    from raytune_rl.models.routing import ExpertLoad


@dataclass(frozen=True)
class MicroSteps:
    """Losses of micro-batches of this rank's rows.

    Attributes:
        engine: DeepSpeed's, around the scorer.
        loss: From the registry.
        settings: The loss's.
        spec: Of the world.
        media: Collates images, videos and sounds; None for text alone.
    """

    engine: Any
    loss: Any
    settings: Any
    spec: TrainerSpec
    media: Any

    def expert_load(self, rows: ReadRows, batch: RowBatch) -> ExpertLoad:
        """How often each expert is chosen in the whole step, under the weights that it starts from."""
        import torch
        from torch import distributed

        from raytune_rl.models.routing import ExpertLoad, experts_per_token
        from raytune_rl.models.unwrap import hf_model

        self.engine.eval()
        counts: Tensor | None = None
        with torch.no_grad():
            for members in batch.micro_batches:
                micro = scoring.micro_batch(rows, members, self.spec.model.layout, self.media)
                of_micro = self._forward(micro, with_router=True)["router_counts"] * (micro.n_rows > 0)
                counts = of_micro if counts is None else counts + of_micro
        assert counts is not None, "a rank without rows runs an empty micro-batch"
        distributed.all_reduce(counts)
        return ExpertLoad(counts, experts_per_token(hf_model(self.engine).config))

    def loss_of(
        self,
        rows: ReadRows,
        batch: RowBatch,
        members: tuple[int, ...],
        load: ExpertLoad | None = None,
    ) -> tuple[Tensor, MetricSums, int]:
        """Loss of one micro-batch (this rank's share of the step's loss), its metrics, and its size in
        tokens.
        """
        from raytune_rl.algorithms.metrics import MetricSums, total_of
        from raytune_rl.algorithms.mismatch import rollout_mismatch
        from raytune_rl.algorithms.registry import LossInputs

        spec = self.spec
        micro = scoring.micro_batch(rows, members, spec.model.layout, self.media)
        extra = [name for name in batch.places if name not in ("", ROW_COLUMN)]
        columns = {name: scoring.extra_column(rows, members, name) for name in extra}
        # A rank without rows has no column either, but its loss may ask for one.
        wanted = "rollout_logprobs" in self.loss.required_columns(self.settings)
        sampled = rows.has("logprobs") and self.loss.forward == "logprobs"
        if sampled or (wanted and not len(batch)):
            columns["rollout_logprobs"] = scoring.flat_column(rows, members, "logprobs")
        values = row_values(batch, members)
        outputs = self._forward(micro, self._teacher(columns, len(micro.targets)), load is not None)
        probabilities = outputs.pop("router_probabilities", None)
        outputs.pop("router_counts", None)
        advantages = columns.pop("advantages", None)
        if advantages is None and "advantage" in values:
            advantages = values["advantage"][micro.row_of].float()
        output = self.loss(
            LossInputs(
                row_of=micro.row_of,
                n_rows=micro.n_rows,
                settings=self.settings,
                columns=columns,
                advantages=advantages,
                row_values=values,
                **outputs,
            )
        )
        weight = values["weight"][micro.row_of] if "weight" in values else None
        loss = output.total(weight, values.get("row_weight"))
        metrics = output.metrics.merge(MetricSums({"loss": total_of(loss.detach())}))
        if load is not None and probabilities is not None:
            aux_loss = load.share(probabilities) * (micro.n_rows > 0)
            metrics = metrics.merge(MetricSums({"router_aux_loss": total_of(aux_loss.detach())}))
            loss = loss + spec.router_aux_loss_coef * aux_loss
        if "rollout_logprobs" in columns:
            # Before the first update of a generation both sides hold the same weights: old_logprobs if they
            # were computed, else the log-probs of this very pass.
            train = columns.get("old_logprobs", outputs["logprobs"].detach())
            metrics = metrics.merge(
                rollout_mismatch(train, columns["rollout_logprobs"], micro.row_of, micro.n_rows)
            )
        return loss, metrics, micro.input_ids.numel()

    def _teacher(self, columns: dict[str, Tensor], count: int) -> TeacherDistribution | None:
        """A teacher's distributions at `count` tokens, as the columns have them, if the loss needs them."""
        if self.loss.divergence_beta is None:
            return None
        from raytune_rl.models.distribution import TeacherDistribution

        ids, logprobs = (columns[name] for name in TEACHER_COLUMNS)
        k = max(len(ids) // max(count, 1), 1)
        return TeacherDistribution(
            ids.view(count, k).long(), logprobs.view(count, k), self.loss.divergence_beta(self.settings)
        )

    def _forward(
        self, micro: MicroBatch, teacher: TeacherDistribution | None = None, with_router: bool = False
    ) -> dict[str, Any]:
        """The model's outputs, under the names that `LossInputs` has for it; with those of the routers, where
        asked for."""
        import torch

        forward, spec = self.loss.forward, self.spec
        inputs = scoring.forward_inputs(micro, forward)
        if forward != "logprobs":
            return {"logprobs": torch.empty(0, device=scoring.device()), forward: self.engine(**inputs)}
        scored = self.engine(
            **inputs,
            temperature=spec.score.temperature,
            with_entropy=spec.with_entropy,
            disallowed_token_ids=spec.score.disallowed_token_ids,
            teacher=teacher,
            **({"with_router": True} if with_router else {}),
        )
        outputs = {
            "logprobs": scored.logprobs,
            "entropy": None if scored.entropy is None else scored.entropy.detach(),
            "correct": scored.correct,
            "divergence": scored.divergence,
        }
        if with_router:
            outputs["router_probabilities"] = scored.router_probabilities
            outputs["router_counts"] = scored.router_counts
        return outputs


def row_values(batch: RowBatch, members: tuple[int, ...]) -> dict[str, Tensor]:
    """The row scalars of a micro-batch by name, float64 `[n_rows]` on this worker's device."""
    import torch

    device = scoring.device()
    return {n: torch.from_numpy(v[list(members)]).to(device) for n, v in batch.scalars.items()}
