"""Prompts that no engine survived: a line each in quarantine-prompts.jsonl.

A file of its own: quarantine.jsonl is written anew by each start of a run, when the data are read.
"""

from __future__ import annotations

from pathlib import Path

from raytune_rl.protocol.data import PromptSet
from raytune_rl.redaction import redact_texts
from raytune_rl.runtime.wait import Pending, fetch
from raytune_rl.tracking.files import json_line, read_jsonl
from raytune_rl.tracking.line_file import LineFile


class PromptQuarantine:
    """Writes each prompt once, also over several parts of a run.

    Args:
        path: The file; made with the first prompt.
        timeout_s: Deadline for fetching the prompts' texts, seconds.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._held = {(row.get("set"), row.get("prompt_id")) for row in read_jsonl(path)}

    def add(self, name: str, prompts: PromptSet, row: int, reason: str) -> None:
        """A prompt was given up.

        Args:
            name: Of its set: "train" or "held out".
            prompts: The set.
            row: Which of them: the `prompt_id` that rewards are told.
            reason: A sentence for the user.
        """
        if (name, str(row)) in self._held:
            return
        self._held.add((name, str(row)))
        texts = fetch(Pending(prompts.texts, "the object store", "reading prompts", self._timeout_s))
        line = {"set": name, "prompt_id": str(row), "reason": reason, "prompt": texts[row]}
        file = LineFile(self._path)
        file.append([json_line(redact_texts(line))])
        file.close()
