"""A run that goes on with steps of another size trains on each row of an epoch once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config.batching import SFTSchedule, grpo_batch, grpo_schedule, sft_schedule
from raytune_rl.data.sampler import BatchPlan
from raytune_rl.pipelines.position import Position, PromptDraw, generations_go_on, goes_on
from raytune_rl.pipelines.resume_point import ResumePoint
from raytune_rl.tracking.run_dir import RunDir


def schedule(rows: int, size: int, **length: Any) -> SFTSchedule:
    return sft_schedule(
        world_size=1, per_device_train_batch_size=size, gradient_accumulation_steps=1, n_rows=rows, **length
    )


def saved(step: int, **state: int) -> ResumePoint:
    return ResumePoint(RunDir(Path("run")), Path("run/checkpoint"), {"global_step": step, **state}, ())


def rows_of(rows: int, first: int, then: int, stop: int, epochs: float) -> list[list[int]]:
    """The rows of each epoch, trained on by steps of one size and, behind step `stop`, of another."""
    seen: list[list[int]] = []
    at, step, size = Position(0, 0), 0, first
    total = schedule(rows, first, num_train_epochs=epochs).total_steps
    while step < total:
        if step == stop:
            resume_point, size = saved(step, **at.state(first)), then
            at = Position.of(resume_point.state, then, rows)
            total = goes_on(schedule(rows, then, num_train_epochs=epochs), at, rows, resume_point, -1)[
                0
            ].total_steps
            stop = -1
            if step >= total:
                break
        if at.taken >= rows:
            at = Position(at.epoch + 1, 0)
        end = min(at.taken + size, rows)
        found = BatchPlan(rows, size, 7, drop_last=False).part(at.epoch, at.taken, end).tolist()
        while len(seen) <= at.epoch:
            seen.append([])
        seen[at.epoch] += found
        at, step = Position(at.epoch, end), step + 1
    return seen


@pytest.mark.parametrize(("first", "then"), [(4, 2), (2, 4), (4, 3), (3, 5), (5, 16), (4, 4)])
@pytest.mark.parametrize("rows", [16, 13])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_every_epoch_has_every_row_once(rows: int, first: int, then: int, stop: int) -> None:
    seen = rows_of(rows, first, then, stop, 3)
    assert [sorted(epoch) for epoch in seen] == [list(range(rows))] * 3


def test_part_of_an_epoch_stays_that_part() -> None:
    for first, then in ((4, 2), (2, 4)):
        seen = rows_of(16, first, then, 1, 1.5)
        assert [len(epoch) for epoch in seen] == [16, 8]


def test_what_changes_is_said(tmp_path: Path) -> None:
    resume_point = saved(2, data_epoch=0, data_taken=8, data_per_step=4)
    at = Position.of(resume_point.state, 2, 16)
    found, (notice,) = goes_on(schedule(16, 2), at, 16, resume_point, -1)
    assert found.total_steps == 6
    assert "a step takes 2 rows now and took 4 before" in notice
    assert "8 of 16 of epoch 1, and has 6 steps in all" in notice
    kept, (notice,) = goes_on(schedule(16, 2, max_steps=9), at, 16, resume_point, 9)
    assert kept.total_steps == 9
    assert "--max_steps 9 counts the steps of either size" in notice
    assert goes_on(schedule(16, 4), at, 16, resume_point, -1) == (schedule(16, 4), [])


def test_checkpoints_that_count_steps_alone_still_mean_a_place() -> None:
    assert Position.of({}, 4, 16) == Position(0, 0)
    assert Position.of({"global_step": 6}, 4, 16) == Position(1, 8)
    assert Position.of({"global_step": 8}, 4, 16) == Position(2, 0)
    assert Position.of({"global_step": 9, "window": 2, "batches_of_window": 3}, 4, 16) == Position(2, 12)


@pytest.mark.parametrize(("first", "then"), [(4, 2), (2, 4), (4, 3)])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_every_prompt_of_an_epoch_is_sampled_from_once(first: int, then: int, stop: int) -> None:
    """24 prompts fill generations of 2, 3 and 4; 8 completions each, two optimizer steps a generation."""

    def plan(size: int) -> BatchPlan:
        return BatchPlan(24, size, 7)

    def whole(size: int) -> Any:
        batch = grpo_batch(
            world_size=size, per_device_train_batch_size=4, num_generations=8, steps_per_generation=2
        )
        return grpo_schedule(batch, 24, num_train_epochs=2)

    draw = PromptDraw(plan(first), {})
    assert [draw.next() for _ in range(stop)] == [plan(first).batch(k).tolist() for k in range(stop)]
    draw, seen = PromptDraw(plan(first), {}), []
    for _ in range(stop):
        seen += draw.next()
    resume_point = saved(2 * stop, generation=stop, **draw.state())
    found, (notice,) = generations_go_on(whole(then), 24, resume_point, -1)
    assert f"a generation takes {then} prompts now and took {first} before" in notice
    draw = PromptDraw(plan(then), resume_point.state)
    for _ in range(found.total_generations - stop):
        seen += draw.next()
    assert found.total_steps == 2 * found.total_generations
    left_out = 24 - len(seen) // 2
    assert left_out <= (0 if (24 - stop * first) % then == 0 else 1)
    assert max(Counter(seen).values()) == 2


def test_generations_of_before_mean_the_same_place() -> None:
    plan = BatchPlan(10, 4, 7)
    assert PromptDraw(plan, {"generation": 3}).next() == plan.batch(3).tolist()
