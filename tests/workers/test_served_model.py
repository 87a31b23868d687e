"""How vLLM is asked for a teacher's opinion, and how its answer is read: against a scripted engine (the real
one: `tests/cluster/test_teachers.py`)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raytune_rl.algorithms.distillation import TEACHER_COLUMNS, ReverseKL
from raytune_rl.errors import ConfigError
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.model import ScoreSettings
from raytune_rl.protocol.rollout import EngineSpec
from raytune_rl.protocol.rows import RowBatch, RowPointer, TrainBatch
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.workers import scoring

VOCABULARY = 512
ROWS = [np.array([7, 3, 9, 4], np.int32), np.array([8, 2, 6], np.int32)]
MASKS = [np.array([False, False, True, True]), np.array([False, True, False])]


class Engine:
    """Finishes one request a step, the last first. At place p the log-prob of token t is -(p + t / 1000)."""

    layers = 1

    def __init__(self, args: Any) -> None:
        self.args, self.asked, self.aborted = args, [], []  # type: ignore[var-annotated]
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)

    @classmethod
    def from_engine_args(cls, args: Any, context: Any) -> Engine:
        return cls(args)

    def collective_rpc(self, method: str, args: tuple[float]) -> list[int]:
        self.divided = (method, *args)
        return [self.layers]

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.asked.append((name, prompt["prompt_token_ids"], params))

    def step(self) -> list[Any]:
        from vllm.logprobs import create_prompt_logprobs

        name, tokens, params = self.asked.pop()
        flat: Any = create_prompt_logprobs(params.flat_logprobs)
        for place, token in enumerate(tokens[1:], start=1):
            ids = [token, *range(params.prompt_logprobs)]
            flat.append_fast(ids, [-(place + t / 1000) for t in ids], ids, ids)
        return [
            SimpleNamespace(request_id="another's", finished=False),
            SimpleNamespace(request_id=name, finished=True, prompt_logprobs=flat),
        ]

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> RowBatch:
    columns: Columns = {
        "tokens": Ragged.from_rows(ROWS, np.int32),
        "loss_mask": Ragged.from_rows(MASKS, np.bool_),
        "logprobs": Ragged.from_rows([np.full(m.sum(), -1.0) for m in MASKS], np.float32),
    }
    monkeypatch.setattr(scoring.ray, "get", lambda refs, timeout: [columns for _ in refs])
    rows = [RowPointer("rollout", row) for row in range(2)]
    made = TrainBatch(rows, np.array([4, 3]), {"old_logprobs": rows}).with_scalars(advantage=[0.5, 0.0])
    return made.message([[0, 1]])


def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int = 4, layers: int = 1) -> Any:
    from raytune_rl.workers import served_model
    from raytune_rl.workers.teacher import ServedTeacherWorker

    monkeypatch.setattr(served_model, "LLMEngine", Engine)
    monkeypatch.setattr(Engine, "layers", layers)
    monkeypatch.delenv(served_model.ALLOW_LONG, raising=False)
    path = make_tiny_model(tmp_path / "model", hidden=64, layers=1)
    return ServedTeacherWorker(EngineSpec(str(path), "float32", longest, None, 1.0), ScoreSettings(0.5, 1.0))


def test_every_loss_token_has_its_own_and_the_likeliest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: RowBatch
) -> None:
    asked = worker(tmp_path, monkeypatch)
    engine: Any = asked._model._engine
    assert engine.divided == ("divide_logits", 0.5)
    assert engine.args.max_model_len == 5, "the longest row, and the token that vLLM samples behind it"
    sums, scored = asked.logprobs(batch)
    own: Any = scored["logprobs"]
    np.testing.assert_allclose(own[0], [-2.009, -3.004], rtol=1e-6)
    np.testing.assert_allclose(own[1], [-1.002], rtol=1e-6)
    np.testing.assert_allclose(sums, [-5.013, -1.002], rtol=1e-6)
    _, advice = asked.advise(batch, ReverseKL(2.0))
    advantages: Any = advice["advantages"]
    np.testing.assert_allclose(advantages[0], [0.5 + 2 * -1.009, 0.5 + 2 * -2.004], rtol=1e-6)
    count, tops = asked.distributions(batch, 3)
    ids, logprobs = (tops[name] for name in TEACHER_COLUMNS)
    assert count == 2
    assert ids[0].tolist() == [0, 1, 2, 0, 1, 2]  # type: ignore[index]
    np.testing.assert_allclose(logprobs[1], [-1.0, -1.001, -1.002], rtol=1e-6)  # type: ignore[index]
    _, whole = asked.distributions(batch, 0)
    assert len(whole[TEACHER_COLUMNS[0]][1]) == VOCABULARY  # type: ignore[index]
    assert not engine.asked


def test_rows_that_are_not_read_to_the_end_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: RowBatch
) -> None:
    asked = worker(tmp_path, monkeypatch)
    opinions = asked._model.likeliest(batch, 1)
    assert next(opinions)[0] == 1
    opinions.close()
    assert asked._model._engine.aborted == ["0"]


def test_a_model_that_cannot_be_asked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"takes \d+ tokens, and rows may have 100000"):
        worker(tmp_path, monkeypatch, longest=100_000)
    with pytest.raises(ConfigError, match="leave out --teacher_backend vllm"):
        worker(tmp_path, monkeypatch, layers=0)
