import math

import numpy as np
import pytest
from PIL import Image

from raytune_rl.tracking.logger import RunLogger
from raytune_rl.tracking.plots import file_name, read_scalars, smooth, write_plots
from raytune_rl.tracking.run_dir import RunDir

BLUE, ORANGE = (0x1F, 0x5A, 0x96), (0xC2, 0x57, 0x1A)


def log_run(run: RunDir, steps: int, held_out: bool) -> None:
    with RunLogger(run, "none", steps) as log:
        for step in range(1, steps + 1):
            loss = math.nan if step == 3 else 1.0 / step
            log.log(step, {"loss": loss, "reward": step / steps, "learning_rate": 1e-5})
            if held_out and step % 5 == 0:
                log.log(step, {"eval_reward": step / steps})
        log.close({"global_step": steps, "best_metric": 0.5})


def pixels(path: object, colour: tuple[int, int, int]) -> int:
    image = np.asarray(Image.open(str(path)).convert("RGB")).astype(int)
    return int((np.abs(image - colour).max(axis=-1) < 12).sum())


def test_one_picture_a_scalar(run: RunDir) -> None:
    log_run(run, 20, held_out=True)
    names = {path.name for path in write_plots(run)}
    assert names == {
        "train_loss.png",
        "train_reward.png",
        "train_learning_rate.png",
        "train_train_speed_s_it.png",
        "eval_reward.png",
    }
    assert {path.name for path in run.images.iterdir()} == names, "no half-written picture stays"


@pytest.mark.parametrize("held_out", [True, False])
def test_the_reward_picture_shows_held_out_points_where_there_are_any(run: RunDir, held_out: bool) -> None:
    log_run(run, 20, held_out)
    (picture,) = write_plots(run, only=["reward"])
    assert pixels(picture, BLUE) > 200
    assert (pixels(picture, ORANGE) > 100) is held_out


def test_a_run_without_a_log_has_no_pictures(run: RunDir) -> None:
    assert write_plots(run) == []


def test_scalars_are_read_with_gaps_and_without_text(run: RunDir) -> None:
    log_run(run, 4, held_out=False)
    series = read_scalars(run)
    assert series.keys() == {"loss", "reward", "learning_rate", "train_speed(s/it)"}
    assert series["loss"].steps == (1, 2, 3, 4)
    assert series["loss"].values[:2] == (1.0, 0.5)
    assert math.isnan(series["loss"].values[2])


def test_smoothing_is_unbiased_at_the_start_and_skips_nan() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    result = smooth([1.0, math.nan, 2.0], weight=0.5)
    assert result[0] == 1.0
    assert math.isnan(result[1])
    assert result[2] == pytest.approx((0.25 * 1.0 + 0.5 * 2.0) / 0.75)


def test_names_become_file_names() -> None:
    assert file_name("rewards/accuracy/mean") == "train_rewards_accuracy_mean"
    assert file_name("eval_rewards/../x") == "eval_rewards_.._x"
