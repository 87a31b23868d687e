"""A program: a run whose object store is filled in the middle, but for some room, and may not use the disk in
its place.

It has a process of its own, because such a store is an own cluster's.
"""

from __future__ import annotations

import json
import sys
from functools import partialmethod
from typing import Any
from unittest import mock

import numpy as np
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import RaytuneError
from raytune_rl.pipelines import online
from raytune_rl.pipelines.online import OnlineRun
from tests.local_ray import start_ray

PIECE = 2**18
"""Bytes of an object that fills."""
ROOM = {"no room for snapshots": 1.3, "no room for weights": 0.0}
"""What is left, as a multiple of what a version of the weights takes."""


def fill(room: float) -> list[ray.ObjectRef]:
    """Fills the store but for so many bytes."""
    pieces = []
    while True:
        try:
            pieces.append(ray.put(np.zeros(PIECE, np.uint8)))
        except (ObjectStoreFullError, OutOfDiskError):
            break
    return pieces[int(room / PIECE) + 1 :] if room else pieces


def main() -> None:
    room, settings = ROOM[sys.argv[1]], json.loads(sys.argv[2])
    start_ray(
        80 * 2**20,
        _system_config={"automatic_object_spilling_enabled": False, "local_fs_capacity_threshold": 0.01},
    )
    filled: list[Any] = []
    plain = OnlineRun.train_step

    def train_step(run: Any, *args: Any) -> None:
        if run.run.step == 2:
            filled.append(fill(room * run.published.nbytes))
        plain(run, *args)

    with mock.patch.object(OnlineRun, "train_step", partialmethod(train_step)):
        try:
            online.run(RLHFConfig(**settings))
        except RaytuneError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
