"""Learning from preferences in one process, for tests: the product's data, scorers, losses, weights and step
values, without Ray.

What `pipelines.offline` does through actors is done here by calls. From flags to loss, settings and shape of
the data it goes by `objective.preference`, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytune_rl.algorithms.registry import LossInputs
from raytune_rl.config import PreferenceConfig
from raytune_rl.data.collate import MicroBatch
from raytune_rl.data.encode import EncodedSFT
from raytune_rl.data.encode_preferences import encode_labelled, encode_pairs
from raytune_rl.data.load import load_examples
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.scalar import ScalarScorer
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.pipelines.objective import Objective, preference
from raytune_rl.pipelines.step_values import FROM_ORDER, FROM_POLICY, Sums
from raytune_rl.protocol.columns import Ragged
from raytune_rl.tiny.preferences import PreferenceFiles
from raytune_rl.workers.scoring import forward_inputs
from tests.columns import collate_rows


@dataclass(frozen=True)
class Broken:
    """Ways to break learning, for tests that it would be noticed.

    Attributes:
        loss: Changes the loss of a step: `torch.neg` turns it around.
        masks: Changes the loss masks of the training rows.
    """

    loss: Callable[[Tensor], Tensor] = lambda loss: loss
    masks: Callable[[NDArray[np.bool_]], NDArray[np.bool_]] = lambda mask: mask


class Start:
    """The start of every run: models of either kind of head, and the rows, read once."""

    def __init__(self, model: Path, files: PreferenceFiles) -> None:
        tokenizer = load_tokenizer(str(model))
        torch.manual_seed(0)
        policy = load_model(str(model), dtype="float32").model
        scores = load_model(str(model), dtype="float32", scalar=True).model
        self.scorers = {"logprobs": TokenScorer(policy), "scores": ScalarScorer(scores, skips_padding=True)}
        self.weights = {name: deepcopy(scorer.state_dict()) for name, scorer in self.scorers.items()}

        def read(path: Path, task: Any) -> EncodedSFT:
            examples = load_examples([str(path)], task=task).examples
            return (encode_labelled if task == "labels" else encode_pairs)(examples, tokenizer)

        self.rows = {
            "pairs": (read(files.pairs, "pairs"), read(files.held_out_pairs, "pairs")),
            "labels": (read(files.labelled, "labels"), read(files.held_out_labelled, "labels")),
        }


class Learner:
    """A model with one output a token, or one a row, and its rows."""

    def __init__(self, start: Start, config: PreferenceConfig, broken: Broken) -> None:
        self.objective: Objective = preference(config)
        self.scalar = self.objective.loss.forward == "scores"
        self.scorer: Any = start.scorers[self.objective.loss.forward].eval()
        self.scorer.load_state_dict(start.weights[self.objective.loss.forward])
        seen, self.held_out = start.rows[self.objective.shape.task]
        masks = [broken.masks(seen.loss_mask[row]) for row in range(len(seen.tokens))]
        self.seen = replace(seen, loss_mask=Ragged.from_rows(masks, np.bool_))
        self.broken = broken
        self.reference = self.logprobs(self.seen, range(len(self.seen.tokens)))

    def forward(self, micro: MicroBatch) -> Tensor:
        made = self.scorer(**forward_inputs(micro, self.objective.loss.forward))
        return made if self.scalar else made.logprobs

    def logprobs(self, data: EncodedSFT, rows: Sequence[int]) -> list[Tensor]:
        """Of each row's loss tokens, without gradient."""
        if self.scalar:
            return [torch.empty(0)] * len(rows)
        micro = collate_rows(data.tokens, data.loss_mask, rows, layout="padded", pad_token_id=0)
        with torch.no_grad():
            flat = self.forward(micro)
        return list(flat.split(torch.bincount(micro.row_of, minlength=len(rows)).tolist()))

    def step(self, units: NDArray[np.int64]) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of some units of the data."""
        data, reference = self.seen, self.reference
        loss, shape, settings = self.objective.loss, self.objective.shape, self.objective.settings
        rows = shape.rows_of(units, shape.trained).tolist()
        micro = collate_rows(data.tokens, data.loss_mask, rows, layout="padded", pad_token_id=0)
        told = dict(shape.weights(np.array([int(data.loss_mask[row].sum()) for row in rows])))
        told |= {name: values[rows] for name, values in data.values.items()}
        for name in self.objective.row_values:
            if name in FROM_ORDER:
                told[name] = FROM_ORDER[name](len(rows))
            elif name in FROM_POLICY:
                scored = shape.rows_of(units, shape.scored).tolist()
                policy = [float(row.double().sum()) for row in self.logprobs(data, scored)]
                sums = Sums(
                    np.array(policy), np.array([float(reference[row].double().sum()) for row in scored])
                )
                told[name] = FROM_POLICY[name](sums, settings, len(rows))
        values = {name: torch.from_numpy(np.asarray(value)) for name, value in told.items()}
        made = self.forward(micro)
        columns = {"ref_logprobs": torch.cat([reference[row] for row in rows])}
        output = loss(
            LossInputs(
                torch.empty(0) if self.scalar else made,
                micro.row_of,
                micro.n_rows,
                settings,
                columns,
                row_values=values,
                scores=made if self.scalar else None,
            )
        )
        weights = values["weight"][micro.row_of]
        total = output.total(weights, values.get("row_weight"))
        return total, output.metrics.result()

    def sides(self) -> tuple[float, float]:
        """The model's values of right and of wrong answers that it never saw: mean log-prob (or score) of a
        whole answer, whatever the loss calls its reward."""
        data = self.held_out
        rows = range(len(data.tokens))
        if self.scalar:
            micro = collate_rows(data.tokens, data.loss_mask, rows, layout="padded", pad_token_id=0)
            with torch.no_grad():
                values = self.forward(micro).numpy()
        else:
            values = np.array([float(row.sum()) for row in self.logprobs(data, rows)])
        if "label" in data.values:
            own, good = values[0::2], data.values["label"][0::2] > 0.5
            return float(own[good].mean()), float(own[~good].mean())
        return float(values[0::2].mean()), float(values[1::2].mean())

    def learn(self, steps: int, size: int, rate: float) -> list[dict[str, float]]:
        """Trains; returns the metrics of every step."""
        optimizer = torch.optim.AdamW(self.scorer.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.0)
        rng = np.random.default_rng(0)
        units = len(self.seen.tokens) // self.objective.shape.rows
        told = []
        for _ in range(steps):
            chosen = rng.choice(units, size, replace=False)
            loss, metrics = self.step(chosen)
            optimizer.zero_grad()
            self.broken.loss(loss).backward()
            torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), 1.0)
            optimizer.step()
            told.append(metrics)
        return told
