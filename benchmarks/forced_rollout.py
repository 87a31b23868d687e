"""A rollout worker whose completions have the lengths that the benchmark wants, and vLLM alone beside it.

Both run in one actor on one engine, so they share process, threads, memory and warm-up, and differ in one
thing: what raytune_rl does around the engine.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.rollout import EngineSpec, Sampling
from raytune_rl.protocol.trajectory import EpisodeRequest
from raytune_rl.workers.engine_prompt import Ask
from raytune_rl.workers.rollout import RolloutWorker


def long_tailed(count: int, mean: int, longest: int, sigma: float = 1.0) -> list[int]:
    """`count` quantiles of a log-normal, cut at `longest` and scaled to the mean, in a fixed random order.

    Quantiles instead of draws: each step has the same lengths, so steps can be compared with each other.
    """
    normal = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]

    def cut(scale: float) -> list[int]:
        body = [max(1, min(longest, round(scale * math.exp(sigma * z)))) for z in normal[:-1]]
        return [*body, longest]  # so few quantiles alone would not reach the limit

    low, high = 1.0, float(longest)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(cut(middle)) < mean * count else (low, middle)
    lengths = cut(high)
    random.Random(0).shuffle(lengths)
    return lengths


class ForcedRolloutWorker(RolloutWorker):
    """The product's worker, its engine told how long each completion is to be."""

    def _build(self, spec: EngineSpec) -> Any:
        from raytune_rl.workers.vllm_engine import VllmEngine

        class ForcedEngine(VllmEngine):
            lengths: Sequence[int] = ()
            added = 0

            def add(self, asks: Sequence[Ask]) -> list[str]:
                if not self._asked:
                    self.added = 0
                lengths = self.lengths[self.added : self.added + len(asks)]
                self.added += len(asks)
                return super().add([replace(a, limit=n) for a, n in zip(asks, lengths, strict=True)])

            def _params(self, sampling: Sampling, seed: int, max_tokens: int) -> Any:
                params = super()._params(sampling, seed, max_tokens)
                params.ignore_eos = True
                params.stop_token_ids = []
                return params

        return ForcedEngine(spec)

    async def force(self, lengths: Sequence[int]) -> None:
        """Lengths of the next batches' completions, tokens, in the order of the requests."""

        def set_lengths(engine: Any) -> None:
            engine.lengths = list(lengths)

        await self._alone(set_lengths)

    async def alone(
        self, prompts: Mapping[str, Ragged], requests: Sequence[EpisodeRequest], sampling: Sampling
    ) -> tuple[float, int]:
        """vLLM without us: requests in, steps until all are done. Returns seconds and sampled tokens."""
        asked = [(prompts["prompt"][r.row].tolist(), seed) for r in requests for seed in r.seeds]

        def bare(ours: Any) -> tuple[float, int]:
            llm, tokens = ours._engine, 0
            llm.reset_prefix_cache()  # as after a weight update: the prompts must be computed again
            started = time.perf_counter()
            for (ids, seed), length in zip(asked, ours.lengths, strict=True):
                params = ours._params(sampling, seed, length)
                llm.add_request(str(next(ours._numbers)), {"prompt_token_ids": ids}, params)
            while llm.has_unfinished_requests():
                for output in llm.step():
                    if output.finished:
                        tokens += len(output.outputs[0].token_ids)
            return time.perf_counter() - started, tokens

        return await asyncio.wrap_future(self._engine.call(bare))
