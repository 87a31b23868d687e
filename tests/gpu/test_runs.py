"""Whole runs on one GPU that policy and engine share: they start in turn, sleep and wake, and the engine
stays the policy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_rl import cli
from raytune_rl.runtime.out_of_memory import explained
from raytune_rl.tiny.arithmetic import write_dataset
from raytune_rl.tiny.model import make_tiny_model
from tests.gpu.conftest import alone, only_gpu

GAP = "rollout_correction/logp_abs_diff_max"
RUNS: dict[str, tuple[bool, list[str]]] = {
    "adapter": (True, ["--train_type", "lora", "--sleep_level", "1"]),
    "merged": (True, ["--train_type", "lora", "--vllm_enable_lora", "false", "--sleep_level", "2"]),
    "adapter on a base that is read again": (True, ["--train_type", "lora", "--sleep_level", "2"]),
    "tied": (True, ["--train_type", "full", "--sleep_level", "2", "--offload_optimizer", "true"]),
    "untied": (False, ["--train_type", "full", "--sleep_level", "1", "--offload_model", "true"]),
    "with a reference": (False, ["--train_type", "full", "--beta", "0.1", "--offload_model", "true"]),
}
"""By what travels: whether head and embedding are one, and flags. Levels, offload and graphs all come up."""


def run(tied: bool, flags: list[str], where: Path) -> list[dict[str, Any]]:
    """The log's lines of two steps of GRPO."""
    model = make_tiny_model(where / "model", tied=tied, hidden=256, heads=4)
    data = write_dataset(where / "data")
    words = [
        "rlhf", "--rlhf_type", "grpo", "--model", str(model), "--dataset", str(data.train),
        "--reward_funcs", "format", "--num_generations", "4", "--per_device_train_batch_size", "8",
        "--max_completion_length", "32", "--max_steps", "2", "--logging_steps", "1",
        "--learning_rate", "1e-3", "--output_dir", str(where / "out"), *flags,
    ]  # fmt: skip
    assert cli.main(words) == 0
    (log,) = (where / "out").rglob("logging.jsonl")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", RUNS)
def test_the_engine_stays_the_policy(kind: str, tmp_path: Path) -> None:
    tied, flags = RUNS[kind]
    lines = [line for line in alone(run, tied, flags, tmp_path) if "loss" in line]
    assert len(lines) == 2
    assert all(line[GAP] < 0.5 for line in lines), "bfloat16 on both sides"


def _crowded(model: str, share: float) -> str:
    """What vLLM says of a GPU on which somebody else has most of the memory."""
    import ray
    import torch

    from raytune_rl.protocol.rollout import EngineSpec
    from raytune_rl.workers.rollout import rollout_env

    free, total = torch.cuda.mem_get_info()
    kept = torch.empty(int(free - 0.3 * total), dtype=torch.uint8, device="cuda")
    import os

    os.environ |= rollout_env(4, 1, True)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    from raytune_rl.workers.vllm_engine import VllmEngine

    try:
        VllmEngine(EngineSpec(model, "bfloat16", 256, None, 60.0, gpu_memory_utilization=share))
    except Exception as error:  # noqa: BLE001 - whatever vLLM raises is what is looked at
        return f"{type(error).__name__}: {error}"
    finally:
        del kept
    return ""


@only_gpu
def test_an_engine_without_room_is_told_in_a_sentence(tmp_path: Path) -> None:
    said = alone(_crowded, str(make_tiny_model(tmp_path / "model")), 0.5)
    assert explained("rollout[0]", "starting", said) is not None


def _sizes(model: str) -> tuple[int, int]:
    from vllm.engine.arg_utils import EngineArgs

    from raytune_rl.protocol.rollout import EngineSpec
    from raytune_rl.workers.vllm_args import engine_args, usage_context

    made = EngineArgs(**engine_args(EngineSpec(model, "bfloat16", 256, None, 60.0))).create_engine_config(
        usage_context()
    )
    return made.scheduler_config.max_num_seqs, made.scheduler_config.max_num_batched_tokens


@only_gpu
def test_vllm_computes_as_much_at_a_time_as_offline(tmp_path: Path) -> None:
    seqs, tokens = alone(_sizes, str(make_tiny_model(tmp_path / "model")))
    assert seqs >= 256
    assert tokens >= 8192
