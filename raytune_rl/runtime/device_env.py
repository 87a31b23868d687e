"""The environment by which a worker's process sees its GPUs, and no others."""

from __future__ import annotations

from collections.abc import Mapping

FORWARDED_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_")
FORWARDED = frozenset(
    {
        "FLASHINFER_WORKSPACE_BASE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
        "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT",
        "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_V2_MODEL_RUNNER",
    }
)  # fmt: skip
"""What a user sets for the libraries in the workers: the actors of a joined cluster have their nodes'
environment, not his shell's."""
ALL_SEEN = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
"""By which Ray would let a worker see all GPUs of its node."""
PINNED = "pinned_max_round_threshold_mb:1"


def worker_env(own: Mapping[str, str], gpus: float, environ: Mapping[str, str]) -> dict[str, str]:
    """A worker's environment.

    Args:
        own: What its role needs, which goes before what the user's shell has.
        gpus: GPUs that it has. A worker without any sees none: Ray 2.60 leaves CUDA_VISIBLE_DEVICES as the
            node has it (`ray/_private/utils.py`, `set_visible_accelerator_ids`). Any other sees its own and
            no more, so that device 0, and LOCAL_RANK 0, is right in each: also where a node's environment
            tells Ray to leave the variable alone.
        environ: The driver's.
    """
    given = {
        name: value
        for name, value in environ.items()
        if name.startswith(FORWARDED_PREFIXES) or name in FORWARDED
    }
    return {**given, **own, **({ALL_SEEN: "0"} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}


def pinned_as_asked(environ: Mapping[str, str]) -> dict[str, str]:
    """Pinned host memory of the size that is asked for: torch rounds up to a power of two, by which 14 GiB
    become 27 (`ATen/core/CachingHostAllocator.h`). What the user has set stays.
    """
    name = next((n for n in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if environ.get(n)), None)
    if name is None:
        return {"PYTORCH_CUDA_ALLOC_CONF": PINNED}
    given = environ[name]
    return {name: given if "pinned_max_round_threshold_mb" in given else f"{given},{PINNED}"}


def one_device(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a rank that was given several GPUs, before CUDA is asked for any: it computes on the
    first, but NCCL would take the one with its rank's number for a barrier.
    """
    first, *others = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": first} if others else {}
