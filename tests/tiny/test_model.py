"""The toy model loads as any hub model would, and is the same each time."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_rl.errors import ModelError
from raytune_rl.tiny.arithmetic import corpus, problems
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.tiny.tokenizer import make_tiny_tokenizer


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def test_size_dtype_and_ending_are_as_promised(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert model.dtype == torch.float32
    assert 2.4e6 < model.num_parameters() < 2.6e6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tokenizer) == model.config.vocab_size == 512
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_untied_head_is_its_own_tensor(tmp_path: Path) -> None:
    made = make_tiny_model(tmp_path / "m", tied=False, hidden=64, layers=1)
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_same_seed_same_bytes_without_touching_the_callers_random_state(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = make_tiny_model(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert digests(again) == digests(tiny)
    other = make_tiny_model(tmp_path / "other", seed=1)
    assert digests(other)["model.safetensors"] != digests(tiny)["model.safetensors"]


def test_a_second_call_writes_nothing_and_never_over_something_else(tiny: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny.iterdir()}
    assert make_tiny_model(tiny) == tiny
    assert {file: file.stat().st_mtime_ns for file in tiny.iterdir()} == before
    with pytest.raises(ModelError, match="nothing was overwritten"):
        make_tiny_model(tiny, seed=7)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ModelError, match="Give another directory"):
        make_tiny_model(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hidden=100, heads=3"):
        make_tiny_model(tmp_path / "m", hidden=100, heads=3)


def test_a_reloaded_tokenizer_splits_as_the_trained_one(tiny: Path) -> None:
    loaded, made = AutoTokenizer.from_pretrained(tiny), make_tiny_tokenizer()
    for text in [*list(corpus())[:20], "<think>12+7=19</think>", "héllo 漢字\n\n don't  stop<|im_end|>"]:
        ids = loaded(text).input_ids
        assert ids == made(text).input_ids
        assert loaded.decode(ids) == text


def test_chat_is_chatml_and_completions_are_short(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12+7=?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n12+7=?<|im_end|>\n<|im_start|>assistant\n"
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "12+7=?"}]}]
    plain = [{"role": "user", "content": "12+7=?"}]
    assert tokenizer.apply_chat_template(parts) == tokenizer.apply_chat_template(plain)
    longest = max(len(tokenizer(problem.completion(problem.answer)).input_ids) for problem in problems())
    assert longest < 40
    # The tags are not special: a reward that reads the decoded text must see them.
    answer = tokenizer("<think>1</think><answer>1</answer><|im_end|>").input_ids
    assert tokenizer.decode(answer, skip_special_tokens=True) == "<think>1</think><answer>1</answer>"


def test_extra_special_tokens_keep_the_size() -> None:
    tokenizer = make_tiny_tokenizer(("<|image_pad|>",))
    assert len(tokenizer) == 512
    assert len(tokenizer("<|image_pad|>").input_ids) == 1
    assert tokenizer.decode(tokenizer("a<|image_pad|>").input_ids, skip_special_tokens=True) == "a"
