"""CPU-seconds of a process and all below it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benchmarks.clock import Clock, measuring

BUSY = """
import sys, time
while time.process_time() < 0.2:
    pass
print(time.process_time(), flush=True)
sys.stdin.read()
"""


def test_a_child_counts_while_it_lives_and_when_it_is_gone() -> None:
    clock = Clock(cpu=True)
    before = clock.now()
    child = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    spent = float(child.stdout.readline()) - 0.02  # the kernel counts ticks
    assert clock.now() - before >= spent
    child.communicate()
    assert clock.now() - before >= spent


def test_one_core_inside_and_all_again_behind() -> None:
    cores, before = os.sched_getaffinity(0), dict(os.environ)
    with measuring(argparse.Namespace(cpu_seconds=True)) as clock:
        assert clock.unit == "CPU-s"
        assert len(os.sched_getaffinity(0)) == 1
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert os.environ["RAY_worker_niceness"] == "0"  # noqa: SIM112, Ray's own spelling
    assert os.sched_getaffinity(0) == cores
    assert dict(os.environ) == before
