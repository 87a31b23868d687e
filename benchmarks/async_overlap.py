"""How much of the time that sampling and training could go on side by side they do.

The controller is the product's: `pipelines.online` with its collectors, buffer and log. Engines and trainer
sleep for scripted times behind the interfaces of the real ones: the cores of one small machine cannot
overlap what needs them all. That the real ones are trained right is held by tests, not here. An engine
samples `--slots` completions at once, a token of each in a fixed time; the trainer takes as long as the
engines do on average.

The limit is the slower side alone: the trainer's seconds, or the tokens of a step by the engine's slots. A
bound of k keeps long tails from it: a completion of L seconds that is asked under version v must be there
when version v + k trains, so where each generation has such a one, steps take (L + T) / (k + 1) at least, T
being the trainer's seconds. With equal lengths k = 1 reaches the limit; the longer the tail, the larger a k
it takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.forced_rollout import long_tailed
from benchmarks.scripted import SleepingFleet, SleepingTrainer, groups_of, prompt_set
from benchmarks.table import machine, render
from raytune_rl.config import RLHFConfig
from raytune_rl.config.batching import grpo_schedule_of
from raytune_rl.pipelines import lifecycle
from raytune_rl.pipelines.lifecycle import Run
from raytune_rl.pipelines.online import OnlineRun
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.pipelines.online_data import OnlineData
from raytune_rl.pipelines.resume_point import open_run
from raytune_rl.pipelines.run_state import RunState

MEAN, LONGEST = 64, 512
WARMUP = 4
LOAD_S = 0.01
"""Of new weights; not part of the limit."""


@dataclass(frozen=True)
class Script:
    """Lengths of completions in tokens, one of which each seed chooses."""

    name: str
    lengths: tuple[int, ...]

    def length(self, seed: int) -> int:
        return self.lengths[seed % len(self.lengths)]


SCRIPTS = (Script("equal", (MEAN,)), Script("long-tailed", tuple(long_tailed(997, MEAN, LONGEST))))


def step_seconds(
    script: Script, staleness: int, options: argparse.Namespace, scratch: Path
) -> tuple[float, float]:
    """Seconds of a step on average, once the engines are ahead, and CPU-seconds of this process for it."""
    config = RLHFConfig(
        model="m",
        dataset="d",
        reward_funcs="accuracy",
        train_type="full",
        beta=0,
        num_generations=options.generations,
        per_device_train_batch_size=options.prompts * options.generations,
        max_steps=WARMUP + staleness + options.steps + 1,
        save_strategy="no",
        logging_steps=1000,
        max_logp_gap=0,
        report_to="none",
        async_generate=staleness > 0,
        max_staleness=max(staleness, 1),
        output_dir=str(scratch / f"{script.name}-{staleness}"),
    )
    begun: list[tuple[float, float]] = []
    fleet = SleepingFleet(options.slots, options.token_s, script.length, LOAD_S)
    trainer = SleepingTrainer(MEAN * options.token_s, begun)
    algorithm = algorithm_of(config)
    prompts = prompt_set(options.prompts * config.max_steps)
    schedule = grpo_schedule_of(config, 1, len(prompts))
    with open_run(config) as resume_point:
        run = Run(config, resume_point, schedule.total_steps, best_by="eval_reward", greater_is_better=True)
        actors = groups_of(config, fleet, trainer)
        data = OnlineData(prompts, None, schedule, max_model_len=0)
        online = OnlineRun(config, algorithm, data, run, RunState(), actors)
        with run.watched():
            online.train()
    first = WARMUP + staleness
    steps = len(begun) - 1 - first
    seconds, cpu = (last - then for last, then in zip(begun[-1], begun[first], strict=True))
    return seconds / steps, cpu / steps


def limit_seconds(script: Script, options: argparse.Namespace) -> float:
    """Of a step of the slower side alone."""
    completions = options.prompts * options.generations
    mean = sum(script.lengths) / len(script.lengths)
    return max(MEAN, completions * mean / options.slots) * options.token_s


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="benchmarks/async_overlap.py",
    )
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each (default 20)")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="values of k")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step (default 8)")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt (default 8)")
    parser.add_argument("--slots", type=int, default=64, help="completions sampled at once (default 64)")
    parser.add_argument("--token_s", type=float, default=0.02, help="seconds of a token (default 0.02)")
    parser.add_argument("--markdown", action="store_true", help="print the table ready to paste")
    return parser.parse_args(argv)


def main() -> None:
    """Measures all and prints a table."""
    options = parse()
    lifecycle.write_plots = lambda *args, **kwargs: []
    rows = []
    with tempfile.TemporaryDirectory(prefix="raytune_rl_benchmark_") as scratch:
        for script in SCRIPTS:
            limit = limit_seconds(script, options)
            synchronous = None
            for staleness in options.staleness:
                seconds, cpu = step_seconds(script, staleness, options, Path(scratch))
                synchronous = seconds if staleness == 0 else synchronous
                rows.append(
                    [
                        script.name,
                        str(staleness),
                        f"{seconds:.3f}",
                        f"{limit:.3f}",
                        f"{limit / seconds:.0%}",
                        "" if synchronous is None else f"{synchronous / seconds:.2f}",
                        f"{cpu * 1e3:.0f}",
                    ]
                )
    print(f"\n{options.steps} steps of {options.prompts * options.generations} completions each; ", end="")
    print("engines and trainer sleep for scripted times, the controller is the product's")
    print(machine() + "\n")
    header = ["lengths", "k", "step s", "limit s", "of the limit", "times k = 0", "CPU ms a step"]
    print(render(header, rows, options.markdown))


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"\n{time.monotonic() - started:.0f} s in all")
