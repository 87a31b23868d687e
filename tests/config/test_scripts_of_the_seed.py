"""Scripts of the document's commands that name files of ms-swift's checkout: they name ours instead."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from raytune_rl.config import RLHFConfig, SFTConfig
from raytune_rl.config.parser import parse
from tests.data.seed_commands.extract import SeedCommand, seed_commands

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "sft_mllm.sh": "sft-mllm-1gpu",
    "sft_mllm_deepspeed.sh": "sft-mllm-8gpu",
    "grpo_llm.sh": "rlhf-llm-1gpu",
    "grpo_llm_deepspeed.sh": "rlhf-llm-8gpu",
    "grpo_mllm.sh": "rlhf-mllm-1gpu",
    "grpo_mllm_deepspeed.sh": "rlhf-mllm-8gpu",
}
HERE = {
    "examples/train/grpo/plugin/plugin.py": "examples/plugin.py",
    "examples/train/grpo/prompt.txt": "examples/prompt.txt",
}


def read(script: str) -> SeedCommand:
    text = (ROOT / "examples" / "commands" / script).read_text()
    assert "\\ \n" not in text, "a blank behind the backslash ends the command for a shell"
    body = textwrap.indent(text.replace("raytune-rl ", "swift "), "   ")
    kind = "MLLM" if "_mllm" in script else "LLM"
    (command,) = seed_commands(f"**{kind}**\n\n.. code-block:: bash\n\n{body}")
    return command


@pytest.mark.parametrize(("script", "name"), SCRIPTS.items())
def test_a_script_is_the_documents_command(script: str, name: str) -> None:
    (seed,) = [command for command in seed_commands() if command.name == name]
    command = read(script)
    assert (command.name, command.environ) == (name, seed.environ)
    assert command.argv == tuple(HERE.get(word, word) for word in seed.argv)
    for word in command.argv:
        assert not word.startswith("examples/") or (ROOT / word).is_file()
    config = SFTConfig if command.command == "sft" else RLHFConfig
    assert parse(command.argv, config, environ=command.environ).config.train_type == "lora"
