"""A program: a run on a GPU that Ray only believes in. What needs no device is as on a real one: groups share
a GPU, start in turn, give weights away and take them back; models and engine compute on the CPU.

python -m tests.cluster.declared_gpu MODEL DATA OUTPUT prints the log's lines as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray

from raytune_rl.config import RLHFConfig
from raytune_rl.groups import start
from raytune_rl.groups.start_order import Part
from raytune_rl.pipelines import online
from raytune_rl.runtime.cluster import NAMESPACE

PLUGIN = """
from swift.rewards import ORM, orms

class Digits(ORM):
    def __call__(self, completions, **kwargs):
        return [sum(c.isdigit() for c in text) / 8 for text in completions]

orms["digits"] = Digits
"""


class Watched(start.Starting):
    """Says in which order the groups start."""

    def begin(self, part: Part) -> None:
        print(f"BEGIN {part.group} {list(part.ranks)}", flush=True)
        super().begin(part)

    def wait(self, part: Part) -> None:
        super().wait(part)
        print(f"READY {part.group} {list(part.ranks)}", flush=True)


def main(model: str, data: str, output: str) -> None:
    ray.init(
        address="local", num_cpus=8, num_gpus=1, namespace=NAMESPACE, include_dashboard=False,
        log_to_driver=False, object_store_memory=10**9,
    )  # fmt: skip
    plugin = Path(output).parent / "plugin.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    start.Starting = Watched  # type: ignore[misc]
    config = RLHFConfig(
        model=model, dataset=data, reward_funcs=["digits"], external_plugins=[str(plugin)], train_type="full",
        beta=0.1, torch_dtype="float32", sleep_level=0, offload_model=True, offload_optimizer=True,
        vllm_enforce_eager=True, vllm_engine_kwargs={"kv_cache_memory_bytes": 2**27}, num_generations=4,
        per_device_train_batch_size=4, max_completion_length=8, learning_rate=1e-2, max_steps=2,
        logging_steps=1, output_dir=output,
    )  # fmt: skip
    result = online.run(config)
    lines = (Path(result.run_dir) / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    print("LOG " + json.dumps([json.loads(line) for line in lines]))
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
