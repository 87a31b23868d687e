"""The commands of `tests/data/seed.txt`, as a shell would hand them to the program."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

SEED = Path(__file__).parents[1] / "seed.txt"


@dataclass(frozen=True)
class SeedCommand:
    """One command of the document.

    Attributes:
        name: Such as `rlhf-llm-1gpu`.
        command: `sft`, `rlhf` or `export`.
        argv: The words after the command.
        environ: The variables set in front of it.
        text: As it stands in the document.
    """

    name: str
    command: str
    argv: tuple[str, ...]
    environ: dict[str, str]
    text: str


def seed_commands(text: str | None = None) -> list[SeedCommand]:
    """All `swift` commands of the document, in its order."""
    text = SEED.read_text(encoding="utf-8") if text is None else text
    # Single export commands stand under their own title, training commands under model kind and machine.
    found = []
    for match in re.finditer(r"\.\. code-block:: bash[ \t]*\n((?:[ \t]*\n|[ \t]+\S.*(?:\n|$))*)", text):
        block = match.group(1)
        if "swift " not in block:
            continue
        title = re.findall(r"\*\*(.+?)\*\*", text[: match.start()])[-1]
        found.append(_command(block, title))
    return found


def smaller(command: SeedCommand, replaced: dict[str, list[str]]) -> list[str]:
    """The command's words with the values of some flags replaced; no flag is added or left out."""
    words: list[str] = []
    skipping = False
    for word in command.argv:
        if word.startswith("--"):
            skipping = word in replaced
            words += [word, *replaced.get(word, [])]
        elif not skipping:
            words.append(word)
    return words


def _command(block: str, title: str) -> SeedCommand:
    # One line of the document has a blank behind its backslash, which ends the command for a shell.
    mended = re.sub(r"\\[ \t]+$", r"\\", block, flags=re.MULTILINE)
    words = shlex.split(mended.replace("\\\n", " "), comments=True)
    environ = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environ[name] = value
    if words[0] == "nohup":
        words.pop(0)
    assert words[0] == "swift", words
    kind = title.split()[0].lower()
    gpus = f"{environ.get('NPROC_PER_NODE', '1')}gpu"
    name = f"{words[1]}-{kind}" + ("" if words[1] == "export" else f"-{gpus}")
    return SeedCommand(name, words[1], tuple(words[2:]), environ, block)
