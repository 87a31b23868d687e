"""The document's commands for vision models, run for real; only model and size are replaced.

The data sets are laid out here under the names that the document uses, so `--dataset` stays as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from safetensors import safe_open

from raytune_rl import cli
from raytune_rl.tiny.shapes import write_shapes
from raytune_rl.tiny.vision import make_tiny_vision_model
from tests.cluster.test_online import GAP
from tests.cluster.test_seed_grpo import smaller
from tests.data.seed_commands.extract import seed_commands

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
COMMANDS = {command.name: command for command in seed_commands()}
PLUGIN = Path(__file__).parents[2] / "examples" / "plugin.py"
ROWS = 16


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the document's two data sets in small, in the layout of the hubs, and a model."""
    shapes = [
        json.loads(line) for line in write_shapes(tmp_path / "shapes", train=ROWS).rl.read_text().splitlines()
    ]
    pictures = [{"bytes": Path(row["image"]).read_bytes(), "path": None} for row in shapes]
    ocr = [{"image": p, "text": r["solution"]} for p, r in zip(pictures, shapes, strict=True)]
    reasoning = [
        {
            "image": p,
            "problem": r["problem"],
            "solution": r["solution"],
            "original_question": "",
            "original_answer": "",
        }
        for p, r in zip(pictures, shapes, strict=True)
    ]
    for name, rows in {
        "AI-ModelScope/LaTeX_OCR/human_handwrite/train.parquet": ocr,
        "lmms-lab/multimodal-open-r1-8k-verified/data/train.parquet": reasoning[:4],
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    make_tiny_vision_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(
    name: str, here: Path, workers: int, monkeypatch: pytest.MonkeyPatch, **replaced: str
) -> tuple[Path, list]:
    """Runs a command; its folder and its logged lines."""
    command = COMMANDS[name]
    values = {"model": str(here / "model"), "output_dir": str(here / "output"), **replaced}
    words = smaller(command, {f"--{flag}": [value] for flag, value in values.items()})
    for variable, value in command.environ.items():
        # 602112 pixels are more than the toy's processor ever takes.
        small = {"NPROC_PER_NODE": str(workers), "MAX_PIXELS": str(28 * 28 * 3)}
        monkeypatch.setenv(variable, small.get(variable, value))
    assert cli.main([command.command, *words]) == 0
    (made,) = (here / "output").iterdir()
    return made, [json.loads(line) for line in (made / "logging.jsonl").read_text().splitlines()]


def adapter_names(checkpoint: Path) -> list[str]:
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize(
    ("name", "workers", "steps"),
    [pytest.param("sft-mllm-1gpu", 1, 1, marks=pytest.mark.variants), ("sft-mllm-8gpu", 2, 2)],
)
def test_sft(
    cluster: None,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    workers: int,
    steps: int,
) -> None:
    made, lines = run(name, here, workers, monkeypatch)
    said = " ".join("".join(capsys.readouterr()).split())
    assert "every row is asked 'Using LaTeX to perform OCR on the image.'" in said
    assert f"{ROWS} distinct" in said
    assert "MAX_PIXELS=2352 is read as --max_pixels 2352." in said
    assert lines[-1]["global_step"] == steps
    names = adapter_names(made / f"checkpoint-{steps}")
    assert names
    assert all(".language_model." in name for name in names), (
        "the tower stays as it is, unless asked otherwise"
    )


@pytest.mark.parametrize(
    ("name", "workers"),
    [("rlhf-mllm-1gpu", 1), ("rlhf-mllm-8gpu", 2)],
)
@pytest.mark.variants
def test_grpo(
    cluster: None,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    workers: int,
) -> None:
    (here / "prompt.txt").write_text("Think first, then answer.")
    smaller_ones: dict[str, Any] = {
        "external_plugins": str(PLUGIN),
        "system": str(here / "prompt.txt"),
        "max_completion_length": "16",
        "vllm_max_model_len": "200",
        "num_generations": "4",
    }
    if workers > 1:
        smaller_ones["num_infer_workers"] = str(workers)
    made, lines = run(name, here, workers, monkeypatch, **smaller_ones)
    assert "rows had images but no <image> tag; tags were put first" in "".join(capsys.readouterr())
    assert lines[-1]["global_step"] == 4
    gaps = [line[GAP] for line in lines if GAP in line]
    assert gaps
    assert max(gaps) < 0.2, "bfloat16 on both sides"
    assert all(".language_model." in name for name in adapter_names(made / "checkpoint-4"))
    completions = [json.loads(line) for line in (made / "completions.jsonl").open()]
    assert len(completions) == 4 * 4
    assert {row["prompt"].count("<|image_pad|>") for row in completions} == {1}
    assert completions[0]["rewards"].keys() == {"MultiModalAccuracy", "Format"}
