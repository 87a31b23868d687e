"""Data for the pipelines: prepared in a Ray task, so that token arrays never pass through the driver.

The task reads, understands and tokenizes, and the driver gets lengths and an account of every row. The
columns of rows lie on disk: on a machine that all workers share they are mapped from there, and a reference
is the name of a folder; elsewhere they go into the object store.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_rl.config import PreferenceConfig, RLHFConfig, SFTConfig, resolved
from raytune_rl.config.commands import TrainConfig
from raytune_rl.data.example import Task
from raytune_rl.errors import ConfigError, RaytuneError, WorkerDiedError
from raytune_rl.models.context import ALLOW_LONG, longer_allowed
from raytune_rl.prepare.places import MediaPlaces
from raytune_rl.protocol.data import Account, PromptSet, TokenSet
from raytune_rl.runtime.device_env import worker_env
from raytune_rl.runtime.group import ATTEMPTS
from raytune_rl.runtime.wait import Pending, fetch, stream_refs

T = TypeVar("T")


def quarantined(train: Account, held_out: Account | None) -> int:
    """Rows left out of both sets: could not be read, understood or encoded, or are too long.

    Sets that were split from the same rows were read once, so what could not be read counts once.
    """
    read = [train] if held_out is None or held_out.sources == train.sources else [train, held_out]
    encoded = [train] if held_out is None else [train, held_out]
    bad = sum(source.bad for account in read for source in account.sources)
    return bad + sum(count for account in encoded for count in account.dropped.values())


def prompt_sets(
    config: RLHFConfig,
    quarantine: Path,
    *,
    one_machine: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[PromptSet, PromptSet | None]:
    """The prompts to train on, and the held-out ones if the user gave any; arguments as in `token_sets`."""
    from raytune_rl.prepare.task import encode_prompts_task

    places = MediaPlaces.of(config, one_machine)

    def once() -> list[PromptSet]:
        refs = on_this_node(encode_prompts_task, "streaming", config, str(quarantine), places)
        return [PromptSet(*parts, *facts) for facts, parts in _facts_and_refs(refs, 3, config, tell)]

    sets = again_if_lost(once, tell)
    return sets[0], sets[1] if len(sets) > 1 else None


def token_sets(
    config: SFTConfig | PreferenceConfig,
    task: Task,
    quarantine: Path,
    *,
    one_machine: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[TokenSet, TokenSet | None]:
    """The rows to train on, and the held-out ones if the user gave any.

    Args:
        config: What to do.
        task: What the rows are for: "sft", or "pairs" and "labels", which make two rows of each unit (see
            `data.encode_preferences`).
        quarantine: File for bad rows.
        one_machine: Whether every worker sees the driver's files.
        tell: Takes sentences on how far it is.
    """
    from raytune_rl.prepare.task import encode_rows_task

    places = MediaPlaces.of(config, one_machine)
    cache = resolved.dataset_cache_dir(config)

    def once() -> list[TokenSet]:
        refs = on_this_node(encode_rows_task, "streaming", config, task, str(quarantine), places, cache)
        return [TokenSet(columns, *facts) for facts, (columns,) in _facts_and_refs(refs, 1, config, tell)]

    sets = again_if_lost(once, tell)
    return sets[0], sets[1] if len(sets) > 1 else None


def again_if_lost(work: Callable[[], T], tell: Callable[[str], None]) -> T:
    """Work of a process that gives the same whenever it is done, bad rows and all; done again where the
    process is lost.

    Raises:
        WorkerDiedError: It was lost each of `ATTEMPTS` times.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except WorkerDiedError as error:
            if attempt == ATTEMPTS:
                raise
            sentence = str(error).partition("\n")[0]
            tell(f"{sentence} It is done again.")
    raise AssertionError


def _facts_and_refs(
    refs: Any, parts: int, config: TrainConfig, tell: Callable[[str], None]
) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    """The facts of each set, and references to the `parts` that follow them; what is said in between is
    passed on. The deadline is for each step, so that big data may take long as long as they get on."""
    items = stream_refs(
        Pending(refs, "the data task", "reading and tokenizing the data", config.step_timeout)
    )
    for ref in items:
        item = _wait(ref, config)
        if isinstance(item, str):
            tell(item)
        else:
            following = list(islice(items, parts))
            if len(following) < parts:  # it failed in between: the last reference is the failure
                _wait(following[-1] if following else ref, config)
                raise RaytuneError("the data task ended too early; this is a defect of raytune_rl")
            yield item, following


def check_lengths(
    longest_prompt: int, completion: int, max_model_len: int | None, max_positions: int | None
) -> int:
    """The engine's sequence limit: what the user set, else what the run needs.

    Raises:
        ConfigError: The longest prompt and completion do not fit the limit or the model, or the limit is more
            than the model takes and VLLM_ALLOW_LONG_MAX_MODEL_LEN is not set.
    """
    needed = longest_prompt + completion
    if longer_allowed():
        max_positions = None
    if max_model_len is not None and max_positions is not None and max_model_len > max_positions:
        raise ConfigError(
            f"--vllm_max_model_len {max_model_len} is more than the {max_positions} tokens that the model "
            "takes: "
            f"give at most {max_positions}, or leave it out (this run needs {needed}). Who knows that the "
            f"model takes more sets {ALLOW_LONG}=1."
        )
    if max_model_len is not None and needed > max_model_len:
        raise ConfigError(
            f"the longest prompt has {longest_prompt} tokens and --max_completion_length is {completion}, "
            f"together {needed}, "
            f"but --vllm_max_model_len is {max_model_len}. Raise it, or cut prompts with --max_length "
            f"{max_model_len - completion}."
        )
    if max_positions is not None and needed > max_positions:
        raise ConfigError(
            f"the longest prompt has {longest_prompt} tokens and --max_completion_length is {completion}, "
            f"together {needed}, "
            f"but the model takes {max_positions}. Lower --max_completion_length, or cut prompts with "
            "--max_length."
        )
    return max_model_len or needed


def on_this_node(function: Callable[..., Any], returns: int | Literal["streaming"], *arguments: Any) -> Any:
    """Runs a task on the driver's own node and in its folder, where the user's paths mean what he thinks."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(_yielded_in_folder if returns == "streaming" else _in_folder).options(
        num_cpus=0, num_returns=returns, scheduling_strategy=here, max_retries=0, **without_gpus()
    )
    return task.remote(str(Path.cwd()), function, *arguments)


def without_gpus() -> dict[str, Any]:
    """Options of a task that must not see the GPUs of its node; a process of its own, so only where there
    are some."""
    if not ray.cluster_resources().get("GPU"):
        return {}
    return {"runtime_env": {"env_vars": worker_env({}, 0, os.environ)}}


def _in_folder(folder: str, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
    with contextlib.chdir(folder):
        return function(*arguments)


def _yielded_in_folder(folder: str, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    with contextlib.chdir(folder):
        yield from function(*arguments)


def _wait(ref: Any, config: TrainConfig) -> Any:
    return fetch(Pending(ref, "the data task", "reading and tokenizing the data", config.step_timeout))


def token_set(refs: Sequence[Any], config: TrainConfig) -> TokenSet:
    """The rows of two references, to the columns and to the facts, once they are there."""
    columns, facts = refs
    return TokenSet(columns, *_wait(facts, config))
