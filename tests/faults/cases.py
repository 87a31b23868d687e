"""Who is lost in the matrix, at what, and how: also the README's table of what a run survives.

Every role is killed in every phase that it has a part in. What does not disturb one another is killed in one
run, one after the other: a start of the stack costs more than all that is lost in it.

python -m tests.faults.cases      # prints that table
"""

from __future__ import annotations

import signal

from tests.faults.strikes import Strike

HANG = signal.SIGSTOP
Case = tuple[str, str]
"""A role, and the phase in which it is lost."""

FIRST_RANKS: dict[Case, Strike] = {
    ("policy, rank 0", "starting"): Strike("policy", 0, "join"),
    ("critic", "starting"): Strike("critic", 1, "join"),
    ("policy, rank 0", "evaluating"): Strike("policy", 0, "evaluate", version=0),
    ("policy, rank 0", "scoring"): Strike("policy", 0, "logprobs", version=1),
    ("policy, rank 0", "training"): Strike("policy", 0, "train_step", version=2, after_s=0.03),
    ("critic", "checkpointing"): Strike("critic", 0, "save_model", version=2),
    ("policy, rank 0", "publishing"): Strike("policy", 0, "publish", version=3),
    ("policy, rank 0", "checkpointing"): Strike("policy", 0, "save_optimizer", version=4),
    ("critic", "scoring"): Strike("critic", 0, "values", version=4),
    ("critic", "training"): Strike("critic", 1, "train_step", version=5, after_s=0.03),
}
OTHERS: dict[Case, Strike] = {
    ("policy, rank 1", "starting"): Strike("policy", 1, "join"),
    ("reference", "starting"): Strike("reference", 0, "ping"),
    ("reward functions", "starting"): Strike("reward", 0, "ping"),
    ("reward model", "starting"): Strike("reward_model", 0, "ping"),
    ("rollout engine", "starting"): Strike("rollout", 0, "ping"),
    ("reward functions", "scoring"): Strike("reward", 0, "score", version=1),
    ("policy, rank 1", "training"): Strike("policy", 1, "train_step", version=1, after_s=0.03),
    ("weight store", "publishing"): Strike("weight_store", 0, "publishing", version=2),
    ("rollout engine", "generating"): Strike("rollout", 0, "run_group", version=2),
    ("policy, rank 1", "publishing"): Strike("policy", 1, "publish", version=2),
    ("reference", "scoring"): Strike("reference", 0, "logprobs", version=3),
    ("policy, rank 1", "checkpointing"): Strike("policy", 1, "save_model", version=4),
    ("weight store", "generating"): Strike("weight_store", 0, "published", version=4),
    ("reward model", "scoring"): Strike("reward_model", 0, "score", version=4),
    ("rollout engine", "publishing"): Strike("rollout", 0, "load_weights", version=5),
    ("rollout engine", "evaluating"): Strike("rollout", 0, "evaluate", version=6),
}
HANGS: dict[Case, Strike] = {
    ("policy, rank 1", "a hang"): Strike("policy", 1, "train_step", version=1, signal=HANG),
    ("critic", "a hang"): Strike("critic", 0, "train_step", version=2, signal=HANG),
    ("rollout engine", "a hang"): Strike("rollout", 0, "run_group", version=3, signal=HANG),
    ("reference", "a hang"): Strike("reference", 0, "logprobs", version=4, signal=HANG),
    ("reward functions", "a hang"): Strike("reward", 0, "score", version=4, signal=HANG),
    ("reward model", "a hang"): Strike("reward_model", 0, "score", version=5, signal=HANG),
    ("weight store", "a hang"): Strike("weight_store", 0, "publishing", version=4, signal=HANG),
}
CHAINS = {"first ranks": FIRST_RANKS, "all others": OTHERS, "hangs": HANGS}
"""The runs, by what is lost in them."""
APART: dict[str, tuple[str, ...]] = {"driver": ("starting", "training")}
"""What has a test of its own."""
PHASES = (
    "starting", "generating", "scoring", "training", "publishing", "checkpointing", "evaluating", "a hang",
)  # fmt: skip


def table() -> str:
    """Markdown: a row a role, a column a phase, a mark where a test kills it there."""
    rows: dict[str, set[str]] = {}
    for chain in CHAINS.values():
        for role, phase in chain:
            rows.setdefault(role, set()).add(phase)
    rows |= {role: set(phases) for role, phases in APART.items()}
    lines = [f"| lost | {' | '.join(PHASES)} |", f"|---|{':-:|' * len(PHASES)}"]
    for role, phases in rows.items():
        lines.append(f"| {role} | {' | '.join('x' if phase in phases else '' for phase in PHASES)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
