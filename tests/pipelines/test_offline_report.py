"""The plan of a run on preferences, and what it refuses."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from raytune_rl.config import PreferenceConfig
from raytune_rl.config.batching import sft_schedule_of
from raytune_rl.errors import ConfigError
from raytune_rl.groups.sizes import offline_groups
from raytune_rl.models.load import load_tokenizer
from raytune_rl.pipelines.lifecycle import ResumePoint
from raytune_rl.pipelines.objective import preference
from raytune_rl.pipelines.offline_report import plan_of, with_margin
from raytune_rl.prepare.judges import check_vocabulary
from raytune_rl.protocol.data import Account, SourceCounts, TokenSet
from raytune_rl.runtime.cluster import ClusterInfo
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.tracking.run_dir import RunDir


def plan(tmp_path: Path, rows: int, values: dict[str, Any], **settings: Any) -> str:
    config = PreferenceConfig(model="m", dataset="d", **settings)
    objective = preference(config)
    account = Account((SourceCounts("d", rows // 2, 0, rows // 2),), {}, None, (), None, ())
    lengths = np.arange(rows, dtype=np.int64) + 10
    data = TokenSet(None, lengths, lengths // 2, account, values)
    cluster = ClusterInfo(True, "10.0.0.1:6379", {"10.0.0.1": {"CPU": 2.0}}, 0, has_gpus=False)
    resume_point = ResumePoint(RunDir(tmp_path), None, {}, ())
    made = plan_of(
        config,
        objective,
        offline_groups(config, cluster),
        sft_schedule_of(config, 1, rows // 2),
        data,
        None,
        resume_point,
        cluster,
        [],
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(made.render())
    return console.export_text()


def test_pairs_are_counted_as_pairs(tmp_path: Path) -> None:
    said = plan(
        tmp_path, 8, {}, rlhf_type="dpo", per_device_train_batch_size=2, gradient_accumulation_steps=1
    )
    assert "DPO on m, lora" in said
    assert "4 pairs" in said
    assert "2 pairs" in said
    assert "108, of which 52 are trained on" in said
    assert "the model before its first step; its log-probs are taken once" in said
    assert "reference" not in plan(tmp_path, 8, {}, rlhf_type="simpo")
    assert "r with a; its log-probs" in plan(
        tmp_path, 8, {}, rlhf_type="dpo", ref_model="r", ref_adapters="a"
    )


def test_when_checkpoints_are_written_is_told(tmp_path: Path) -> None:
    """4 pairs, 2 a step."""
    small = {"rlhf_type": "dpo", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    assert "500 steps and at the end" in plan(tmp_path, 8, {}, **small)
    whole = plan(tmp_path, 8, {}, save_strategy="epoch", max_steps=2, **small)
    assert "epoch (2 steps) and at the end" in whole
    assert "first epoch" not in whole
    short = plan(tmp_path, 8, {}, save_strategy="epoch", max_steps=1, **small)
    assert "--save_strategy epoch: the run ends after 1 of the 2 steps of its first epoch" in short
    short = plan(tmp_path, 8, {}, eval_strategy="epoch", split_dataset_ratio=0.5, max_steps=1, **small)
    assert "--eval_strategy epoch: the run ends after 1 of the 2 steps" in short


def test_rows_of_kto_are_counted_without_their_counterparts(tmp_path: Path) -> None:
    labels = {"label": np.repeat([1.0, 0.0, 1.0, 1.0], 2)}
    said = plan(tmp_path, 8, labels, rlhf_type="kto")
    assert "4 rows" in said
    assert "52, of which 26 are trained on" in said
    assert "3 desirable, 1 undesirable" in said
    assert "nothing to tell apart" not in said
    assert "nothing to tell apart" in plan(tmp_path, 8, {"label": np.ones(8)}, rlhf_type="kto")


def test_a_lead_is_worked_out_where_rows_are_no_pairs() -> None:
    assert with_margin({"rewards/chosen": 2.0, "rewards/rejected": -1.0})["rewards/margins"] == 3.0
    assert (
        with_margin({"rewards/chosen": 2.0, "rewards/rejected": 0.0, "rewards/margins": 9.0})[
            "rewards/margins"
        ]
        == 9.0
    )
    assert with_margin({"rewards/chosen": 2.0}) == {"rewards/chosen": 2.0}


def test_a_reference_must_mean_the_same_by_a_token(tmp_path: Path) -> None:
    config = PreferenceConfig(model="m", dataset="d", ref_model="r")
    own = load_tokenizer(make_tiny_model(tmp_path / "own", hidden=64, layers=1))
    check = partial(check_vocabulary, model=str(tmp_path / "own"), config=config, flag="--ref_model")
    check(own)
    more = load_tokenizer(tmp_path / "own")
    more.add_tokens(["<another>"])
    with pytest.raises(ConfigError, match="<another>"):
        check(more)
    settings = tmp_path / "own" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"vocab_size": 520}))
    check(more)  # its embedding has an empty place for it
    other = load_tokenizer(tmp_path / "own")
    other.add_tokens(["<different>"])
    other.save_pretrained(tmp_path / "own")
    check(own)  # it may know more
    with pytest.raises(ConfigError, match=r"another vocabulary .* '<another>', number"):
        check(more)
