"""The rollout worker: turns prompts into trajectories under a weight version it has acknowledged.

One worker is one vLLM engine inside one actor. It is stateless but for its weights: any worker can answer any
request of the same version, and a worker that has not loaded the version asked for refuses to answer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.example import Message
from raytune_rl.data.media_table import media_of
from raytune_rl.errors import DataError, StaleWeightsError
from raytune_rl.multi_turn.scheduler import Request
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.rollout import EngineSpec, MultiTurnSpec, Sampling, StreamChunk
from raytune_rl.protocol.trajectory import EpisodeFacts, EpisodeRequest
from raytune_rl.workers.conversation import Conversation, Conversations
from raytune_rl.workers.engine_prompt import EnginePrompt


def rollout_env(
    threads: int, tensor_parallel_size: int, on_gpu: bool, start_timeout_s: float = 600.0
) -> dict[str, str]:
    """Environment that must be set before vLLM is imported in the worker's process."""
    env = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
        # Inside the actor's own process the engine can read the object store; more GPUs need processes of
        # their own.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if tensor_parallel_size == 1 else "1",
        # The engine's own processes have as long as the worker.
        "VLLM_ENGINE_READY_TIMEOUT_S": str(math.ceil(start_timeout_s)),
    }
    if on_gpu:
        # FlashInfer's sampler compiles kernels for minutes at a start, and fetches some.
        env["VLLM_USE_FLASHINFER_SAMPLER"] = os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0")
    long = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
    if long in os.environ:
        env[long] = os.environ[long]
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
        chat = replace(ChatTemplate.of(tokenizer), eos_token_ids=self._engine.eos_token_ids)
        return Conversations(scheduler, chat, spec.timeout_s)

    def ping(self) -> dict[str, Any]:
        """Proves that the engine is up; tells the version it serves (None: none acknowledged yet)."""
        return {"version": self._engine.version, "pid": os.getpid()}

    def load_weights(self, version: int | None = None) -> tuple[int, float]:
        """Pulls a version (None: the newest) from the store. Returns the version and the seconds it took."""
        return self._engine.load(version)

    def forget_prompts(self) -> None:
        """Drops what the engine keeps of the prompts so far."""
        self._engine.forget_prompts()

    def sleep(self) -> None:
        """Gives the GPU's memory to whoever trains beside this engine; what is dropped is the spec's sleep
        level.
        """
        self._engine.sleep()

    def wake(self) -> None:
        """Takes the memory back. The weights are stale until a version is loaded."""
        self._engine.wake()

    def chat(self, messages: Sequence[Message], seed: int, sampling: Sampling) -> Iterator[StreamChunk]:
        """Answers a conversation, piece by piece, under whatever version is loaded.

        Raises:
            DataError: The conversation does not fit, or the chat template refuses it.
        """
        yield from self._engine.chat(messages, seed, sampling)  # Ray streams what generator functions give

    def generate(
        self,
        prompts: Columns,
        requests: Sequence[EpisodeRequest],
        sampling: Sampling,
        version: int,
        extra: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[list[EpisodeFacts], Columns, list[str], list[dict[str, Any]]]:
        """Completes prompts.

        Args:
            prompts: Columns with "prompt", Ragged int32 token ids; for prompts with media also
                "engine_prompt_ids" and the columns of `data.media_table`.
            requests: Which prompts, and the seeds of their completions.
            sampling: How to draw.
            version: The weight version to sample with.
            extra: The data set's columns, one entry a prompt; a scheduler of several turns sees its row.
                None: the model has one turn.

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
        requested = [
            CompletionRequest(r, sample, seed) for r in requests for sample, seed in enumerate(r.seeds)
        ]
        inputs = {r.row: read_prompt(prompts, r.row) for r in requests}
        prompts_of = [inputs[a.request.row] for a in requested]
        conversations = self._run_episodes(requested, prompts_of, sampling, extra)
        episodes = [
            EpisodeFacts(
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
            for row, (a, one) in enumerate(zip(requested, conversations, strict=True))
        ]
        ids = [prompt.tokens for prompt in prompts_of]
        columns: Columns = {
            "tokens": Ragged.from_rows(
                [np.concatenate([p, one.tokens]) for p, one in zip(ids, conversations, strict=True)], np.int32
            ),
            "loss_mask": Ragged.from_rows(
                [
                    np.concatenate([np.zeros(len(p)), one.trained])
                    for p, one in zip(ids, conversations, strict=True)
                ],
                np.bool_,
            ),
            "logprobs": Ragged.from_rows([one.logprobs for one in conversations], np.float32),
            "versions": Ragged.from_rows([np.full(one.sampled, version) for one in conversations], np.int32),
        }
        dialogues = [
            {"messages": one.request.messages, "rollout_infos": one.request.rollout_infos}
            for one in (conversations if self._conversations and extra is not None else ())
        ]
        return episodes, columns, [one.last_text for one in conversations], dialogues

    def _run_episodes(
        self,
        requested: Sequence[CompletionRequest],
        prompts: list[EnginePrompt],
        sampling: Sampling,
        extra: Mapping[str, Sequence[Any]] | None,
    ) -> list[Conversation]:
        """One turn of the model for each prompt, or a conversation; a prompt that the scheduler changes takes
        its place among `prompts`.
        """

        def generate_turn(
            which: Sequence[int], continuations: Sequence[NDArray[np.int32]], limits: Sequence[int], turn: int
        ) -> list[Any]:
            longer = [prompts[i].followed_by(more) for i, more in zip(which, continuations, strict=True)]
            return self._engine.sample(longer, [requested[i].seed_of(turn) for i in which], sampling, limits)

        if self._conversations is not None and extra is not None:
            requests = [a.conversation(extra) for a in requested]
            for number, changed in enumerate(self._conversations.begin(requests)):
                if changed is not None:
                    prompts[number] = self._fitting(prompts[number], changed, sampling.max_tokens)
            return self._conversations.run_episodes(generate_turn, requests, sampling.max_tokens)
        conversations = [Conversation(Request([])) for _ in requested]
        everything = range(len(requested))
        none = np.zeros(0, dtype=np.int32)
        turns = generate_turn(
            everything, [none for _ in requested], [sampling.max_tokens for _ in requested], 1
        )
        for one, sampled_turn in zip(conversations, turns, strict=True):
            one.add(sampled_turn)
        return conversations

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
class CompletionRequest:
    """One completion to be made."""

    request: EpisodeRequest
    sample: int
    seed: int

    def seed_of(self, turn: int) -> int:
        """Every turn has a seed of its own."""
        if turn == 1:
            return self.seed
        return int(np.random.SeedSequence([self.seed, turn]).generate_state(1)[0] & 0x7FFFFFFF)

    def conversation(self, extra: Mapping[str, Sequence[Any]]) -> Request:
        """The request that a scheduler sees before the first turn, made of the prompt's row."""
        row = {name: column[self.request.row] for name, column in extra.items()}
        messages = [dict(message) for message in row.pop("messages")]
        return Request(messages, row, f"{self.request.prompt_id}-{self.sample}")


def read_prompt(prompts: Columns, row: int) -> EnginePrompt:
    """One prompt of the columns that `RolloutWorker.generate` takes."""
    tokens, engine_prompt_ids = prompts["prompt"], prompts.get("engine_prompt_ids", prompts["prompt"])
    return EnginePrompt(tokens[row], engine_prompt_ids[row], tuple(media_of(prompts, row)))
