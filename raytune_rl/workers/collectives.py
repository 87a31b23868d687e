"""How long ranks wait for each other."""

from __future__ import annotations

from datetime import timedelta


def limit_collectives(seconds: float) -> None:
    """Sets the limit of every process group of this process, those included that a library made with
    PyTorch's own (600 s with NCCL): the user's limit on a call is then the only one.

    PyTorch has no public way to do so after a group is made.
    """
    from torch import distributed
    from torch.distributed import distributed_c10d

    if not distributed.is_initialized():
        return
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
