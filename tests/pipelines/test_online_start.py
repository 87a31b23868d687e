"""Errors in rewards and losses are reported before Ray is asked for anything or a folder is made."""

from pathlib import Path
from typing import Any

import pytest
import ray

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError, RewardError
from raytune_rl.pipelines import online


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reward_funcs": "acuracy"}, RewardError, r"`acuracy`\. Did you mean accuracy"),
        ({"external_plugins": "broken.py"}, RewardError, r"broken\.py:2: ZeroDivisionError"),
        ({"external_plugins": "absent.py"}, RewardError, r"there is no file .*absent\.py"),
        ({"reward_funcs": "soft_overlong", "soft_cache_length": 600}, RewardError, "between 1 and 511"),
        ({"external_plugins": "fine.py", "loss_type": "mine"}, ConfigError, "no loss is named 'mine'"),
    ],
)
def test_nothing_was_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("import math\nmath.log(1) / 0\n")
    Path("fine.py").write_text("")
    was_running = ray.is_initialized()
    base = {"model": "m", "dataset": "d", "reward_funcs": "accuracy", "num_generations": 2}
    with pytest.raises(error, match=message):
        online.run(RLHFConfig(**{**base, **settings, "output_dir": "out"}))
    assert not Path("out").exists()
    assert ray.is_initialized() == was_running
