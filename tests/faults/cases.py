"""Who is lost in the matrix, at what, and how: also the README's table of what a run survives.

python -m tests.faults.cases      # prints that table
"""

from __future__ import annotations

import signal

from tests.faults.strikes import Strike

HANG = signal.SIGSTOP
GRPO = {
    "policy, rank 0": {
        "starting": Strike("policy", 0, "join"),
        "scoring": Strike("policy", 0, "logprobs", nth=2),
        "training": Strike("policy", 0, "train_step", nth=3),
        "publishing": Strike("policy", 0, "publish", nth=3),
        "checkpointing": Strike("policy", 0, "save_optimizer"),
        "evaluating": Strike("policy", 0, "publish", nth=2, after_s=0.5),
    },
    "policy, rank 1": {
        "starting": Strike("policy", 1, "join"),
        "training": Strike("policy", 1, "train_step", nth=2),
        "a hang": Strike("policy", 1, "train_step", nth=2, signal=HANG),
        "publishing": Strike("policy", 1, "publish", nth=2),
        "checkpointing": Strike("policy", 1, "save_model"),
    },
    "reference": {
        "starting": Strike("reference", 0, "ping"),
        "scoring": Strike("reference", 0, "logprobs", nth=2),
    },
    "reward functions": {
        "starting": Strike("reward", 0, "ping"),
        "scoring": Strike("reward", 0, "score", nth=3),
    },
    "rollout engine": {
        "generating": Strike("rollout", 0, "run_group", nth=10),
        "publishing": Strike("rollout", 0, "load_weights", nth=2),
        "a hang": Strike("rollout", 0, "run_group", nth=10, signal=HANG),
    },
}
PPO = {
    "critic": {
        "starting": Strike("critic", 1, "join"),
        "scoring": Strike("critic", 0, "values", nth=2),
        "training": Strike("critic", 1, "train_step", nth=2),
        "a hang": Strike("critic", 0, "train_step", nth=3, signal=HANG),
        "checkpointing": Strike("critic", 0, "save_model"),
    },
}
APART = {
    "moving reference": ("scoring",),
    "weight store": ("publishing", "generating", "a hang"),
    "driver": ("training",),
}
"""What has a test of its own."""
PHASES = (
    "starting", "generating", "scoring", "training", "publishing", "checkpointing", "evaluating", "a hang",
)  # fmt: skip


def table() -> str:
    """Markdown: a row a role, a column a phase, a mark where a test kills it there."""
    rows = {role: tuple(phases) for role, phases in {**GRPO, **PPO}.items()} | APART
    lines = [f"| lost | {' | '.join(PHASES)} |", f"|---|{':-:|' * len(PHASES)}"]
    for role, phases in rows.items():
        lines.append(f"| {role} | {' | '.join('x' if phase in phases else '' for phase in PHASES)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
