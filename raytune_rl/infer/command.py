"""`raytune-rl infer`: engines, then a chat or a file of answers."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.progress import track

from raytune_rl.config import InferConfig
from raytune_rl.data.example import Message
from raytune_rl.data.model_tokens import as_ids, read_eos
from raytune_rl.errors import ConfigError
from raytune_rl.groups.engine_fit import fit
from raytune_rl.groups.fleet import RolloutFleet, read_texts
from raytune_rl.groups.fleet_start import CPU_HANG_S, start_fleet
from raytune_rl.groups.seeds import sample_seed
from raytune_rl.groups.sizes import Groups, infer_groups
from raytune_rl.infer.chat import HELP, converse
from raytune_rl.infer.rows import Asked, encode_rows_task
from raytune_rl.infer.settings import Shape, context_length, generation_settings, sampling_of
from raytune_rl.infer.source import Source, find_source
from raytune_rl.models.load import load_config
from raytune_rl.models.traits import traits_of
from raytune_rl.pipelines.lifecycle import note
from raytune_rl.prepare.sets import on_this_node
from raytune_rl.protocol.data import Account, PromptSet
from raytune_rl.protocol.media import MediaLimits
from raytune_rl.protocol.rollout import EngineSpec, Sampling, StreamChunk
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.runtime.cluster import ClusterInfo, reserve, session
from raytune_rl.runtime.fleet_health import Limits
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import Pending, fetch, stream
from raytune_rl.tracking.files import in_short, json_line
from raytune_rl.workers.imports import SAMPLING
from raytune_rl.workers.rollout import RolloutWorker, rollout_env

ROWS_AT_A_TIME = 256
"""Rows that one engine answers before they are written down."""


@dataclass(frozen=True)
class InferResult:
    """The result of a run of `infer`.

    Attributes:
        answers: How many.
        result_path: Where they are; None after a chat.
    """

    answers: int
    result_path: Path | None = None


def run(config: InferConfig) -> InferResult:
    """Tries a model on a Ray cluster, joined or started here.

    Args:
        config: What to do.

    Raises:
        RaytuneError: By name, whatever went wrong.
    """
    console = Console(stderr=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raytune_rl_infer_")))
        source = find_source(config, scratch, console.print)
        path = _result_path(config, source) if config.val_dataset else None
        cluster = stack.enter_context(session(config.ray_address, note, [SAMPLING]))
        trial = Trial(config, source, cluster, console)
        trial.start(stack)
        return trial.chat() if path is None else trial.answer_rows(path)


class Trial:
    """The engines of one model, and what is asked of them."""

    def __init__(self, config: InferConfig, source: Source, cluster: ClusterInfo, console: Console) -> None:
        self.source, self.console = source, console
        self.groups = infer_groups(config, cluster)
        model = load_config(source.model, trust_remote_code=config.trust_remote_code)
        self.config, fitted = fit(config, traits_of(model), self.groups.on_gpu)
        for notice in (*source.notices, *fitted):
            console.print(notice)
        self.rows = self._rows() if config.val_dataset else None
        self.shape = Shape.of(model.get_text_config())
        longest = None if self.rows is None else int(self.rows[1].lengths.max())
        self.max_model_len = context_length(config, self.shape, longest)
        generation = generation_settings(source.model)
        if source.adapter is not None:  # it may end an answer where its base does not
            ends = (*as_ids(generation.get("eos_token_id")), *read_eos(source.adapter))
            generation = {**generation, "eos_token_id": list(ends)}
        self.sampling = sampling_of(config, generation, self.max_model_len)

    def start(self, stack: ExitStack) -> None:
        """Starts the engines and waits for them."""
        config, groups = self.config, self.groups
        self.console.print(_engine_sentence(self.sampling, self.max_model_len, groups))
        slots = stack.enter_context(reserve(groups.specs, config.start_timeout))
        self.group = WorkerGroup(
            groups["rollout"],
            slots["rollout"],
            RolloutWorker,
            lambda rank: {"spec": self._spec(rank)},
            rollout_env(
                groups.threads["rollout"],
                config.vllm_tensor_parallel_size,
                groups.on_gpu,
                config.start_timeout,
            ),
            config.step_timeout,
        )
        stack.callback(self.group.shutdown)
        with self.console.status("starting the engine"):
            self.group.call("ping", what="starting", timeout_s=config.start_timeout)
        limits = Limits(config.start_timeout, config.step_timeout, CPU_HANG_S)
        self.fleet = start_fleet(
            self.group, limits, lambda sentence: self.console.print(f"Note: {sentence}"), stack
        )

    def chat(self) -> InferResult:
        """Talks with whoever sits at the terminal, or with what is piped in."""
        self.console.print(HELP)

        def ask() -> str | None:
            sys.stdout.write("<<< ")
            sys.stdout.flush()
            return sys.stdin.readline() or None

        def write(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        turns = converse(self.answer, ask, write, system=self.source.system, stream=self.config.stream)
        write("\n")
        return InferResult(turns)

    def answer(self, messages: Sequence[Message], turn: int) -> Iterator[StreamChunk]:
        """One answer, as it is written."""
        seed = sample_seed(self.config.seed, turn, 0, 0)
        arguments = (list(messages), seed, self.sampling)
        yield from stream(self.group.submit(0, "chat", *arguments, what="answering", returns="streaming"))

    def answer_rows(self, path: Path) -> InferResult:
        """Answers every row and writes the answers down in the order of the rows."""
        assert self.rows is not None
        prompts, asked = self.rows
        stops = tuple(dict.fromkeys((*asked.stop_token_ids, *self.sampling.stop_token_ids)))
        sampling = replace(self.sampling, stop_token_ids=stops, disallowed_token_ids=asked.placeholder_ids)
        rollout = RolloutFleet(
            self.group, self.fleet, sampling, self.config.seed, timeout_s=self.config.step_timeout
        )
        size = ROWS_AT_A_TIME * len(self.group)
        starts = range(0, len(asked), size)
        with path.open("x", encoding="utf-8") as file:
            for start in track(starts, "answering", console=self.console, transient=True):
                rows = range(start, min(start + size, len(asked)))
                answers = rollout.generate(prompts, rows, 1, version=0, batch=0)
                for answer, text in zip(answers, read_texts(answers, self.config.step_timeout), strict=True):
                    file.write(json_line(_line(asked, answer, text), in_short))
                file.flush()
        self.console.print(f"{len(asked)} answers: {path}")
        return InferResult(len(asked), path)

    def _rows(self) -> tuple[PromptSet, Asked]:
        asks = (self.config, self.source.model, self.source.tokenizer, self.source.system)
        columns, facts = on_this_node(encode_rows_task, 2, *asks)
        what = "reading and tokenizing the data"
        rows: Asked = fetch(Pending(facts, "the data task", what, self.config.step_timeout))
        for notice in rows.notices:
            self.console.print(notice)
        account = Account((), {}, None, rows.notices, None, rows.stop_token_ids)
        return PromptSet(columns, None, None, rows.lengths, account), rows

    def _prompt_limits(self) -> dict[str, int] | None:
        """As many media as a row shows; None where the model or the rows have none."""
        most = self.rows[1].most_media if self.rows is not None else None
        return None if not most else {"image": 0, "video": 0, "audio": 0, **most}

    def _spec(self, rank: int) -> EngineSpec:
        config, on_gpu = self.config, self.groups.on_gpu
        dtype = config.torch_dtype or ("bfloat16" if on_gpu else "float32")
        width = 4 if dtype == "float32" else 2
        eager = not on_gpu if config.vllm_enforce_eager is None else config.vllm_enforce_eager
        adapter = self.source.adapter
        return EngineSpec(
            model=str(Path(self.source.model).absolute()),
            dtype=dtype,
            max_model_len=self.max_model_len,
            store=None,
            pull_timeout_s=config.step_timeout,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization or EngineSpec.gpu_memory_utilization,
            kv_cache_bytes=None if on_gpu else self.shape.cache_bytes(self.max_model_len, width),
            max_num_seqs=config.vllm_max_num_seqs,
            enforce_eager=eager,
            enable_prefix_caching=config.vllm_enable_prefix_caching,
            lora_rank=max(self.source.lora_rank, config.vllm_max_lora_rank or 0) if adapter else 0,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed + rank,
            adapter=None if adapter is None else str(Path(adapter).absolute()),
            prompt_limits=self._prompt_limits(),
            media_limits=MediaLimits.of(config),
            more={} if self.source.tokenizer == self.source.model else {"tokenizer": self.source.tokenizer},
        )


def _line(rows: Asked, answer: Trajectory, text: str) -> dict[str, object]:
    return {
        **rows.others[answer.prompt],
        "response": text,
        "labels": rows.labels[answer.prompt],
        "finish_reason": answer.episode.finish_reason,
        "completion_tokens": answer.episode.completion_tokens,
        "messages": [*rows.conversations[answer.prompt], {"role": "assistant", "content": text}],
    }


def _result_path(config: InferConfig, source: Source) -> Path:
    """Where the answers go; asked before any work is done.

    Raises:
        ConfigError: Something is there already, or its folder cannot be made.
    """
    time = f"{datetime.now():%Y%m%d-%H%M%S}.jsonl"
    given = config.result_path
    path = Path(given).expanduser().absolute() if given else source.folder / "infer_result" / time
    if path.exists():
        raise ConfigError(f"--result_path {path} exists, and answers are not mixed: name another file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--result_path {path} cannot be written: {error.strerror or error}.") from error
    return path


def _engine_sentence(sampling: Sampling, max_model_len: int, groups: Groups) -> str:
    engines = groups["rollout"].workers
    drawn = "the likeliest token" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    for name, nothing in (("top_p", 1.0), ("top_k", -1), ("min_p", 0.0), ("repetition_penalty", 1.0)):
        value = getattr(sampling, name)
        drawn += f", {name} {value:g}" if value != nothing else ""
    return f"{engines} engine(s), conversations of up to {max_model_len:,} tokens, drawn by {drawn}"
