"""The scripts in `examples/commands` can be started and parse; for texts they are the document's commands."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from raytune_rl.config import ExportConfig, InferConfig, SFTConfig
from raytune_rl.config.parser import parse, rlhf_class
from tests.data.seed_commands.extract import seed_commands

SCRIPTS = Path(__file__).parents[1] / "examples" / "commands"
FROM_SEED = {
    "sft_llm.sh": "sft-llm-1gpu",
    "sft_llm_deepspeed.sh": "sft-llm-8gpu",
    "export_merge.sh": "export-merge",
    "export_push.sh": "export-push",
}
CONFIGS = {"sft": SFTConfig, "export": ExportConfig, "infer": InferConfig}


def read(name: str) -> tuple[dict[str, str], str, tuple[str, ...]]:
    """Variables, command and its words, as a shell reads them."""
    text = (SCRIPTS / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert (SCRIPTS / name).stat().st_mode & 0o100, "it can be started"
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    environ = {}
    while "=" in words[0]:
        variable, _, value = words.pop(0).partition("=")
        environ[variable] = value
    if words[0] == "nohup":
        words.pop(0)
    assert words[0] == "raytune-rl"
    return environ, words[1], tuple(words[2:])


@pytest.mark.parametrize(("script", "name"), FROM_SEED.items())
def test_a_script_is_the_documents_command(script: str, name: str) -> None:
    command = next(c for c in seed_commands() if c.name == name)
    assert read(script) == (command.environ, command.command, command.argv)


@pytest.mark.parametrize("script", [path.name for path in sorted(SCRIPTS.glob("*.sh"))])
def test_a_script_parses(script: str) -> None:
    environ, command, words = read(script)
    config_class = rlhf_class(words) if command == "rlhf" else CONFIGS[command]
    assert parse(words, config_class, environ=environ).config
