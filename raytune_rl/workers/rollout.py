"""The rollout worker: turns prompts into trajectories under a weight version it has acknowledged.

One worker is one vLLM engine inside one actor. It is stateless but for its weights: any worker can answer any
request of the same version, and a worker that has not loaded the version asked for refuses to answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.example import Message
from raytune_rl.data.media_limits import NO_LIMITS, MediaLimits
from raytune_rl.data.media_table import Medium, media_of
from raytune_rl.data.ragged import Columns, Ragged
from raytune_rl.errors import DataError, StaleWeightsError
from raytune_rl.multi_turn.scheduler import Request
from raytune_rl.workers.conversation import Conversation, Conversations

GPU_SHARE = 0.9
"""Of a GPU's memory, for an engine that has the GPU to itself."""


@dataclass(frozen=True)
class MultiTurnSpec:
    """Who answers the model, in conversations of several turns.

    Attributes:
        scheduler: Registered name.
        max_turns: Of the model; None is no limit but the length.
        plugin_files: Files that may register it.
        timeout_s: For the scheduler's answers of one round, seconds.
    """

    scheduler: str
    max_turns: int | None
    plugin_files: tuple[str, ...]
    timeout_s: float


@dataclass(frozen=True)
class EngineSpec:
    """How to build an engine.

    Attributes:
        model: Local directory of the base model.
        dtype: torch dtype name of the weights.
        max_model_len: Longest prompt plus completion, tokens.
        store: Name of the weight store's actor; None serves what lies in `model` (and `adapter`) as version
            0.
        pull_timeout_s: Deadline for pulling one version, seconds.
        tensor_parallel_size: GPUs of one engine.
        gpu_memory_utilization: Share of each GPU that vLLM may use.
        kv_cache_bytes: Size of the key-value cache; None leaves it to `gpu_memory_utilization` (the way on
            GPUs).
        max_num_seqs: Sequences decoded at once; None is vLLM's default.
        enforce_eager: No CUDA graphs or compilation.
        enable_prefix_caching: Share the prompt's key-value blocks among completions.
        lora_rank: Rank of the adapters it will serve; 0 when weights arrive merged or the training is full.
        trust_remote_code: Run code from the model's directory.
        seed: Engine seed; each completion has a seed of its own besides.
        use_hf: A hub id is one of Hugging Face instead of ModelScope.
        sleep_level: What to drop between generations on a GPU: 0 nothing, 1 weights to the CPU, 2 weights
            discarded.
        prompt_limits: Most items of each kind ("image", ...) in one prompt; None for a model
            that takes texts only.
        media_limits: How much of a medium is shown.
        more: Further arguments of vLLM's EngineArgs.
        adapter: Local directory of a LoRA adapter to serve; only without a store.
        multi_turn: For conversations of several turns; None: one completion a prompt.
    """

    model: str
    dtype: str
    max_model_len: int
    store: str | None
    pull_timeout_s: float
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = GPU_SHARE
    kv_cache_bytes: int | None = None
    max_num_seqs: int | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    lora_rank: int = 0
    trust_remote_code: bool = False
    seed: int = 0
    use_hf: bool = False
    sleep_level: int = 0
    prompt_limits: Mapping[str, int] | None = None
    media_limits: MediaLimits = NO_LIMITS
    more: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    multi_turn: MultiTurnSpec | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Names and meaning are vLLM's; `banned` tokens are never drawn."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_words: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer while it is written; the last has the reason for which it ends."""

    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class PromptRequest:
    """One prompt and the completions wanted of it.

    Attributes:
        prompt_id: The controller's number of the prompt, given back in the answer.
        row: Where the prompt lies in the prompt columns.
        seeds: One seed a completion; the same prompt, seed and weights give the same completion on any
            worker.
    """

    prompt_id: int
    row: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class EnginePrompt:
    """One prompt.

    Attributes:
        tokens: int32, as the policy trains on it.
        given: int32, as vLLM takes it: with one placeholder for each medium. The same without media.
        media: In their order.
    """

    tokens: NDArray[np.int32]
    given: NDArray[np.int32]
    media: tuple[Medium, ...] = ()

    def followed_by(self, tokens: NDArray[np.int32]) -> EnginePrompt:
        """The prompt with what was said since."""
        if not len(tokens):
            return self
        return replace(
            self,
            tokens=np.concatenate([self.tokens, tokens]),
            given=np.concatenate([self.given, tokens]),
        )


@dataclass(frozen=True)
class CompletionMeta:
    """What the controller learns of one completion: no tokens, only sizes and facts.

    Attributes:
        prompt_id: From the request.
        sample: Index among the prompt's completions.
        row: Row in the returned columns and texts.
        prompt_tokens: Length of the prompt.
        completion_tokens: Sampled tokens, end tokens included.
        finish_reason: "stop" (ended by itself) or "length" (cut at the limit).
        version: Weight version that sampled it.
        other_tokens: Tokens behind the prompt that the model did not sample (several turns only).
        turns: Of the model.
        failure: Why a scheduler's hook ended the conversation early; empty if none did.
    """

    prompt_id: int
    sample: int
    row: int
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    version: int
    other_tokens: int = 0
    turns: int = 1
    failure: str = ""


def rollout_env(threads: int, tensor_parallel_size: int, on_gpu: bool) -> dict[str, str]:
    """Environment that must be set before vLLM is imported in the worker's process."""
    env = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
        # Inside the actor's own process the engine can read the object store; more GPUs need processes of
        # their own.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if tensor_parallel_size == 1 else "1",
    }
    if not on_gpu:
        # Several actors share these cores; binding each engine to cores of its own choice would stack them.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return env


class RolloutWorker:
    """One vLLM engine. Run as an actor by the controller."""

    def __init__(self, spec: EngineSpec) -> None:
        from raytune_rl.workers.vllm_engine import VllmEngine

        self._engine = VllmEngine(spec)
        self._conversations = None if spec.multi_turn is None else self._scheduled(spec.multi_turn)

    def _scheduled(self, spec: MultiTurnSpec) -> Conversations:
        from raytune_rl.data.chat import ChatTemplate
        from raytune_rl.multi_turn.scheduler import make_scheduler
        from raytune_rl.rewards.plugins import load_plugins

        load_plugins(spec.plugin_files)
        tokenizer = self._engine.tokenizer
        scheduler = make_scheduler(spec.scheduler, spec.max_turns, tokenizer)
        return Conversations(scheduler, ChatTemplate.of(tokenizer), spec.timeout_s)

    def ping(self) -> dict[str, Any]:
        """Proves that the engine is up; tells the version it serves (None: none acknowledged yet)."""
        return {"version": self._engine.version, "pid": os.getpid()}

    def load_weights(self, version: int | None = None) -> tuple[int, float]:
        """Pulls a version (None: the newest) from the store. Returns the version and the seconds it took."""
        return self._engine.load(version)

    def sleep(self) -> None:
        """Gives the GPU's memory to whoever trains beside this engine; what is dropped is the spec's sleep
        level.
        """
        self._engine.sleep()

    def wake(self) -> None:
        """Takes the memory back. The weights are stale until a version is loaded."""
        self._engine.wake()

    def chat(self, messages: Sequence[Message], seed: int, sampling: Sampling) -> Iterator[Piece]:
        """Answers a conversation, piece by piece, under whatever version is loaded.

        Raises:
            DataError: The conversation does not fit, or the chat template refuses it.
        """
        yield from self._engine.chat(messages, seed, sampling)  # Ray streams what generator functions give

    def generate(
        self,
        prompts: Columns,
        requests: Sequence[PromptRequest],
        sampling: Sampling,
        version: int,
        extra: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[list[CompletionMeta], Columns, list[str], list[dict[str, Any]]]:
        """Completes prompts.

        Args:
            prompts: Columns with "prompt", Ragged int32 token ids; for prompts with media also "given" and
                the columns of `data.media_table`.
            requests: Which prompts, and the seeds of their completions.
            sampling: How to draw.
            version: The weight version to sample with.
            extra: The data set's columns, one entry a prompt; a scheduler of several turns sees its row.

        Returns:
            Facts of each completion; the trajectory columns (tokens, loss_mask, logprobs, versions; one row a
            completion, the latter two one entry a sampled token); what the model said last; and of
            conversations of several turns the messages and the scheduler's "rollout_infos".

        Raises:
            StaleWeightsError: This worker serves another version.
        """
        if self._engine.version != version:
            raise StaleWeightsError(
                f"asked to sample with weight version {version}, but version {self._engine.version} is loaded"
            )
        asked = [Asked(r, sample, seed) for r in requests for sample, seed in enumerate(r.seeds)]
        inputs = {r.row: read_prompt(prompts, r.row) for r in requests}
        prompts_of = [inputs[a.request.row] for a in asked]
        held = self._hold(asked, prompts_of, sampling, extra or {})
        metas = [
            CompletionMeta(
                prompt_id=a.request.prompt_id,
                sample=a.sample,
                row=row,
                prompt_tokens=len(prompts_of[row].tokens),
                completion_tokens=one.sampled,
                finish_reason=one.finish_reason,
                version=version,
                other_tokens=len(one.tokens) - one.sampled,
                turns=one.turns,
                failure=one.failure,
            )
            for row, (a, one) in enumerate(zip(asked, held, strict=True))
        ]
        ids = [prompt.tokens for prompt in prompts_of]
        columns: Columns = {
            "tokens": Ragged.from_rows(
                [np.concatenate([p, one.tokens]) for p, one in zip(ids, held, strict=True)], np.int32
            ),
            "loss_mask": Ragged.from_rows(
                [np.concatenate([np.zeros(len(p)), one.trained]) for p, one in zip(ids, held, strict=True)],
                np.bool_,
            ),
            "logprobs": Ragged.from_rows([one.logprobs for one in held], np.float32),
            "versions": Ragged.from_rows([np.full(one.sampled, version) for one in held], np.int32),
        }
        dialogues = [
            {"messages": one.request.messages, "rollout_infos": one.request.rollout_infos}
            for one in (held if self._conversations else ())
        ]
        return metas, columns, [one.last_text for one in held], dialogues

    def _hold(
        self,
        asked: Sequence[Asked],
        prompts: list[EnginePrompt],
        sampling: Sampling,
        extra: Mapping[str, Sequence[Any]],
    ) -> list[Conversation]:
        """One turn of the model for each prompt, or a conversation; a prompt that the scheduler changes takes
        its place among `prompts`.
        """

        def speak(
            which: Sequence[int], said: Sequence[NDArray[np.int32]], limits: Sequence[int], turn: int
        ) -> list[Any]:
            longer = [prompts[i].followed_by(more) for i, more in zip(which, said, strict=True)]
            return self._engine.sample(longer, [asked[i].seed_of(turn) for i in which], sampling, limits)

        if self._conversations is not None:
            requests = [a.conversation(extra) for a in asked]
            for number, changed in enumerate(self._conversations.begin(requests)):
                if changed is not None:
                    prompts[number] = self._fitting(prompts[number], changed, sampling.max_tokens)
            return self._conversations.hold(speak, requests, sampling.max_tokens)
        held = [Conversation(Request([])) for _ in asked]
        everything = range(len(asked))
        none = np.zeros(0, dtype=np.int32)
        turns = speak(everything, [none for _ in asked], [sampling.max_tokens for _ in asked], 1)
        for one, spoken in zip(held, turns, strict=True):
            one.add(spoken)
        return held

    def _fitting(self, prompt: EnginePrompt, changed: NDArray[np.int32], more: int) -> EnginePrompt:
        longest = self._engine.max_model_len
        if prompt.media:
            raise DataError("--multi_turn_scheduler changed a prompt with media, which only texts can be")
        if len(changed) + more > longest:
            raise DataError(
                f"--multi_turn_scheduler made a prompt of {len(changed)} tokens. With {more} for the answer "
                f"it does not fit the {longest} that the engine takes: raise --vllm_max_model_len"
            )
        return EnginePrompt(changed, changed)


@dataclass(frozen=True)
class Asked:
    """One completion to be made."""

    request: PromptRequest
    sample: int
    seed: int

    def seed_of(self, turn: int) -> int:
        """Every turn has a seed of its own."""
        if turn == 1:
            return self.seed
        return int(np.random.SeedSequence([self.seed, turn]).generate_state(1)[0] & 0x7FFFFFFF)

    def conversation(self, extra: Mapping[str, Sequence[Any]]) -> Request:
        """What a scheduler sees of the prompt's row before the first turn."""
        row = {name: column[self.request.row] for name, column in extra.items()}
        messages = [dict(message) for message in row.pop("messages")]
        return Request(messages, row, f"{self.request.prompt_id}-{self.sample}")


def read_prompt(prompts: Columns, row: int) -> EnginePrompt:
    """One prompt of the columns that `RolloutWorker.generate` takes."""
    tokens, given = prompts["prompt"], prompts.get("given", prompts["prompt"])
    return EnginePrompt(tokens[row], given[row], tuple(media_of(prompts, row)))
