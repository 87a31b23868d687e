"""The one place that knows vLLM's engine.

Thin on purpose: construct, step, load, nothing else, so that it follows vLLM from version to version.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.example import Message
from raytune_rl.data.media_processor import Decoded
from raytune_rl.data.model_tokens import read_eos
from raytune_rl.errors import ConfigError, DataError, StaleWeightsError, WorkerDiedError
from raytune_rl.protocol.rollout import EngineSpec, Sampling, StreamChunk
from raytune_rl.protocol.tickets import InFlight
from raytune_rl.protocol.weights import Manifest
from raytune_rl.runtime.weights import find_manifest, read
from raytune_rl.workers import vllm_plugin
from raytune_rl.workers.adapter_files import adapter_files
from raytune_rl.workers.engine_prompt import Ask, EnginePrompt, Sampled
from raytune_rl.workers.leftovers import name_sockets
from raytune_rl.workers.vllm_args import engine_args, usage_context
from raytune_rl.workers.vllm_media import EngineMedia, check_prompt
from raytune_rl.workers.weight_transfer import ADDRESS_VARIABLE

NEVER = -100.0
"""The lowest bias on a logit that vLLM takes."""


@contextmanager
def one_with_its_processes() -> Iterator[None]:
    """An engine over several GPUs works in processes of its own: the loss of one is the worker's."""
    try:
        yield
    except EngineDeadError as error:
        raise WorkerDiedError(
            "a process of its vLLM engine ended; Ray's log of the worker has why"
        ) from error


def compile_nothing_in_vain(spec: EngineSpec) -> None:
    """An eager engine on a CPU shall be eager: vLLM has the rank of each sampled token counted by a compiled
    function all the same, and compiles it for three CPU-seconds at the first completion of every new engine.
    """
    if spec.enforce_eager and current_platform.is_cpu():
        torch.compiler.set_stance("force_eager")


def prepare_process(spec: EngineSpec) -> None:
    """What an engine's process needs before the engine is made."""
    vllm_plugin.register()
    name_sockets()
    compile_nothing_in_vain(spec)


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
    """An engine that samples token ids and pulls its weights from the store. One thread has it
    (`engine_loop`).
    """

    def __init__(self, spec: EngineSpec) -> None:
        prepare_process(spec)
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
        self._asked: dict[str, tuple[str, EnginePrompt]] = {}  # by name: vLLM's own name, and the prompt
        self._adapter: LoRARequest | None = None
        self._salt: str | None = None
        self.version: int | None = None
        if spec.store is None:
            self._serve_from_disk(spec.adapter)
            return
        self._engine.collective_rpc(
            "init_weight_transfer_engine",
            kwargs={"init_info": {"store": spec.store, "timeout_s": spec.pull_timeout_s}},
        )

    @one_with_its_processes()
    def load(self, version: int | None, running: InFlight | None = None) -> tuple[int, float]:
        """Pulls a version and serves it from now on. Returns the version and the seconds it took.

        The version is acknowledged only at the end: if the pull fails halfway, the engine serves nothing.

        Args:
            version: Its number; None: the newest.
            running: What unfinished completions go on with: "keep", the key-value blocks of the old weights,
                or "recompute", new ones. None: there are none.

        Raises:
            ConfigError: Half-written answers to prompts with media were to keep their blocks.
        """
        assert self._spec.store is not None
        if running == "keep" and self._media is not None:
            raise ConfigError(
                "--rollout_in_flight keep: features of media under the old weights would be mixed with new "
                "ones. Write recompute, abort or drain for models with media."
            )
        started = time.perf_counter()
        self.version = None
        manifest = find_manifest(self._spec.store, version, self._spec.pull_timeout_s)
        if manifest.kind == "adapter":
            self._load_adapter(manifest, in_place=running is not None)
        else:
            self._engine.collective_rpc("start_weight_update")
            self._engine.collective_rpc(
                "update_weights", kwargs={"update_info": {"version": manifest.version}}
            )
            self._engine.collective_rpc("finish_weight_update")
        self._forget_blocks(manifest.version, running)
        if self._media is not None:
            self._engine.reset_encoder_cache()  # features of media under the old weights
        self.version = manifest.version
        return manifest.version, time.perf_counter() - started

    def _forget_blocks(self, version: int, running: InFlight | None) -> None:
        """Sees to it that no later request is computed from key-value blocks of older weights."""
        if running == "keep":
            # They are in use. Under another salt their hashes are others, so that nobody finds them.
            self._salt = f"version {version}" if self._spec.enable_prefix_caching else None
            return
        if not self._engine.reset_prefix_cache(reset_running_requests=running is not None):
            raise StaleWeightsError(
                "vLLM kept key-value blocks of the old weights: requests were still running"
            )
        self._salt = None

    @contextmanager
    def halted(self) -> Iterator[list[tuple[str, Sampled | Exception]]]:
        """Nothing is computed meanwhile; gives what was finished and not told yet. An engine inside this
        process steps only when it is told to; one in a process of its own does not wait.
        """
        core = self._engine.engine_core
        utility = getattr(core, "call_utility", None)
        if utility is None:
            yield []
            return
        utility("pause_scheduler", "keep", False)  # which it answers behind all that it has to tell
        try:
            told: list[tuple[str, Sampled | Exception]] = []
            while not core.outputs_queue.empty():
                told += self.step()
            yield told
        finally:
            utility("resume_scheduler")

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
    def max_num_seqs(self) -> int:
        """Sequences that are computed at once."""
        return int(self._engine.vllm_config.scheduler_config.max_num_seqs)

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self._engine.get_tokenizer()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer by the model's generation_config."""
        return read_eos(self._engine.model_config.model)

    @one_with_its_processes()
    def add(self, asks: Sequence[Ask]) -> list[str]:
        """Takes completions, each with its own seed and limit; they begin with the next step. Their names.

        Raises:
            MediaError: A medium's file is gone or is not the one that was tokenized.
        """
        decoded: dict[str, Decoded] = {}
        names: list[str] = []
        try:
            for ask in asks:
                prompt, name = ask.prompt, str(next(self._numbers))
                request: Any = {"prompt_token_ids": prompt.engine_prompt_ids.tolist()}
                if prompt.media:
                    assert self._media is not None
                    request = self._media.request(prompt, decoded)
                if self._salt is not None:
                    request["cache_salt"] = self._salt
                room = self._spec.max_model_len - len(prompt.tokens)
                params = self._params(ask.sampling, ask.seed, min(ask.limit, room))
                # vLLM up to 0.24 gives no name of its own.
                own = self._engine.add_request(name, request, params, lora_request=self._adapter) or name
                self._asked[name] = (own, prompt)
                names.append(name)
        except BaseException:
            self.abort(names)
            raise
        return names

    @one_with_its_processes()
    def step(self) -> list[tuple[str, Sampled | Exception]]:
        """One step of the engine. Gives what is finished now by name, without text and versions; in its place
        a DataError if vLLM makes other tokens of a prompt with media than the policy.
        """
        finished: list[tuple[str, Sampled | Exception]] = []
        for output in self._engine.step():
            if not output.finished or output.request_id not in self._asked:
                continue
            _, prompt = self._asked.pop(output.request_id)
            try:
                check_prompt(prompt, output.prompt_token_ids)
                finished.append((output.request_id, to_sampled(output.outputs[0])))
            except DataError as error:
                finished.append((output.request_id, error))
        return finished

    def abort(self, names: Sequence[str]) -> None:
        """Forgets completions, whatever they have come to."""
        self._engine.abort_request(list(names))
        for name in names:
            self._asked.pop(name, None)

    def sampled(self, names: Sequence[str]) -> list[int]:
        """Tokens sampled so far of unfinished completions."""
        states = self._engine.output_processor.request_states
        return [states[self._asked[name][0]].detokenizer.num_output_tokens() for name in names]

    def texts(self, sampled: Sequence[Sampled], sampling: Sampling) -> list[str]:
        """Completions without their special tokens."""
        return self.tokenizer.batch_decode([one.tokens.tolist() for one in sampled], skip_special_tokens=True)

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
            # Numbers in a few lists instead of a dictionary and an object for every token.
            flat_logprobs=True,
            # Text is only needed while sampling to look for stop words; otherwise it is decoded once at the
            # end.
            detokenize=bool(sampling.stop_words),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _serve_from_disk(self, adapter: str | None) -> None:
        """Serves the weights that the engine was built with, and an adapter's directory, as version 0."""
        if adapter is not None:
            self._adapter = LoRARequest("adapter", 1, adapter)
            self._engine.add_lora(self._adapter)
        self.version = 0

    def _load_adapter(self, manifest: Manifest, *, in_place: bool) -> None:
        """Hands LoRA tensors to vLLM, which reads adapters from a directory, at once and only once; each
        version has a name of its own, unless unfinished requests go on with it under the old one.
        """
        tensors = {name: tensor.clone() for name, tensor in read(manifest, self._spec.pull_timeout_s)}
        with adapter_files(tensors, manifest.adapter_config) as directory:
            if in_place and self._adapter is not None:
                name, number = self._adapter.lora_name, self._adapter.lora_int_id
                self._engine.add_lora(LoRARequest(name, number, str(directory), load_inplace=True))
                return
            fresh = LoRARequest(f"policy-{manifest.version}", manifest.version + 1, str(directory))
            if self._adapter is not None:
                self._engine.remove_lora(self._adapter.lora_int_id)
            self._engine.add_lora(fresh)
            self._adapter = fresh


def to_sampled(output: Any) -> Sampled:
    """Reads a finished output of vLLM (text and versions are filled in by the caller)."""
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    flat = output.logprobs
    # Of each place the first is the sampled token's.
    logprobs = np.asarray(flat.logprobs, dtype=np.float32)[flat.start_indices]
    assert len(logprobs) == len(tokens), "vLLM gave another number of log-probs than of tokens"
    reason = output.finish_reason or "abort"
    return Sampled(tokens, logprobs, output.text or "", reason, np.zeros(0, np.int32))
