"""A tiny teacher really teaches a tiny student, on the real stack: two ranks, vLLM, and what the teacher
says of the student's own answers: its whole distribution (GKD), about sums and about pictures, or each
token's log-prob as the only advantage (OPD), about sums; and one that is told the answer teaches itself,
who is not.

Minutes on two cores, so only `make learning` runs it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raytune_rl.config import RLHFConfig
from raytune_rl.data.encode import EncodedSFT, MediaSettings, encode_sft
from raytune_rl.data.load import load_examples
from raytune_rl.data.media_batch import MediaCollator
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import media_of
from raytune_rl.models.load import load_media_processor, load_model
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.pipelines import online
from raytune_rl.pipelines.lifecycle import RunResult
from raytune_rl.tiny.arithmetic import problems, question
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.tiny.shapes import QUESTION, write_shapes
from raytune_rl.tiny.vision import make_tiny_vision_model
from raytune_rl.workers.scoring import forward_inputs
from tests.learning.loop import Policy

pytestmark = [pytest.mark.learning, pytest.mark.timeout(1800)]

SAYS = """
from raytune_rl.rewards.registry import orms

class Says:
    def __call__(self, completions, solution, **kwargs):
        return [float(said.strip() == wanted) for said, wanted in zip(completions, solution)]

orms["says"] = Says
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other, where others use the cores too, take minutes over a tiny model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


GKD: dict[str, Any] = {"rlhf_type": "gkd", "lmbda": 1}
OPD: dict[str, Any] = {"advantage_estimator": "distill", "num_generations": 1, "beta": 0.0}
DISTANCES = "gkd/divergence", "teacher_kl"
"""How far the student is from its teacher, by GKD and by OPD."""


def distilled(root: Path, **settings: Any) -> tuple[RunResult, list[float]]:
    """A run on the student's own answers, two ranks, held-out prompts before and after; and its distances."""
    (root / "says.py").write_text(SAYS, encoding="utf-8")
    given: dict[str, Any] = {
        "model": str(root / "student"),
        "teacher_model": str(root / "teacher"),
        "reward_funcs": "says",
        "external_plugins": str(root / "says.py"),
        "train_type": "full",
        "policy_workers": 2,
        "temperature": 1.0,
        "num_generations_eval": 4,
        "eval_strategy": "steps",
        "eval_steps": 1000,
        "save_strategy": "no",
        "logging_steps": 5,
        "report_to": "none",
        "output_dir": str(root / "out"),
    }
    result = online.run(RLHFConfig(**{**given, **settings}))
    logged = (result.run_dir / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line for line in map(json.loads, logged) if "loss" in line]
    assert max(line["rollout_correction/logp_abs_diff_max"] for line in lines) < 1e-3
    return result, [line[name] for line in lines for name in DISTANCES if name in line]


def check(result: RunResult, distances: list[float], teacher: float) -> None:
    before, after = (m["eval_rewards/Says/mean"] for m in (result.before, result.after))
    print(f"\nheld-out answers right: student {before:.0%}, then {after:.0%}; its teacher {teacher:.0%}")
    print("from the teacher:", *(f"{distance:.3f}" for distance in distances))
    assert before < 0.2
    assert after > 0.8 * teacher
    assert distances[-1] < distances[0] / 2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "how",
    [
        {**GKD, "learning_rate": 4e-3, "max_steps": 90},
        {**OPD, "learning_rate": 2e-3, "max_steps": 200},
    ],
    ids=["gkd", "opd"],
)
def test_about_sums(how: dict[str, Any], tmp_path: Path) -> None:
    rng = random.Random(0)
    pool = problems()
    rng.shuffle(pool)
    held_out, seen = pool[:64], pool[64:]
    taught = rng.choices(seen, k=2048)
    rightness = {}
    for name, steps in (("student", 70), ("teacher", 230)):
        policy = Policy(make_tiny_model(tmp_path / "tiny", hidden=128, layers=2))
        policy.imitate(taught, [p.answer for p in taught], steps, rate=4e-3)
        policy.model.save_pretrained(tmp_path / name)
        policy.tokenizer.save_pretrained(tmp_path / name)
        rightness[name] = policy.rightness(held_out)
    assert rightness["teacher"] > 0.9
    files = [
        write(
            tmp_path / f"{name}.jsonl",
            ({"query": question(p, in_words=False), "solution": p.completion(p.answer)} for p in part),
        )
        for name, part in (("train", seen[:1024]), ("held_out", held_out))
    ]
    result, distances = distilled(
        tmp_path,
        **how,
        dataset=files[0],
        val_dataset=files[1],
        per_device_train_batch_size=64,
        max_completion_length=20,
        warmup_steps=5,
    )
    check(result, distances, rightness["teacher"])


def test_itself_by_what_only_the_teacher_sees(tmp_path: Path) -> None:
    """Self-distillation: the same weights are right where the answer stands behind the question."""
    rng = random.Random(0)
    pool = problems()
    rng.shuffle(pool)
    held_out, seen = pool[:64], pool[64:]
    taught = rng.choices(seen, k=4096)
    told = [rng.random() < 0.5 for _ in taught]
    answers = [
        p.answer if known or rng.random() < 0.3 else 10 + rng.randrange(90)
        for p, known in zip(taught, told, strict=True)
    ]
    hints = [f" {p.answer}" if known else "" for p, known in zip(taught, told, strict=True)]
    policy = Policy(make_tiny_model(tmp_path / "tiny", hidden=128, layers=2))
    policy.imitate(taught, answers, 200, rate=4e-3, hints=hints)
    for name in ("student", "teacher"):
        policy.model.save_pretrained(tmp_path / name)
        policy.tokenizer.save_pretrained(tmp_path / name)
    teacher = policy.rightness(held_out, " {}")
    assert teacher > 0.9
    train = write(
        tmp_path / "train.jsonl",
        (
            {
                "query": question(p, in_words=False),
                "teacher_prompt": f"{question(p, in_words=False)} {p.answer}",
                "solution": p.completion(p.answer),
            }
            for p in seen[:1024]
        ),
    )
    result, distances = distilled(
        tmp_path,
        **GKD,
        dataset=train,
        val_dataset=write(
            tmp_path / "held_out.jsonl",
            ({"query": question(p, in_words=False), "solution": p.completion(p.answer)} for p in held_out),
        ),
        per_device_train_batch_size=64,
        max_completion_length=20,
        learning_rate=4e-3,
        warmup_steps=5,
        max_steps=130,
    )
    check(result, distances, teacher)


class Painter:
    """A tiny vision model that says what a picture shows."""

    def __init__(self, path: Path) -> None:
        loaded = load_model(str(path), dtype="float32")
        self.model: Any = loaded.model
        self.processor = load_media_processor(str(path))
        self.media = MediaProcessor.of(self.processor)
        self._collator = MediaCollator(self.media, dtype=torch.float32)
        self._scorer = TokenScorer(self.model)

    def rows(self, file: Path) -> EncodedSFT:
        examples = load_examples([str(file)], task="sft", strict=True).examples
        return encode_sft(examples, self.media.processor.tokenizer, media=MediaSettings(self.media))

    def score(self, found: EncodedSFT, rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        chosen = list(rows)
        columns = [found.tokens[r] for r in chosen], [found.loss_mask[r] for r in chosen]
        micro = self._collator.collate(*columns, [media_of(found.media, r) for r in chosen], pad_token_id=0)
        return self._scorer(**forward_inputs(micro)).logprobs, micro.row_of

    def imitate(self, found: EncodedSFT, steps: int, rate: float) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), rate, betas=(0.9, 0.95))
        rng = np.random.default_rng(0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
            logprobs, _ = self.score(found, rng.integers(len(found.tokens), size=32).tolist())
            optimizer.zero_grad()
            (-logprobs.mean()).backward()
            optimizer.step()

    def rightness(self, found: EncodedSFT) -> float:
        """The mean probability of the right answer."""
        with torch.no_grad():
            logprobs, row_of = self.score(found, range(len(found.tokens)))
        return float(torch.zeros(len(found.tokens)).index_add(0, row_of, logprobs).exp().mean())


def test_about_pictures(tmp_path: Path) -> None:
    shapes = write_shapes(tmp_path / "data", train=256, held_out=48)
    teacher = 0.0
    for name, steps in (("student", 20), ("teacher", 200)):
        torch.manual_seed(0)
        painter = Painter(make_tiny_vision_model(tmp_path / "tiny"))
        painter.imitate(painter.rows(shapes.sft), steps, rate=3e-3)
        painter.model.save_pretrained(tmp_path / name)
        painter.processor.save_pretrained(tmp_path / name)
        teacher = painter.rightness(painter.rows(shapes.held_out))
    assert teacher > 0.5
    files = []
    for name, chats in (("train", shapes.sft), ("held_out", shapes.held_out)):
        said = [json.loads(line) for line in chats.read_text(encoding="utf-8").splitlines()]
        rows = [
            {
                "image": c["images"][0],
                "problem": QUESTION,
                "teacher_prompt": QUESTION,
                "solution": c["messages"][1]["content"],
            }
            for c in said
        ]
        files.append(write(tmp_path / f"{name}.jsonl", rows))
    result, distances = distilled(
        tmp_path,
        **GKD,
        dataset=files[0],
        val_dataset=files[1],
        freeze_vit=False,
        freeze_aligner=False,
        per_device_train_batch_size=32,
        max_completion_length=8,
        learning_rate=3e-3,
        warmup_steps=5,
        max_steps=70,
    )
    check(result, distances, teacher)
