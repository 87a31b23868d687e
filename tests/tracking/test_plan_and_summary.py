import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from raytune_rl.tracking.plan import GenerationPlan, GroupPlan, RunPlan, Section
from raytune_rl.tracking.summary import Change, PromptCounts, RunSummary

GENERATION = GenerationPlan(
    prompts_per_generation=8,
    completions_per_prompt=4,
    optimizer_steps_per_generation=2,
    optimizer_steps=101,
    max_prompt_tokens=None,
    max_completion_tokens=512,
)
SUMMARY = RunSummary(
    title="GRPO on tiny",
    status="finished",
    steps=100,
    total_steps=100,
    seconds=372.0,
    output_dir=Path("out/v0"),
    changes={"reward (held out)": Change(0.75, 0.25)},
    prompts=PromptCounts(10, 6, {"zero variance": 2}, {"time-out": 1, "engine died": 1}),
    quarantined=3,
    reward_failures={"accuracy": 4},
    weight_versions=101,
    max_logp_gap=2e-5,
    last_checkpoint=Path("out/v0/checkpoint-100"),
    next_commands={"resume": "raytune-rl rlhf --resume_from_checkpoint " + "x" * 120},
)


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_plan_does_the_arithmetic() -> None:
    assert GENERATION.completions_per_generation == 32
    assert GENERATION.token_budget == 32 * 512
    assert GENERATION.generations == 51, "the last, half-used generation is generated too"
    text = " ".join(value for _, value in GENERATION.section().rows)
    for part in ("8 prompts x 4 = 32 completions", "16,384", "no limit", "101 (2 a generation)", "1,632"):
        assert part in text


def test_the_plan_shows_groups_totals_and_notices() -> None:
    groups = [
        GroupPlan("policy", 4, 2, 1, "4 per node", "DeepSpeed ZeRO-2"),
        GroupPlan("rollout", 2, 1, 0.5, "with policy"),
    ]
    plan = RunPlan(
        "GRPO", groups, [Section("Output", [("directory", "/tmp/[bold]x[/nonsense]")])], ["a notice"]
    )
    buffer = io.StringIO()
    Console(file=buffer, width=120, color_system=None).print(plan.render())
    text = words(buffer.getvalue())
    assert "policy 4 2 1 4 per node DeepSpeed ZeRO-2" in text
    assert "rollout 2 1 0.5 with policy" in text
    assert "in all 6 10 5" in text
    assert "directory /tmp/[bold]x[/nonsense]" in text
    assert "Note: a notice" in text


def test_the_summary_tells_what_became_of_everything() -> None:
    text = words(SUMMARY.text())
    for part in (
        "optimizer steps 100 of 100 in 6m 12s",
        "reward (held out) 0.75 -> 0.25 (-0.5)",
        "prompts dispatched 10 finished 6 filtered 2 (2 zero variance) failed 2 (1 engine died, 1 time-out)",
        "rows quarantined 3",
        "reward failures 4 (4 accuracy)",
        "weight versions 101",
        "largest log-prob gap 2.00e-05",
        "last checkpoint out/v0/checkpoint-100",
    ):
        assert part in text
    assert "UNACCOUNTED" not in text


def test_prompts_that_do_not_add_up_are_shouted_about() -> None:
    lost = PromptCounts(10, 6, {"zero variance": 2}, {})
    assert lost.unaccounted == 2
    assert "UNACCOUNTED FOR 2" in words(replace(SUMMARY, prompts=lost).text())
    assert PromptCounts(1, 2).unaccounted == -1


def test_commands_are_not_wrapped() -> None:
    assert "    raytune-rl rlhf --resume_from_checkpoint " + "x" * 120 in SUMMARY.text(width=80).splitlines()


def test_sft_shows_no_rl_parts() -> None:
    text = RunSummary("SFT", "interrupted", 3, 10, 1.0, Path("o"), {"loss": Change(2.0, None)}).text()
    assert "Prompts" not in text
    assert "reward" not in text
    assert "loss" in text
    assert "none was saved" in text
