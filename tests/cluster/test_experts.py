"""An adapter on the experts of a mixture, as a user has it: trained, tried, merged and tried again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from raytune_rl import cli
from tests.cluster.conftest import Tiny
from tests.cluster.test_infer import Greedy
from tests.families.recipes import make_family

pytestmark = [pytest.mark.cluster, pytest.mark.variants, pytest.mark.timeout(600)]

STEPS = 60


def test_it_is_trained_tried_merged_and_tried(
    cluster: None, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_family("qwen3_moe", tmp_path / "model", tied=False)
    words = [
        "sft", "--model", str(model), "--dataset", str(tiny.data.sft), "--lora_dropout", "0",
        "--target_parameters", "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
        "--router_aux_loss_coef", "0.01", "--max_steps", str(STEPS), "--logging_steps", "10",
        "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1",
        "--learning_rate", "1e-2", "--output_dir", str(tmp_path / "out"), "--report_to", "none",
    ]  # fmt: skip
    assert cli.main(words) == 0
    (run,) = (tmp_path / "out").iterdir()
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 3, losses
    adapter = run / f"checkpoint-{STEPS}"
    moved = {name for name, t in load_file(adapter / "adapter_model.safetensors").items() if t.abs().max()}
    assert any(".experts." in name and "lora_B" in name for name in moved), moved

    asks = ["--val_dataset", f"{tiny.data.sft}#12", "--max_new_tokens", "24", "--temperature", "0"]
    assert cli.main(["infer", "--adapters", str(adapter), *asks]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "parameters as targets (target_parameters), which vLLM does not serve: merging it" in said
    assert cli.main(["export", "--adapters", str(adapter), "--merge_lora", "true"]) == 0
    merged = run / f"checkpoint-{STEPS}-merged"
    assert cli.main(["infer", "--model", str(merged), *asks]) == 0

    questions = [json.loads(line)["messages"][0]["content"] for line in tiny.data.sft.open(encoding="utf-8")]
    greedy = Greedy(adapter, None)
    expected = [greedy(question) for question in questions[:12]]
    for folder in (adapter, merged):
        (path,) = (folder / "infer_result").glob("*.jsonl")
        assert [json.loads(line)["response"] for line in path.open(encoding="utf-8")] == expected
    assert expected[0] != greedy(questions[0], adapter=False), "the adapter is served"
