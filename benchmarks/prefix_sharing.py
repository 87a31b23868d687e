"""A training step in which each prompt is computed once for its completions, beside one in which each
completion computes it.

The same rows, loss, planner and budget, in turns, in one process with one thread; CPU-seconds, so that other
processes disturb little. The model is the 2.5 M-parameter one of raytune_rl.tiny, the step forward, backward
and AdamW, without DeepSpeed. The ratio of tokens is what could be had if a token cost the same anywhere; the
gradients of both are compared, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.table import machine, median, render, spread
from raytune_rl.data.collate import MicroBatch, collate
from raytune_rl.data.microbatch import Schedule
from raytune_rl.data.prefix_plan import Budget, plan_step
from raytune_rl.data.shared_prefix import collate_shared
from raytune_rl.models.load import enable_gradient_checkpointing, load_model
from raytune_rl.models.prefix_attention import let_share
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.protocol.model import Sharing
from raytune_rl.protocol.rows import Prefixes
from raytune_rl.tiny.model import make_tiny_model

SHAPES = ("46/64", "512/64", "2048/64")


@dataclass(frozen=True)
class Rows:
    """Completions of some prompts."""

    tokens: list[np.ndarray]
    masks: list[np.ndarray]
    prefixes: Prefixes

    @classmethod
    def of(cls, shape: str, prompts: int, generations: int, ragged: bool) -> Rows:
        """Random tokens; ragged: completions of 1 token up to twice the length, the same on average."""
        prompt, completion = map(int, shape.split("/"))
        draw = np.random.default_rng(0)
        tokens, masks = [], []
        for _ in range(prompts):
            shared = draw.integers(1, 500, prompt)
            for _ in range(generations):
                length = int(draw.integers(1, 2 * completion)) if ragged else completion
                tokens.append(np.append(shared, draw.integers(1, 500, length)))
                masks.append(np.arange(prompt + length) >= prompt)
        groups = np.repeat(np.arange(prompts), generations)
        return cls(tokens, masks, Prefixes(groups, np.full(len(tokens), prompt)))

    def plan(self, sharing: Sharing, max_tokens: int) -> Schedule:
        """The micro-batches of one rank."""
        lengths = np.array([len(row) for row in self.tokens])
        return plan_step(lengths, self.prefixes, Budget(1, max_tokens, "padded", sharing))

    def micro_batch(self, plan: Schedule, members: Sequence[int]) -> MicroBatch:
        """As the policy worker makes it."""
        tokens, masks = [self.tokens[row] for row in members], [self.masks[row] for row in members]
        if not plan.shares:
            return collate(tokens, masks, layout="padded", pad_token_id=0)
        own = self.prefixes.part(np.array(members))
        return collate_shared(tokens, masks, own.groups, own.lengths, pad_token_id=0)


class Trainer:
    """The model and its optimizer."""

    def __init__(self, directory: str, checkpointing: bool) -> None:
        self.model: Any = load_model(directory, dtype="float32").model.train()
        if why := let_share(self.model):
            raise SystemExit(why)
        if checkpointing:
            enable_gradient_checkpointing(self.model)
        self.scorer = TokenScorer(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    def step(self, rows: Rows, plan: Schedule) -> tuple[float, torch.Tensor]:
        """One optimizer step: its CPU-seconds, and the gradient."""
        started = time.process_time()
        for members in plan.ranks[0]:
            micro = rows.micro_batch(plan, members)
            seen = (micro.input_ids, micro.position_ids, micro.attention_mask)
            found = self.scorer(*seen, micro.predict_index, micro.targets, shared=micro.shared).logprobs
            advantages = torch.tensor([(-1.0) ** row for row in members])[micro.row_of]
            ratio = (found - found.detach()).exp()
            loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
            (loss / len(rows.tokens)).backward()
        gradient = torch.cat([p.grad.flatten().clone() for p in self.model.parameters()])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - started, gradient


def measure(options: argparse.Namespace, trainer: Trainer, shape: str) -> list[str]:
    """A line of the table."""
    rows = Rows.of(shape, options.prompts, options.generations, options.ragged)
    padded, shared = (rows.plan(sharing, options.max_tokens) for sharing in ("false", "true"))
    spent: dict[str, list[float]] = {"padded": [], "shared": []}
    worst = 0.0
    for turn in range(options.rounds + 1):
        before, wanted = trainer.step(rows, padded)
        after, found = trainer.step(rows, shared)
        worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()))
        if turn:  # the first warms up
            spent["padded"].append(before)
            spent["shared"].append(after)
    ratios = [after / before for before, after in zip(*spent.values(), strict=True)]
    tokens = [sum(plan.rank_tokens) for plan in (padded, shared)]
    return [
        shape,
        f"{median(spent['padded']):.2f}",
        f"{median(spent['shared']):.2f}",
        f"{median(ratios):.2f}",
        spread(ratios),
        f"{tokens[0]:,}",
        f"{tokens[1]:,}",
        f"{tokens[1] / tokens[0]:.2f}",
        f"{worst:.0e}",
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="prompt/completion tokens")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--ragged", action="store_true", help="completions of different lengths")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(argv)


def main() -> None:
    """Measures and prints."""
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        longest = max(sum(int(n) * 2 for n in shape.split("/")) for shape in options.shapes)
        path = make_tiny_model(f"{directory}/model", max_position=longest)
        trainer = Trainer(str(path), options.checkpointing)
        lines = [measure(options, trainer, shape) for shape in options.shapes]
    header = (
        "prompt/answer", "padded CPU-s", "shared CPU-s", "ratio", "min-max", "tokens padded", "shared",
        "ratio of tokens", "largest gap of gradients",
    )  # fmt: skip
    print(render(header, lines, options.markdown))
    print(machine())


if __name__ == "__main__":
    main()
