"""vLLM's CUDA platform without a GPU: what its platform interface would ask a driver is answered here.

Everything above that interface is vLLM's own: `EngineArgs.create_engine_config` takes, refuses and defaults
as it does on a GPU. To be imported in a process of its own, before vLLM.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

GIB = 2**30
KERNELS = ("vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm._moe_C_stable_libtorch")
"""Compiled parts that are not in a CPU's wheel."""
QUESTIONS = (
    "cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8", "cutlass_group_gemm_supported",
    "cutlass_scaled_mm_supports_fp4",
)  # fmt: skip
"""What they are asked as vLLM's layers are imported; the answer here is no."""


class NoKernels(ModuleType):
    """A module whose functions can be imported, and say no."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def pretend(gpus: int = 8, memory_gib: int = 80, capability: tuple[int, int] = (9, 0)) -> None:
    """Makes vLLM believe in so many GPUs of an H100's kind."""
    for name in KERNELS:
        sys.modules[name] = ModuleType(name)
    sys.modules["vllm.vllm_flash_attn"] = NoKernels("vllm.vllm_flash_attn")
    answers = torch.library.Library("_C", "FRAGMENT")
    for name in QUESTIONS:
        answers.define(f"{name}(int capability) -> bool")
        answers.impl(name, lambda capability: False, "CompositeImplicitAutograd")
    globals()["_answers"] = answers  # they last as long as this does
    import vllm.platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class Pretended(cuda.NonNvmlCudaPlatform):  # type: ignore[misc, name-defined]
        def is_cumem_allocator_available(self) -> bool:
            return True

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return memory_gib * GIB

        @classmethod
        def device_count(cls) -> int:
            return gpus

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True

        @classmethod
        def get_cuda_runtime_major(cls) -> int:
            return 13

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    torch.cuda.device_count = lambda: gpus
    vllm.platforms.current_platform = Pretended()
