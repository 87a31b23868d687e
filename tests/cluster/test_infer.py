"""The trained model is tried at once: a file of answers, and a chat."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from raytune_rl import cli
from raytune_rl.tiny.shapes import write_shapes
from raytune_rl.tiny.vision import make_tiny_vision_model
from tests.cluster.conftest import Tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def checkpoint(cluster: None, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run long enough to answer in the form of the data."""
    output = tmp_path_factory.mktemp("sft")
    words = [
        "sft", "--model", str(tiny.untied), "--dataset", str(tiny.data.sft), "--lora_rank", "16",
        "--system", "Solve it.", "--max_steps", "30", "--per_device_train_batch_size", "16",
        "--gradient_accumulation_steps", "1", "--learning_rate", "2e-2", "--output_dir", str(output),
        "--report_to", "none",
    ]  # fmt: skip
    assert cli.main(words) == 0
    (run,) = output.iterdir()
    return run / "checkpoint-30"


class Greedy:
    """The same model by Transformers and PEFT."""

    def __init__(self, checkpoint: Path, system: str | None) -> None:
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoTokenizer

        self.model: Any = AutoPeftModelForCausalLM.from_pretrained(checkpoint).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self.before = [{"role": "system", "content": system}] if system else []

    def __call__(self, question: str, *, adapter: bool = True) -> str:
        said = [*self.before, {"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        options = {"max_new_tokens": 24, "do_sample": False}
        if adapter:
            out = self.model.generate(**ids, **options)
        else:
            with self.model.disable_adapter():
                out = self.model.generate(**ids, **options)
        return self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_file_of_rows_is_answered(checkpoint: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["infer", "--adapters", str(checkpoint), "--val_dataset", f"{tiny.data.sft}#12",
             "--max_new_tokens", "24", "--temperature", "0"]  # fmt: skip
    assert cli.main(words) == 0
    assert "system prompt as in training" in capsys.readouterr().err
    (path,) = (checkpoint / "infer_result").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    data = [json.loads(line)["messages"] for line in tiny.data.sft.read_text().splitlines()[:12]]
    assert [row["labels"] for row in rows] == [messages[1]["content"] for messages in data]
    greedy = Greedy(checkpoint, "Solve it.")
    for row, messages in zip(rows, data, strict=True):
        question = messages[0]["content"]
        assert [m["content"] for m in row["messages"]] == ["Solve it.", question, row["response"]]
        assert row["response"] == greedy(question)
    assert rows[0]["response"] != greedy(data[0][0]["content"], adapter=False), "the adapter is served"
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}


def test_rows_with_pictures_are_answered(cluster: None, tmp_path: Path) -> None:
    """By a whole vision model, as Transformers answers them."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = make_tiny_vision_model(tmp_path / "model")
    shapes = write_shapes(tmp_path / "data", train=3)
    answers = tmp_path / "answers.jsonl"
    words = ["infer", "--model", str(model), "--val_dataset", str(shapes.sft), "--result_path", str(answers),
             "--max_new_tokens", "8", "--temperature", "0"]  # fmt: skip
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    data = [json.loads(line) for line in shapes.sft.read_text().splitlines()]
    processor = AutoProcessor.from_pretrained(model)
    plain = AutoModelForImageTextToText.from_pretrained(model).eval()
    placeholders = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<|video_pad|>")]
    for row, asked in zip(rows, data, strict=True):
        assert row["labels"] == asked["messages"][1]["content"]
        parts = [{"type": "image"}, {"type": "text", "text": "Which shape is it?"}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[Image.open(asked["images"][0])], return_tensors="pt")
        out = plain.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=placeholders)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert row["response"] == processor.tokenizer.decode(out, skip_special_tokens=True)


def test_a_chat_reads_from_the_terminal(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.stdin", io.StringIO(f"12+37=?\n{'9' * 400}\nclear\n41+20=?\nquit\nnever asked\n")
    )
    words = ["infer", "--adapters", str(checkpoint), "--max_new_tokens", "24", "--temperature", "0",
             "--vllm_max_model_len", "256"]  # fmt: skip
    assert cli.main(words) == 0
    first, second, cleared, third, *rest = capsys.readouterr().out.split("<<< ")[1:]
    greedy = Greedy(checkpoint, "Solve it.")
    assert first.splitlines()[0] == greedy("12+37=?")
    assert "tokens and the engine takes 256" in second
    assert "a new conversation" in cleared
    assert third.splitlines()[0] == greedy("41+20=?")
    assert rest == ["\n"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--model", "no/such/folder"], 1, "no/such/folder"),
        (["--adapters", "ADAPTER", "--val_dataset", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--adapters", "ADAPTER", "--val_dataset", "DATA", "--result_path", "DATA"], 2, "exists"),
        (["--adapters", "ADAPTER", "--vllm_max_model_len", "4096"], 2, "the model takes 1024 tokens"),
        (["--adapters", "ADAPTER", "--num_beams", "2"], 2, "--num_beams"),
    ],
)
def test_a_users_mistake_is_answered_without_a_traceback(
    checkpoint: Path,
    tiny: Tiny,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    places = {"ADAPTER": str(checkpoint), "DATA": str(tiny.data.sft)}
    assert cli.main(["infer", *(places.get(word, word) for word in flags)]) == code
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.out + said.err
