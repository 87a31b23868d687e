"""The completions of the policy: completions.jsonl, one row a completion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from raytune_rl.tracking.files import Truncation, in_short, json_line, truncate_jsonl
from raytune_rl.tracking.line_file import LineFile
from raytune_rl.tracking.run_dir import RunDir


@dataclass(frozen=True)
class CompletionRow:
    """One completion and what became of it.

    Attributes:
        step: The optimizer step that it was sampled for.
        prompt: As text, after the chat template.
        completion: As text.
        tokens: Completion length in tokens.
        rewards: Each reward function's score; None where the function failed or abstained.
        reward: The weighted total; None if there is none.
        advantage: None where the completion was filtered before advantages.
        weight_version: The version that sampled its first token.
        finish_reason: `stop`, `length`...
        extra: Further columns (solution, prompt id...); a name of the above is refused.
    """

    step: int
    prompt: str
    completion: str
    tokens: int
    rewards: Mapping[str, float | None]
    reward: float | None
    advantage: float | None
    weight_version: int
    finish_reason: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "extra"}
        if clash := own.keys() & self.extra.keys():
            raise ValueError(f"extra columns of a completion hide its own: {', '.join(sorted(clash))}")
        return {**own, **self.extra}


class CompletionLog:
    """Appends rows to completions.jsonl, on disk with each call; those that cannot be written are counted.

    Args:
        run_dir: Where to.
        resume_step: On resume, rows of later steps and a torn last row are dropped first.

    Attributes:
        truncation: What the resume dropped.
    """

    def __init__(self, run_dir: RunDir, *, resume_step: int | None = None) -> None:
        self.truncation = Truncation(0, 0, 0)
        if resume_step is not None:
            self.truncation = truncate_jsonl(
                run_dir.completions_jsonl,
                lambda row: isinstance(row.get("step"), int) and row["step"] <= resume_step,
            )
        self._file = LineFile(run_dir.completions_jsonl)

    def __enter__(self) -> CompletionLog:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, rows: Iterable[CompletionRow]) -> None:
        self._file.append([json_line(row.as_dict(), in_short) for row in rows])

    def close(self) -> None:
        self._file.close()
