"""Is what samples the policy? Measured before anything is trained on its samples, and watched from then on.

An engine holds its weights in forms of its own (packed, shuffled, fused, tied), and one that a weight update
does not renew leaves no error, only other log-probs. So each engine samples a few tokens at the first
publications and after it was started anew, the policy scores them, and both must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import EngineMismatchError
from raytune_rl.groups import specs
from raytune_rl.groups.fleet import batch_of
from raytune_rl.groups.start import OnlineGroups
from raytune_rl.pipelines.collect import EVALUATION
from raytune_rl.protocol.data import PromptSet
from raytune_rl.protocol.trajectory import Trajectory

COMPLETIONS, TOKENS = 4, 16
"""Sampled by each engine to prove itself: 64 tokens, less than a second of a 7B model on a GPU."""

LIMITS = {"float32": 5e-3, "bfloat16": 0.3, "float16": 0.3}
"""Largest gap by dtype, nats. In float32 two right implementations differ by 1e-6 to 1e-4, a wrong layer by
0.1 and more. In 16 bits single tokens of a right pair differ by up to a nat, their mean by 0.005 to 0.05
(most in mixtures of experts, where rounding sends a token to another expert)."""

QUANTISED_LIMIT = 1.0
"""The same where policy or engine compute with quantised weights."""

PUBLICATIONS = 2
"""After which an engine that was not started anew is only watched."""

PATIENCE = 3
"""Steps in a row above the limit that end the run."""

WHAT_TO_TRY = (
    "Try --vllm_enable_lora false (merged weights) with LoRA, --torch_dtype float32, or --vllm_engine_kwargs "
    "without quantisation; if the gap is right for this model, raise --max_logp_gap (0: never look)."
)

METRIC = "rollout_correction/logp_abs_diff_mean"


def gap_limit(config: RLHFConfig, on_gpu: bool) -> float | None:
    """The largest gap that is no defect, nats a token; None: nobody looks."""
    if config.max_logp_gap is not None:
        return config.max_logp_gap or None
    quantised = config.quant_bits is not None or "quantization" in config.vllm_engine_kwargs
    limit = QUANTISED_LIMIT if quantised else LIMITS[specs.dtype(config, on_gpu)]
    return limit / min(config.temperature, 1.0)  # which divides the logits, and so multiplies their noise


def watched_limit(config: RLHFConfig, on_gpu: bool) -> float | None:
    """The same for the steps of the run: their tokens are sampled from what `top_p` and the like leave, and
    the policy's log-probs know nothing of that. None: only the user can say what gap is right."""
    cut = config.top_p < 1 or config.top_k > 0 or config.min_p > 0 or config.repetition_penalty != 1
    return None if cut and config.max_logp_gap is None else gap_limit(config, on_gpu)


def root_mean_square(half_squares: NDArray[np.float64], tokens: Sequence[int]) -> float:
    """Of the differences of log-probs, from each row's sum of their halved squares (the k2 of
    `algorithms.kl`)."""
    return math.sqrt(2 * float(half_squares.sum()) / max(sum(tokens), 1))


class GapWatch:
    """Looks at the mean gap of each step.

    Args:
        limit: See `watched_limit`.
        say: Tells the user a sentence.
    """

    def __init__(self, limit: float | None, say: Callable[[str], None]) -> None:
        self._limit = limit
        self._say = say
        self._above = 0

    def look(self, gap: float | None, step: int) -> None:
        """Says when a step's gap is too large, and ends the run if it stays so.

        Args:
            gap: Of the step, nats a token; None: it has none, as its completions are not sampled here.
            step: Its number, from 1.

        Raises:
            EngineMismatchError: It was too large, or no number, several steps in a row.
        """
        if self._limit is None or gap is None or gap <= self._limit:
            self._above = 0
            return
        self._above += 1
        text = (
            f"step {step}: log-probs of engine and policy differ by {gap:.3g} nats a token on average, more "
            f"than the {self._limit:.3g} that is taken for rounding (--max_logp_gap)"
        )
        if self._above == PATIENCE:
            raise EngineMismatchError(
                f"{text}, for {PATIENCE} steps in a row: what is trained on is no longer sampled from the "
                f"policy. {WHAT_TO_TRY}"
            )
        if self._above == 1:
            self._say(f"Note: {text}. The run ends if it stays so for {PATIENCE} steps.")


class EngineGuard:
    """Ends a run whose engines are not the policy.

    Args:
        config: Of the run.
        groups: Policy, engines, and whose turn it is.
        prompts: One of these, the shortest, is the probe.
        on_gpu: Decides the dtype.
        restarts: How many engines were started anew so far.
        ready: Makes the engines awake, under the present weights.
        beside: Whether the proof is made beside other prompts in flight, which then go on; else nothing is,
            and what follows is computed as if there had been no proof.
        say: Tells the user a sentence.
    """

    def __init__(
        self,
        config: RLHFConfig,
        groups: OnlineGroups,
        prompts: PromptSet,
        on_gpu: bool,
        restarts: Callable[[], int],
        ready: Callable[[], None],
        beside: bool,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._groups = groups
        self._prompts = prompts
        self._limit = gap_limit(config, on_gpu)
        self._watch = GapWatch(watched_limit(config, on_gpu), say)
        self._dtype = specs.dtype(config, on_gpu)
        self._restarts, self._ready, self._beside = restarts, ready, beside
        self._proven = 0
        self._versions: set[int] = set()

    def prove(self, version: int) -> None:
        """Compares every engine with the policy: under the first version; under the second too, as the first
        is often what the engine has read from the model's files; and whenever an engine was started anew.

        The policy must hold the weights of `version` still. Afterwards it is the policy's turn on shared
        GPUs.

        Raises:
            EngineMismatchError: They differ by more than the limit.
        """
        restarts = self._restarts()
        known = version in self._versions or len(self._versions) >= PUBLICATIONS
        if self._limit is None or (known and self._proven == restarts):
            return
        gap = self._gap(version, 0)
        if not gap <= self._limit and self._dtype != "float32":
            gap = self._gap(version, 1)  # in 16 bits one token of a right pair may be far off
        if not gap <= self._limit:
            raise EngineMismatchError(self._sentence(gap))
        self._proven = restarts
        self._versions.add(version)

    def watch(self, gap: float | None, step: int) -> None:
        """See `GapWatch.look`."""
        self._watch.look(gap, step)

    def _gap(self, version: int, attempt: int) -> float:
        groups = self._groups
        self._ready()
        rows = [int(np.argmin(self._prompts.lengths))] * groups.rollout.engines
        probe = groups.rollout.plain(TOKENS)
        batch: list[Trajectory] = probe.generate(
            self._prompts, rows, COMPLETIONS, version, EVALUATION + 1 + attempt, at_once=self._beside
        )
        if not self._beside:
            # Else the batch would be computed from what is kept of the probe, in other last digits.
            groups.rollout.forget_prompts()
        groups.gpu_sharing.to_policy()
        probed = batch_of(batch)
        own = groups.policy.logprobs(probed).columns
        both = probed.with_columns(old_logprobs=own, ref_logprobs=probed.rows)
        squares = groups.policy.row_kl(both, "k2")
        return root_mean_square(squares, [t.episode.completion_tokens for t in batch])

    def _sentence(self, gap: float) -> str:
        return (
            f"the engine is not the policy: with the same weights, log-probs of {self._config.model} differ "
            f"by {gap:.3g} nats a token (root mean square over a probe), and {self._limit:.3g} is the most "
            f"for {self._dtype}. Training on its samples would be wrong. {WHAT_TO_TRY}"
        )
