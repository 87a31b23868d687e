"""A frozen language model that vLLM serves: rows are prompts, and what is asked of them are prompt log-probs.

vLLM takes these of the model's own logits, whatever temperature a request has, so the temperature divides the
logits where the model makes them (`LogitsProcessor`). It computes each row for itself: it reads no key-value
blocks of earlier prompts for requests that want log-probs of their prompt.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from raytune_rl.errors import ConfigError
from raytune_rl.models.context import ALLOW_LONG, longer_allowed, longest_context
from raytune_rl.models.load import load_config
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.model import ScoreSettings
from raytune_rl.protocol.rollout import EngineSpec
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.workers.scoring import read_rows
from raytune_rl.workers.vllm_args import engine_args, usage_context
from raytune_rl.workers.vllm_engine import one_with_its_processes, prepare_process

TOKENS_AT_ONCE = 2048
"""Prompt tokens of one step on a GPU: vLLM 0.32 makes float32 logits of all of them, beside the memory that
it has planned with."""


class LogitTemperature:
    """What vLLM's workers can do beside their own (`worker_extension_cls`)."""

    model_runner: Any

    def divide_logits(self, temperature: float) -> int:
        """From now on all logits are divided by a temperature. Returns how many layers do it."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        layers = [m for m in self.model_runner.model.modules() if isinstance(m, LogitsProcessor)]
        for layer in layers:
            layer.scale /= temperature
        return len(layers)


class ServedModel:
    """A model that is only asked, in an engine (`opinions.Asked`).

    Args:
        spec: Of the engine; `max_model_len` is that of the longest row.
        settings: How log-probs are taken.

    Raises:
        ConfigError: The model does not take rows of that length, or vLLM cannot change its temperature.
    """

    def __init__(self, spec: EngineSpec, settings: ScoreSettings) -> None:
        prepare_process(spec)
        self.settings = settings
        # vLLM wants to sample one token behind the longest row.
        args = engine_args(replace(spec, max_model_len=spec.max_model_len + 1))
        text = load_config(args["model"], trust_remote_code=spec.trust_remote_code).get_text_config()
        most = longest_context(text)
        if most is not None and spec.max_model_len > most and not longer_allowed():
            raise ConfigError(
                f"the teacher {spec.model} takes {most} tokens, and rows may have {spec.max_model_len}: "
                f"lower --max_completion_length or --max_length, or set {ALLOW_LONG}=1 if it takes more."
            )
        os.environ[ALLOW_LONG] = "1"  # that token has no place in a model's context, and needs none
        args |= {
            "max_logprobs": -1,
            "worker_extension_cls": f"{__name__}.{LogitTemperature.__qualname__}",
        }
        if not current_platform.is_cpu():
            args["max_num_batched_tokens"] = TOKENS_AT_ONCE
        self._engine = LLMEngine.from_engine_args(EngineArgs(**args), usage_context())
        self._numbers = itertools.count()
        changed = self._engine.collective_rpc("divide_logits", args=(settings.temperature,))
        if 0 in changed:
            raise ConfigError(
                f"vLLM's model of the teacher {spec.model} has no layer that scales its logits, so that its "
                f"--temperature stays 1: leave out --teacher_backend vllm."
            )

    @property
    def vocabulary(self) -> int:
        """Tokens that its distribution is over."""
        return int(self._engine.model_config.get_vocab_size())

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `scoring.score`."""
        found: list[Any] = [None] * len(batch)
        for row, starts, _, logprobs in self._asked(batch, 0):
            found[row] = logprobs[starts]
        sums = np.array([own.sum(dtype=np.float64) for own in found], dtype=np.float64)
        return sums, {"logprobs": Ragged.from_rows(found, np.float32)}

    def likeliest(
        self, batch: RowBatch, k: int
    ) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.float32]]]:
        """See `opinions.Asked`."""
        k = min(k, self.vocabulary)
        for row, starts, ids, logprobs in self._asked(batch, k):
            # The token's own comes first, wherever it stands among the likeliest.
            places = starts[:, None] + 1 + np.arange(k)
            yield row, ids[places], logprobs[places]

    def _asked(
        self, batch: RowBatch, k: int
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]]:
        """Of each row, as they are finished: its number, where each of its loss tokens begins in the flat
        ids and log-probs, and these.
        """
        rows = read_rows(batch, self.settings.timeout_s)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        waiting: dict[str, tuple[int, NDArray]] = {}
        try:
            for row in range(len(batch)):
                tokens, mask = rows.laid_out(row)
                name = str(next(self._numbers))
                self._engine.add_request(name, {"prompt_token_ids": tokens.tolist()}, params)
                waiting[name] = row, mask
            while waiting:
                with one_with_its_processes():
                    outputs = self._engine.step()
                for output in outputs:
                    if not output.finished:
                        continue
                    row, mask = waiting.pop(output.request_id)
                    flat: Any = output.prompt_logprobs
                    yield (
                        row,
                        np.asarray(flat.start_indices, dtype=np.int64)[mask],
                        np.asarray(flat.token_ids, dtype=np.int32),
                        np.asarray(flat.logprobs, dtype=np.float32),
                    )
        finally:
            self._engine.abort_request(list(waiting))
