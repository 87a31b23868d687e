"""The document's GRPO commands for language models, run for real; only model, data and size are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_rl import cli
from tests.cluster.conftest import Tiny
from tests.data.seed_commands.extract import seed_commands, smaller

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
COMMANDS = {c.name: c for c in seed_commands() if c.command == "rlhf" and "-llm-" in c.name}


@pytest.mark.parametrize(
    ("name", "prompts", "workers"),
    [pytest.param("rlhf-llm-1gpu", 2, 1, marks=pytest.mark.variants), ("rlhf-llm-8gpu", 4, 2)],
)
def test_the_command_trains(
    cluster: None,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    prompts: int,
    workers: int,
) -> None:
    command = COMMANDS[name]
    system = tmp_path / "prompt.txt"
    system.write_text("Think first, then answer.")
    words = smaller(
        command,
        {
            "--model": [str(tiny.tied)],
            "--dataset": [f"{tiny.data.train}#{prompts}"],
            "--system": [str(system)],
            "--output_dir": [str(tmp_path / "output")],
            "--max_completion_length": ["16"],
            "--max_length": ["256"],
            "--vllm_max_model_len": ["300"],
            "--num_infer_workers": [str(workers)],
            "--num_generations": ["4"],
        },
    )
    for variable, value in command.environ.items():
        monkeypatch.setenv(variable, str(workers) if variable == "NPROC_PER_NODE" else value)
    assert cli.main(["rlhf", *words]) == 0
    said = capsys.readouterr()
    assert "bfloat16" in said.out
    assert "--gc_collect_after_offload true does nothing" in said.out + said.err

    (run,) = (tmp_path / "output").iterdir()
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    steps = prompts * 4 // (command_batch(words) * workers)
    assert lines[-1]["global_step"] == steps
    assert (run / f"checkpoint-{steps}" / "adapter_model.safetensors").is_file()
    completions = (run / "completions.jsonl").read_text().splitlines()
    assert len(completions) == prompts * 4
    assert "Think first, then answer." in json.loads(completions[0])["prompt"]


def command_batch(words: list[str]) -> int:
    """Completions per worker and optimizer step that the command asks for."""
    size = int(words[words.index("--per_device_train_batch_size") + 1])
    return size * int(words[words.index("--gradient_accumulation_steps") + 1])
