"""The rollout worker: turns prompts into trajectories under a weight version it has acknowledged.

One worker is one vLLM engine inside one actor, stepped by a thread of its own (`engine_loop`), so that the
actor takes requests, new weights and questions while it generates. It is stateless but for its weights: any
worker can answer any request of the same version, and a worker that has not loaded the version asked for
refuses to answer.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raytune_rl.data.example import Message
from raytune_rl.errors import StaleWeightsError
from raytune_rl.models.context import ALLOW_LONG
from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.rollout import EngineSpec, MultiTurnSpec, Sampling, StreamChunk
from raytune_rl.protocol.tickets import Burst, EngineProgress, InFlight, WeightUpdate
from raytune_rl.protocol.trajectory import EpisodeRequest
from raytune_rl.runtime.imports import import_once
from raytune_rl.workers.conversation import Conversations
from raytune_rl.workers.engine_loop import EngineLoop
from raytune_rl.workers.episodes import Episodes, Extra, Group, GroupAnswer, answer_of
from raytune_rl.workers.gate import Bursts, Gate
from raytune_rl.workers.imports import SAMPLING

if TYPE_CHECKING:
    from raytune_rl.workers.vllm_engine import VllmEngine


def rollout_env(
    threads: int, tensor_parallel_size: int, on_gpu: bool, start_timeout_s: float = 600.0
) -> dict[str, str]:
    """Environment that must be set before vLLM is imported in the worker's process."""
    env = {
        **SAMPLING.env,
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
    if ALLOW_LONG in os.environ:
        env[ALLOW_LONG] = os.environ[ALLOW_LONG]
    if not on_gpu:
        # Several actors share these cores; binding each engine to cores of its own choice would stack them.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return env


class RolloutWorker:
    """One vLLM engine. Run as an actor by the controller; its calls run side by side."""

    CALLS_AT_ONCE = 4096
    STAGE = SAMPLING.name

    def __init__(self, spec: EngineSpec) -> None:
        self._engine: EngineLoop[VllmEngine] = EngineLoop(lambda: self._build(spec))
        conversations = None if spec.multi_turn is None else self._scheduled(spec.multi_turn)
        self._several_turns = conversations is not None
        self._episodes = Episodes(self._engine, conversations, spec.max_model_len)
        self._gate = Gate()
        self._bursts: Bursts[Group] = Bursts(self._begin)
        self._groups: dict[int, Group] = {}
        self._received = 0

    def _build(self, spec: EngineSpec) -> VllmEngine:
        import_once("raytune_rl.workers.vllm_engine")
        from raytune_rl.workers.vllm_engine import VllmEngine

        return VllmEngine(spec)

    def _scheduled(self, spec: MultiTurnSpec) -> Callable[[], Conversations]:
        from raytune_rl.data.chat import ChatTemplate
        from raytune_rl.multi_turn.scheduler import make_scheduler
        from raytune_rl.rewards.plugins import load_plugins

        load_plugins(spec.plugin_files)
        tokenizer, ends = self._engine.call(lambda engine: (engine.tokenizer, engine.eos_token_ids)).result()
        scheduler = make_scheduler(spec.scheduler, spec.max_turns, tokenizer)
        chat = replace(ChatTemplate.of(tokenizer), eos_token_ids=ends)
        return lambda: Conversations(scheduler, chat, spec.timeout_s)

    # -- questions, answered at any time

    async def ping(self) -> dict[str, Any]:
        """Proves that the engine is up; tells the version it serves (None: none acknowledged yet), and how
        many sequences it computes at once.
        """
        at_once = await asyncio.wrap_future(self._engine.call(lambda engine: engine.max_num_seqs))
        return {"version": self._engine.version, "pid": os.getpid(), "max_num_seqs": at_once}

    async def progress(self) -> EngineProgress:
        """How far the engine is. Asks nothing of the engine's thread, so it answers where that one hangs."""
        engine = self._engine
        # Between two turns the engine has nothing of a conversation, which yet is to go on.
        owed = (g for g in self._groups.values() if self._several_turns or g.answer is None)
        unfinished = sum(len(group.requested) for group in owed)
        unfinished += 0 if self._several_turns else engine.unfinished
        slowest_s = engine.slowest_step_s
        return EngineProgress(
            engine.steps, engine.stepping, slowest_s, self._received, unfinished, engine.version
        )

    # -- what needs the engine for itself

    async def load_weights(self, version: int | None = None, in_flight: InFlight = "drain") -> WeightUpdate:
        """Pulls a version (None: the newest) from the store and serves it.

        Args:
            version: Its number.
            in_flight: What becomes of half-written answers. Of a conversation of several turns it is the
                present turn; only "drain" waits for its end.
        """
        async with self._gate.closed(empty=in_flight == "drain"):
            return await asyncio.wrap_future(self._engine.load(version, in_flight))

    async def forget_prompts(self) -> None:
        """Drops what the engine keeps of the prompts so far."""
        await self._alone(lambda engine: engine.forget_prompts())

    async def sleep(self) -> None:
        """Gives the GPU's memory to whoever trains beside this engine; what is dropped is the spec's sleep
        level.
        """
        await self._alone(lambda engine: engine.sleep())

    async def wake(self) -> None:
        """Takes the memory back. The weights are stale until a version is loaded."""
        await self._alone(lambda engine: engine.wake())

    async def _alone(self, function: Callable[[VllmEngine], None]) -> None:
        async with self._gate.closed(empty=True):
            await asyncio.wrap_future(self._engine.call(function))

    async def chat(
        self, messages: Sequence[Message], seed: int, sampling: Sampling
    ) -> AsyncIterator[StreamChunk]:
        """Answers a conversation, piece by piece, under whatever version is loaded.

        Raises:
            DataError: The conversation does not fit, or the chat template refuses it.
        """
        chunks: asyncio.Queue[StreamChunk | None] = asyncio.Queue()
        here = asyncio.get_running_loop()

        def speak(engine: VllmEngine) -> None:
            try:
                for chunk in engine.chat(messages, seed, sampling):
                    here.call_soon_threadsafe(chunks.put_nowait, chunk)
            finally:
                here.call_soon_threadsafe(chunks.put_nowait, None)

        async with self._gate.closed(empty=True):
            spoken = self._engine.call(speak)
            while (chunk := await chunks.get()) is not None:
                yield chunk
            await asyncio.wrap_future(spoken)

    # -- generation

    async def run_group(
        self,
        prompts: Columns,
        request: EpisodeRequest,
        sampling: Sampling,
        version: int | None = None,
        extra: Extra | None = None,
        burst: Burst | None = None,
    ) -> GroupAnswer:
        """Completes a prompt, beside whatever else is under way.

        Args:
            prompts: Columns with "prompt", Ragged int32 token ids; for prompts with media also
                "engine_prompt_ids" and the columns of `data.media_table`.
            request: Which prompt, and the seeds of its completions.
            sampling: How to draw.
            version: The weight version to sample with; None: whatever is served, and each token says which.
            extra: The data set's columns, one entry a prompt; a scheduler of several turns sees its row.
                None: the model has one turn.
            burst: Groups that begin in the same step, whenever they arrive: what an engine computes together
                may decide the last digits.

        Raises:
            StaleWeightsError: This worker serves another version, or none.
        """
        group = Group.of(prompts, request, sampling, version, extra if self._several_turns else None)
        number = self._received
        self._received += 1
        self._groups[number] = group
        try:
            await self._bursts.arrive(group, burst)
            assert group.answer is not None
            return answer_of(group, await asyncio.wrap_future(group.answer))
        finally:
            del self._groups[number]
            group.abandoned = True
            if group.answer is not None:
                self._gate.leave()

    async def _begin(self, groups: Sequence[Group]) -> None:
        """Begins those that are still wanted."""
        await self._gate.opened()
        served = self._engine.version
        wanted = [group for group in groups if not group.abandoned]
        begun = [group for group in wanted if served is not None and group.version in (None, served)]
        for group in wanted:
            self._gate.enter()
            if group not in begun:
                asked = "" if group.version is None else f" with weight version {group.version}"
                group.answer = Future()
                group.answer.set_exception(
                    StaleWeightsError(f"asked to sample{asked}, but version {served} is loaded")
                )
        for group, answer in zip(begun, self._episodes.begin(begun), strict=True):
            group.answer, group.served = answer, served
