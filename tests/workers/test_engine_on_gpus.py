"""The engine's arguments for GPUs pass vLLM's own checks, on a platform that only says that it is CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.groups import specs
from raytune_rl.groups.sizes import online_groups
from raytune_rl.protocol.rollout import EngineSpec
from raytune_rl.runtime.cluster import ClusterInfo
from raytune_rl.tiny.model import make_tiny_model
from tests.workers.cuda_platform import pretend

EIGHT = ClusterInfo(True, "", {"a": {"GPU": 8.0, "CPU": 64.0}}, 0, has_gpus=True)
RUNS: dict[str, dict[str, Any]] = {
    "full": {"train_type": "full"},
    "lora": {"lora_rank": 20},
    "merged": {"vllm_enable_lora": False},
    "awake": {"sleep_level": 0},
    "tensor parallel": {"colocate": False, "vllm_tensor_parallel_size": 2, "rollout_workers": 2},
    "eager": {"vllm_enforce_eager": True, "vllm_max_num_seqs": 64, "colocate": False},
    "fp8 cache": {"vllm_engine_kwargs": {"kv_cache_dtype": "fp8", "enable_flashinfer_autotune": True}},
}


def _engine_specs(model: str) -> dict[str, EngineSpec]:
    made = {}
    for name, settings in RUNS.items():
        config = RLHFConfig(model=model, dataset="d", reward_funcs="accuracy", beta=0, **settings)
        made[name] = specs.engine_spec(config, online_groups(config, EIGHT, ()), 64, "store", 0)
    return made


def _facts(engines: Mapping[str, EngineSpec], wrong: Mapping[str, EngineSpec]) -> tuple[Any, Any]:
    """Of each engine what vLLM made of its arguments; of the wrong ones what it said."""
    pretend()
    import vllm.config.vllm as vllm_config
    from vllm.engine.arg_utils import EngineArgs

    vllm_config.HAS_TRITON = True  # as in a GPU's wheel

    from raytune_rl.workers.vllm_args import engine_args, usage_context

    def made(spec: EngineSpec) -> dict[str, Any]:
        config = EngineArgs(**engine_args(spec)).create_engine_config(usage_context())
        return {
            "worker": config.parallel_config.worker_cls,
            "executor": config.parallel_config.distributed_executor_backend,
            "parallel": config.parallel_config.tensor_parallel_size,
            "dtype": str(config.model_config.dtype),
            "sleeps": config.model_config.enable_sleep_mode,
            "logprobs": str(config.model_config.logprobs_mode),
            "share": config.cache_config.gpu_memory_utilization,
            "cache": config.cache_config.cache_dtype,
            "graphs": config.compilation_config.cudagraph_mode.name,
            "rank": config.lora_config and config.lora_config.max_lora_rank,
            "at a time": config.scheduler_config.max_num_seqs,
            "tokens": config.scheduler_config.max_num_batched_tokens,
            "async": config.scheduler_config.async_scheduling,
            "chunked": config.scheduler_config.enable_chunked_prefill,
            "autotune": config.kernel_config.enable_flashinfer_autotune,
            "second runner": config.use_v2_model_runner,
            "weights": config.weight_transfer_config.backend,
        }

    said = {}
    for name, spec in wrong.items():
        try:
            made(spec)
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is what is looked at
            said[name] = str(error)
    return {name: made(spec) for name, spec in engines.items()}, said


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    model = str(make_tiny_model(tmp_path_factory.mktemp("model")))
    engines = _engine_specs(model)
    wrong = {
        "share": replace(engines["full"], gpu_memory_utilization=1.5),
        "value": replace(engines["full"], more={"kv_cache_dtype": "fp9"}),
        "name": replace(engines["full"], more={"kv_cache_typ": "fp8"}),
        "heads": replace(engines["tensor parallel"], tensor_parallel_size=3),
    }
    run: Callable[..., Any] = _facts
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # vLLM's platform is one a process
        return pool.submit(run, engines, wrong).result(timeout=240)


def test_every_run_on_gpus_makes_arguments_that_vllm_takes(facts: tuple[Any, Any]) -> None:
    made = facts[0]
    assert made.keys() == RUNS.keys()
    for one in made.values():
        assert one["worker"] == "vllm.v1.worker.gpu_worker.Worker"
        assert one["dtype"] == "torch.bfloat16"
        assert one["logprobs"] == "processed_logprobs"
        assert one["weights"] == "ray_object_store"
        assert one["chunked"]
        assert one["async"]
        assert one["second runner"], "vLLM's Model Runner V2, where a CPU has the first"


def test_each_is_what_its_flags_say(facts: tuple[Any, Any]) -> None:
    made = facts[0]
    assert [made[n]["sleeps"] for n in ("full", "lora", "awake", "eager")] == [True, True, False, False]
    assert [made[n]["rank"] for n in ("full", "lora", "merged")] == [None, 32, None]
    assert [made[n]["share"] for n in ("full", "eager")] == [0.5, 0.9]
    assert [made[n]["executor"] for n in ("full", "tensor parallel")] == ["uni", "mp"]
    assert made["tensor parallel"]["parallel"] == 2
    assert [made[n]["graphs"] for n in ("full", "eager")] == ["FULL_AND_PIECEWISE", "NONE"]
    assert [made[n]["cache"] for n in ("full", "fp8 cache")] == ["auto", "fp8"]


def test_an_h100_computes_as_much_at_a_time_as_it_can(facts: tuple[Any, Any]) -> None:
    made = facts[0]
    assert (made["full"]["at a time"], made["full"]["tokens"]) == (1024, 16384)
    assert made["eager"]["at a time"] == 64
    assert [made[n]["autotune"] for n in ("full", "fp8 cache")] == [False, True]


def test_what_vllm_does_not_take_fails_here(facts: tuple[Any, Any]) -> None:
    said = facts[1]
    assert "gpu_memory_utilization" in said["share"]
    assert "fp9" in said["value"]
    assert "EngineArgs have no kv_cache_typ" in said["name"]
    assert "tensor parallel size (3)" in said["heads"]
