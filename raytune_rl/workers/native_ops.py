"""DeepSpeed's own C++ operators, none of which is used here.

As it starts on a CPU, DeepSpeed compiles a shared-memory all-reduce: for minutes, with whichever ninja is
first on PATH, and again for each other one. Only its tensor-parallel inference ever calls that
(`TorchBackend.inference_all_reduce`); training reduces through torch.distributed. Before, it runs the
compiler to probe each operator that it has. AdamW is PyTorch's.
"""

from __future__ import annotations


def leave_out_native_ops() -> None:
    """Tells DeepSpeed that this machine has none of its operators; to be called before `init_distributed`."""
    import deepspeed

    # Made on first use, by a probe of the machine, and kept: what stands here already is taken instead.
    deepspeed.ops.__compatible_ops__ = {}
