"""A program: work is done on a cluster of its own, and one of Ray's own processes is killed meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import time

import ray

from raytune_rl.cli import guarded
from raytune_rl.runtime.cluster import reserve, session
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.runtime.wait import fetch_all


class Worker:
    """Works for long."""

    def work(self, seconds: float) -> None:
        time.sleep(seconds)


def main(daemon: str) -> int:
    spec = GroupSpec("rollout", 2, cpus=0.1)
    with session(), reserve([spec], 60) as slots:
        group = WorkerGroup(spec, slots["rollout"], Worker, lambda rank: {}, {}, 600)
        group.call("work", 0)
        group.replace_lost(600, lambda name, sentence: print(f"NOTE {sentence}", flush=True))
        running = [group.submit(rank, "work", 600) for rank in range(2)]
        (process,) = ray._private.worker._global_node.all_processes[daemon]
        os.kill(process.process.pid, signal.SIGKILL)
        fetch_all(running)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1])))
