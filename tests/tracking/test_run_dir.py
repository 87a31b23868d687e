import json
import math
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from raytune_rl.errors import CheckpointError, ConfigError
from raytune_rl.redaction import redact
from raytune_rl.tracking.run_dir import RunDir, version_dirs


def test_versions_count_up_from_the_highest_even_with_gaps(tmp_path: Path) -> None:
    assert re.fullmatch(r"v0-\d{8}-\d{6}", RunDir.create(tmp_path).path.name)
    (tmp_path / "v11-20250101-000000").mkdir()
    (tmp_path / "v99-notes").mkdir()
    created = RunDir.create(tmp_path)
    assert created.path.name.startswith("v12-")
    assert [p.name.split("-")[0] for p in version_dirs(tmp_path)] == ["v12", "v11", "v0"]
    assert created.runs.is_dir()
    assert created.images.is_dir()


def test_processes_that_start_together_get_different_numbers(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom raytune_rl.tracking.run_dir import RunDir\n"
        "sys.stdin.readline()\n"
        "for _ in range(20): RunDir.create(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for _ in range(4)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        child.communicate()
        assert child.returncode == 0
    numbers = sorted(int(p.name.split("-")[0][1:]) for p in version_dirs(tmp_path))
    # Numbers are unique; one may be skipped where a claim was lost between a look and a touch.
    assert len(numbers) == len(set(numbers)) == 80
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_run_made_between_look_and_claim_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.touch

    def overtaken(self: Path, mode: int = 0o666, exist_ok: bool = True) -> None:
        monkeypatch.setattr(Path, "touch", real)
        RunDir.create(tmp_path)
        real(self, mode, exist_ok)

    monkeypatch.setattr(Path, "touch", overtaken)
    assert RunDir.create(tmp_path).path.name.startswith("v1-")
    assert [p.name.split("-")[0] for p in version_dirs(tmp_path)] == ["v1", "v0"]


def test_without_a_version_an_existing_run_is_not_written_over(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "flat", add_version=False)
    assert run.path == tmp_path / "flat"
    run.write_args({"a": 1})
    with pytest.raises(ConfigError, match="already holds a run"):
        RunDir.create(tmp_path / "flat", add_version=False)


def test_an_output_dir_that_is_a_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output_dir .*file cannot be used"):
        RunDir.create(tmp_path / "file")


def test_open_takes_a_run_or_one_of_its_checkpoints(run: RunDir) -> None:
    run.checkpoint(5).mkdir()
    assert RunDir.open(run.path) == run
    assert RunDir.open(run.checkpoint(5)) == run
    with pytest.raises(CheckpointError, match="no run directory"):
        RunDir.open(run.path / "nowhere")


class Tuner(Enum):
    LORA = "lora"


def test_args_round_trip_without_secrets(run: RunDir) -> None:
    config = {
        "model": Path("a/b"),
        "tuner_type": Tuner.LORA,
        "delta": math.inf,
        "learning_rate": 1e-5,
        "max_completion_length": 512,
        "hub_token": "hf_abc",
        "nested": [{"WANDB_API_KEY": "k", "password": 1234}],
    }
    run.write_args(config)
    text = run.args_json.read_text()
    assert "hf_abc" not in text
    assert "1234" not in text
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["package_versions"].keys() >= {"python", "numpy"}
    assert run.read_args() == {
        "model": "a/b",
        "tuner_type": "lora",
        "delta": "inf",
        "learning_rate": 1e-5,
        "max_completion_length": 512,
        "hub_token": None,
        "nested": [{"WANDB_API_KEY": None, "password": None}],
    }
    assert config["hub_token"] == "hf_abc"


def test_only_secrets_are_redacted() -> None:
    kept = {
        "max_new_tokens": 512,
        "token_budget": 8192,
        "eos_token": "</s>",
        "new_special_tokens": ["<a>"],
        "tokenizer": "x/y",
        "log_token_stats": True,
        "loss_type": "token",
    }
    assert redact(kept) == kept
    secret = {"hubToken": "x", "use_token": ["x"], "client-secret": {"a": 1}, "MY_ACCESS_KEY": "x"}
    assert redact(secret) == dict.fromkeys(secret)
    assert redact({"proxy": "http://me:pw@host/x"}) == {"proxy": "http://host/x"}
    nested = {"rows": [{"url": "https://h/a.png?token=s3cr3t&w=4"}]}
    assert redact(nested) == {"rows": [{"url": "https://h/a.png?token=***&w=4"}]}


def test_reading_args_of_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no args\.json"):
        RunDir(tmp_path).read_args()
