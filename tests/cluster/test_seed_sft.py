"""The document's SFT commands for language models, run for real; only model, data and size are replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_rl import cli
from tests.cluster.conftest import Tiny
from tests.data.seed_commands.extract import seed_commands, smaller

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
COMMANDS = {c.name: c for c in seed_commands() if c.command == "sft" and "-llm-" in c.name}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "rows", "workers"),
    [pytest.param("sft-llm-1gpu", 40, 1, marks=pytest.mark.variants), ("sft-llm-8gpu", 70, 2)],
)
def test_the_command_trains(
    cluster: None,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    rows: int,
    workers: int,
) -> None:
    command = COMMANDS[name]
    words = smaller(
        command,
        {
            "--model": [str(tiny.tied)],
            "--dataset": [f"{tiny.data.sft}#{rows}"],
            "--output_dir": [str(tmp_path / "output")],
        },
    )
    for variable, value in command.environ.items():
        small = {"NPROC_PER_NODE": str(workers), "CUDA_VISIBLE_DEVICES": ",".join("01"[:workers])}
        monkeypatch.setenv(variable, small.get(variable, value))
    assert cli.main(["sft", *words]) == 0
    said = capsys.readouterr()
    assert "flash_attn needs a GPU: sdpa is used here" in said.out + said.err
    assert "bfloat16" in said.out
    if workers > 1:
        assert "NPROC_PER_NODE=2 is read as --policy_workers 2" in said.out + said.err

    (run,) = (tmp_path / "output").iterdir()
    per_step = workers * 16  # --per_device_train_batch_size 1 --gradient_accumulation_steps 16
    steps = -(-rows // per_step)
    found = lines(run)
    assert found[-1]["global_step"] == steps
    losses = [line["loss"] for line in found if "loss" in line]
    assert 4 < losses[0] < 8, "a fresh model knows nothing: about ln(512)"
    args = json.loads((run / "args.json").read_text())
    asked = {"lora_rank": 8, "lora_alpha": 32, "learning_rate": 1e-4, "torch_dtype": "bfloat16"}
    assert {key: args[key] for key in asked} == asked
    assert (args["deepspeed"], args["policy_workers"]) == (("zero2", 2) if workers > 1 else (None, 1))

    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained(run / f"checkpoint-{steps}")


def test_packed_rows_resume_in_the_middle_of_an_epoch(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    """64 rows of some 30 tokens in packs of 128: the checkpoint of step 4 lies inside the first epoch."""
    words = [
        "sft", "--model", str(tiny.tied), "--dataset", str(tiny.data.sft), "--packing", "true",
        "--max_length", "128", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
        "--max_steps", "13", "--save_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-3",
        "--lora_dropout", "0.1", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    assert cli.main(words) == 0
    (run,) = tmp_path.iterdir()
    straight = {line["global_step/max_steps"]: line for line in lines(run) if "loss" in line}
    assert len(straight) == 13
    assert straight["13/13"]["epoch"] > 1 > straight["4/13"]["epoch"]
    assert straight["13/13"]["loss"] < straight["1/13"]["loss"]

    assert cli.main([*words, "--resume_from_checkpoint", str(run / "checkpoint-4")]) == 0
    again = {line["global_step/max_steps"]: line for line in lines(run) if "loss" in line}
    for name in ("loss", "grad_norm", "learning_rate", "token_acc"):
        assert [again[s][name] for s in again] == [straight[s][name] for s in straight], name
