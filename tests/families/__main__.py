"""Prints, for every family, how far the engine's log-probs are from the policy's after three weight versions.

python -m tests.families [FAMILY[:MODE] ...] [--modes full merged adapter experts] [--out FILE.jsonl]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytune_rl.workers.rollout import rollout_env

os.environ |= {
    **rollout_env(1, 1, on_gpu=False),
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # the cluster's token would not reach processes beside it
    "DS_ACCELERATOR": "cpu",
    "TQDM_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # before anything below is imported

import ray

from tests.families.recipes import ALWAYS_TIED, FAMILIES, make_family
from tests.families.sync import Job, measure

MODES = ("full", "merged", "adapter")
HEADS = {"full": ("tied", "untied"), "merged": ("tied",), "adapter": ("untied",), "experts": ("untied",)}
LIMIT_S = 300
FORK = multiprocessing.get_context("fork")  # what is imported here is not imported again in each


def main(argv: Sequence[str] | None = None) -> int:
    """Returns how many could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY[:MODE]")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=[*MODES, "experts"])
    parser.add_argument("--heads", nargs="+", choices=["tied", "untied"], help="not set: as HEADS has them")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(argv)
    jobs = [
        Job(family, head == "tied", mode)
        for family, _, one in (item.partition(":") for item in asked.families)
        for mode in ([one] if one else asked.modes)
        for head in heads(family, asked.heads or HEADS[mode])
    ]
    receiver, sender = FORK.Pipe(duplex=False)
    cluster = FORK.Process(target=_cluster, args=(sender,))
    cluster.start()
    lost = 0
    try:
        if not receiver.poll(LIMIT_S):
            sys.exit("Ray did not start")
        address = receiver.recv()
        with tempfile.TemporaryDirectory() as folder:
            for job in jobs:
                found = _in_a_process(job, Path(folder), address)
                lost += "gaps" not in found
                line = {"family": job.family, "tied": job.tied, "asked": job.mode, **found}
                print(_sentence(job, found), flush=True)
                if asked.out is not None:
                    with asked.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
    finally:
        cluster.terminate()
        cluster.join()
    return lost


def heads(family: str, asked: Sequence[str]) -> list[str]:
    """Those of the kinds asked for that the family's checkpoints have; at least one."""
    if family in ALWAYS_TIED:
        return ["tied"]
    return list(asked)


def _sentence(job: Job, found: dict[str, Any]) -> str:
    if "gaps" not in found:
        return f"{job.name:32} {found['error']}"
    gaps = "  ".join(f"{gap:8.1e}" for gap in found["gaps"])
    return f"{job.name:32} {found['mode']:8} {found['dtype']:9} {gaps}"


def _cluster(sender: Any) -> None:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=400 * 2**20,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    sender.send(ray.get_runtime_context().gcs_address)
    multiprocessing.Event().wait()


def _in_a_process(job: Job, folder: Path, address: str) -> dict[str, Any]:
    """One engine a process: vLLM holds one for as long as its process lives."""
    receiving, sending = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_child, args=(job, folder, address, sending))
    child.start()
    sending.close()
    try:
        if not receiving.poll(LIMIT_S):
            return {"error": f"no answer in {LIMIT_S} s"}
        return receiving.recv()
    except EOFError:
        return {"error": "the process ended"}
    finally:
        child.kill()
        child.join()


def _child(job: Job, folder: Path, address: str, sending: Any) -> None:
    log = os.open(folder / f"{job.name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        model = make_family(job.family, folder / f"{job.family}-{job.tied}", tied=job.tied)
        sending.send(measure(job, model, address))
    except BaseException as error:  # noqa: BLE001
        trace = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(trace.filename).name}:{trace.lineno}"
        sending.send({"error": f"{type(error).__name__} ({where}): {str(error).splitlines()[:1]}"})
    os._exit(0)  # vLLM and Ray would wait for each other


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
