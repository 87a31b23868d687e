"""Requests to a judge and its answers: values under ms-swift's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class RequestConfig:
    """How a judge's answers are drawn.

    Attributes:
        max_tokens: Longest answer; None for what the model's context leaves.
        temperature: 0 takes the likeliest token.
        n: Answers to each conversation; their rewards are averaged.
        top_p, top_k, repetition_penalty: As in sampling; None for no such limit.
    """

    max_tokens: int | None = None
    temperature: float | None = 0.0
    n: int = 1
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True)
class Spoken:
    """Text of an answer, and its role."""

    content: str
    role: str = "assistant"


@dataclass(frozen=True)
class JudgeChoice:
    """One answer of a judge; finish_reason is "stop" or "length"."""

    message: Spoken
    finish_reason: str


@dataclass(frozen=True)
class JudgeAnswer:
    """All answers of a judge to one conversation."""

    choices: list[JudgeChoice]
