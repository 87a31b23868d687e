"""The one place that knows vLLM's engine.

Thin on purpose: construct, step, load, nothing else, so that it follows vLLM from version to version.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.example import Message
from raytune_rl.data.media_processor import Decoded
from raytune_rl.data.model_tokens import read_eos
from raytune_rl.errors import ConfigError, DataError, StaleWeightsError, WorkerDiedError
from raytune_rl.protocol.rollout import EngineSpec, Sampling, StreamChunk
from raytune_rl.protocol.weights import Manifest
from raytune_rl.runtime.weights import find_manifest, read
from raytune_rl.workers import vllm_plugin
from raytune_rl.workers.adapter_files import adapter_files
from raytune_rl.workers.engine_prompt import EnginePrompt
from raytune_rl.workers.vllm_args import engine_args, usage_context
from raytune_rl.workers.vllm_media import EngineMedia, check_prompt
from raytune_rl.workers.weight_transfer import ADDRESS_VARIABLE

NEVER = -100.0
"""The lowest bias on a logit that vLLM takes."""


@dataclass(frozen=True)
class Sampled:
    """One completion as the engine gave it.

    Attributes:
        tokens: int32 `[n]`, the end token included.
        logprobs: float32 `[n]`, of the distribution that was sampled from (after temperature and the like).
        text: Decoded without special tokens.
        finish_reason: "stop" or "length".
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    text: str
    finish_reason: str


@contextmanager
def one_with_its_processes() -> Iterator[None]:
    """An engine over several GPUs works in processes of its own: the loss of one is the worker's."""
    try:
        yield
    except EngineDeadError as error:
        raise WorkerDiedError(
            "a process of its vLLM engine ended; Ray's log of the worker has why"
        ) from error


@contextmanager
def serving_adapters(asked: bool) -> Iterator[None]:
    """Around the start of an engine that is to serve adapters: some of vLLM's models take none."""
    try:
        yield
    except ValueError as error:
        if asked and "does not support LoRA" in str(error):
            model = str(error).split(" ", 1)[0]
            raise ConfigError(
                f"vLLM serves no adapters of {model}: add --vllm_enable_lora false, and the merged weights "
                "travel (infer: merge the adapter by raytune-rl export first)"
            ) from error
        raise


class VllmEngine:
    """An engine that samples token ids and pulls its weights from the store."""

    def __init__(self, spec: EngineSpec) -> None:
        vllm_plugin.register()
        os.environ[ADDRESS_VARIABLE] = ray.get_runtime_context().gcs_address
        self._spec = spec
        args = engine_args(spec)
        self._media = EngineMedia.of(args["model"], spec)
        if self._media is not None:
            args |= {
                "limit_mm_per_prompt": dict(spec.prompt_limits or {}),
                "mm_processor_kwargs": self._media.processor_settings,
            }
        with serving_adapters(spec.lora_rank > 0):
            self._engine = LLMEngine.from_engine_args(EngineArgs(**args), usage_context())
        self._numbers = itertools.count()
        self._adapter: LoRARequest | None = None
        self.version: int | None = None
        if spec.store is None:
            self._serve_from_disk(spec.adapter)
            return
        self._engine.collective_rpc(
            "init_weight_transfer_engine",
            kwargs={"init_info": {"store": spec.store, "timeout_s": spec.pull_timeout_s}},
        )

    @one_with_its_processes()
    def load(self, version: int | None) -> tuple[int, float]:
        """Pulls a version and serves it from now on. Returns the version and the seconds it took.

        The version is acknowledged only at the end: if the pull fails halfway, the engine serves nothing.
        """
        assert self._spec.store is not None
        started = time.perf_counter()
        self.version = None
        manifest = find_manifest(self._spec.store, version, self._spec.pull_timeout_s)
        if manifest.kind == "adapter":
            self._load_adapter(manifest)
        else:
            self._engine.collective_rpc("start_weight_update")
            self._engine.collective_rpc(
                "update_weights", kwargs={"update_info": {"version": manifest.version}}
            )
            self._engine.collective_rpc("finish_weight_update")
        if self._media is not None:
            self._engine.reset_encoder_cache()  # features of media under the old weights
        if not self._engine.reset_prefix_cache():
            raise StaleWeightsError(
                "vLLM kept key-value blocks of the old weights: requests were still running"
            )
        self.version = manifest.version
        return manifest.version, time.perf_counter() - started

    def sleep(self) -> None:
        """Frees device memory; nothing can be served until `wake` and a load."""
        self.version = None
        self._engine.sleep(level=self._spec.sleep_level)

    def wake(self) -> None:
        """Allocates weights and cache again. What is to be published comes with the next load; a base that
        only gets adapters is read again from its files if it was dropped.
        """
        self._engine.wake_up()
        if self._spec.sleep_level == 2 and self._spec.lora_rank:
            self._engine.collective_rpc("reload_weights")

    def forget_prompts(self) -> None:
        """Drops what was kept of prompts, so that later requests are computed as if there had been none."""
        self._engine.reset_prefix_cache()

    @property
    def max_model_len(self) -> int:
        """Longest prompt and completion together, tokens."""
        return self._spec.max_model_len

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self._engine.get_tokenizer()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer by the model's generation_config."""
        return read_eos(self._engine.model_config.model)

    @one_with_its_processes()
    def sample(
        self,
        prompts: Sequence[EnginePrompt],
        seeds: Sequence[int],
        sampling: Sampling,
        limits: Sequence[int],
    ) -> list[Sampled]:
        """Completes each prompt once, with its own seed and limit. Order of answers is that of the prompts.

        Raises:
            MediaError: A medium's file is gone or is not the one that was tokenized.
            DataError: vLLM makes other tokens of a prompt with media than the policy.
        """
        position: dict[str, int] = {}
        decoded: dict[str, Decoded] = {}
        for index, (prompt, seed, limit) in enumerate(zip(prompts, seeds, limits, strict=True)):
            name = str(next(self._numbers))
            position[name] = index
            request: Any = {"prompt_token_ids": prompt.engine_prompt_ids.tolist()}
            if prompt.media:
                assert self._media is not None
                request = self._media.request(prompt, decoded)
            params = self._params(sampling, seed, min(limit, self._spec.max_model_len - len(prompt.tokens)))
            self._engine.add_request(name, request, params, lora_request=self._adapter)
        answers: dict[int, Sampled] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    check_prompt(prompts[position[output.request_id]], output.prompt_token_ids)
                    answers[position[output.request_id]] = to_sampled(output.outputs[0])
        texts = self._decode([answers[i].tokens for i in range(len(prompts))], sampling)
        return [
            Sampled(a.tokens, a.logprobs, text, a.finish_reason)
            for a, text in zip((answers[i] for i in range(len(prompts))), texts, strict=True)
        ]

    def chat(self, messages: Sequence[Message], seed: int, sampling: Sampling) -> Iterator[StreamChunk]:
        """Answers one conversation; see `RolloutWorker.chat`."""
        template = replace(ChatTemplate.of(self.tokenizer), eos_token_ids=self.eos_token_ids)
        text = template.render(messages, generation_prompt=True)
        prompt = self.tokenizer.encode(text, add_special_tokens=False)
        if len(prompt) >= self._spec.max_model_len:
            raise DataError(
                f"the conversation has {len(prompt)} tokens and the engine takes {self._spec.max_model_len}: "
                "begin a new one, or raise --vllm_max_model_len"
            )
        stops = tuple(dict.fromkeys((*sampling.stop_token_ids, *template.stop_token_ids())))
        room = min(sampling.max_tokens, self._spec.max_model_len - len(prompt))
        params = self._params(replace(sampling, stop_token_ids=stops), seed, room)
        params.output_kind, params.detokenize, params.logprobs = RequestOutputKind.DELTA, True, None
        name = str(next(self._numbers))
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params, lora_request=self._adapter)
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    yield StreamChunk(output.outputs[0].text, output.outputs[0].finish_reason)
        finally:
            self._engine.abort_request([name])  # nothing, once it has finished

    def _params(self, sampling: Sampling, seed: int, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=max_tokens,
            stop=list(sampling.stop_words) or None,
            stop_token_ids=list(sampling.stop_token_ids) or None,
            logit_bias=dict.fromkeys(sampling.disallowed_token_ids, NEVER) or None,
            include_stop_str_in_output=True,
            seed=seed,
            logprobs=0,
            # Text is only needed while sampling to look for stop words; otherwise it is decoded once at the
            # end.
            detokenize=bool(sampling.stop_words),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _decode(self, rows: Sequence[NDArray], sampling: Sampling) -> list[str]:
        return self.tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True)

    def _serve_from_disk(self, adapter: str | None) -> None:
        """Serves the weights that the engine was built with, and an adapter's directory, as version 0."""
        if adapter is not None:
            self._adapter = LoRARequest("adapter", 1, adapter)
            self._engine.add_lora(self._adapter)
        self.version = 0

    def _load_adapter(self, manifest: Manifest) -> None:
        """Hands LoRA tensors to vLLM, which reads adapters from a directory, at once and only once; each
        version has a name of its own.
        """
        tensors = {name: tensor.clone() for name, tensor in read(manifest, self._spec.pull_timeout_s)}
        with adapter_files(tensors, manifest.adapter_config) as directory:
            fresh = LoRARequest(f"policy-{manifest.version}", manifest.version + 1, str(directory))
            if self._adapter is not None:
                self._engine.remove_lora(self._adapter.lora_int_id)
            self._engine.add_lora(fresh)
            self._adapter = fresh


def to_sampled(output: Any) -> Sampled:
    """Reads a finished output of vLLM (text is filled in by the caller)."""
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    logprobs = np.asarray(
        [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)],
        dtype=np.float32,
    )
    return Sampled(tokens, logprobs, output.text or "", output.finish_reason or "abort")
