"""Who has no GPU sees none, and a user's NCCL settings reach every worker."""

from __future__ import annotations

import pytest

from raytune_rl.runtime.device_env import ALL_SEEN, PINNED, one_device, pinned_as_asked, worker_env
from raytune_rl.workers.rollout import rollout_env
from raytune_rl.workers.trainer import trainer_env


def test_who_has_no_gpu_sees_none() -> None:
    assert worker_env({}, 0, {"CUDA_VISIBLE_DEVICES": "0,1"}) == {"CUDA_VISIBLE_DEVICES": ""}
    assert worker_env({}, 0.3, {"CUDA_VISIBLE_DEVICES": "0,1"}) == {ALL_SEEN: "0"}  # Ray's to say


def test_a_rank_computes_on_one_gpu_whatever_it_is_called() -> None:
    assert one_device({"CUDA_VISIBLE_DEVICES": "3,5"}) == {"CUDA_VISIBLE_DEVICES": "3"}
    assert one_device({"CUDA_VISIBLE_DEVICES": "GPU-8f3a,GPU-11c0"}) == {"CUDA_VISIBLE_DEVICES": "GPU-8f3a"}
    for alone in ({}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "MIG-77"}):
        assert one_device(alone) == {}


def test_a_shells_settings_for_libraries_are_passed_on_and_nothing_else() -> None:
    shell = {
        "NCCL_SOCKET_IFNAME": "eth0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_API_KEY": "k", "HF_TOKEN": "t",
    }  # fmt: skip
    assert worker_env({"NCCL_DEBUG": "WARN"}, 1, {**shell, "NCCL_DEBUG": "INFO"}) == {
        "NCCL_SOCKET_IFNAME": "eth0", "VLLM_USE_V2_MODEL_RUNNER": "0", "NCCL_DEBUG": "WARN",
        ALL_SEEN: "0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": PINNED}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:True,{PINNED}"},
        ),
        (
            {"PYTORCH_ALLOC_CONF": "pinned_max_round_threshold_mb:64"},
            {"PYTORCH_ALLOC_CONF": "pinned_max_round_threshold_mb:64"},
        ),
    ],
)
def test_pinned_memory_is_not_rounded_up(shell: dict[str, str], expected: dict[str, str]) -> None:
    assert pinned_as_asked(shell) == expected


def test_what_trains_and_samples_on_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "VLLM_USE_FLASHINFER_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    assert trainer_env(1, on_gpu=True)["PYTORCH_CUDA_ALLOC_CONF"] == PINNED
    assert trainer_env(1, on_gpu=False)["DS_ACCELERATOR"] == "cpu"
    env = rollout_env(1, 2, on_gpu=True, start_timeout_s=1200.5)
    assert env["VLLM_ENGINE_READY_TIMEOUT_S"] == "1201"
    assert env["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert rollout_env(1, 2, on_gpu=True)["VLLM_USE_FLASHINFER_SAMPLER"] == "1"
