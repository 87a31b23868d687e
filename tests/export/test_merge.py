from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_rl.config import ExportConfig
from raytune_rl.errors import CheckpointError, ConfigError, ModelError
from raytune_rl.export import merge as merging
from raytune_rl.export import run
from raytune_rl.export.errors import ExportError, HubTokenError, ParityError
from raytune_rl.export.merge import Merged
from raytune_rl.protocol.model import TunerSettings
from tests.export.conftest import Train
from tests.export.fake_hubs import OWNER, TOKEN, FakeHub, FakeHuggingFace
from tests.families.recipes import make_family

Bases = Callable[..., Path]
IDS = torch.tensor([[7, 300, 41, 41, 9, 500, 128, 3]])


def merge(adapters: Path | Sequence[Path], lines: list[str] | None = None, **settings: Any) -> Merged:
    config = ExportConfig(adapters=adapters, merge_lora=True, **settings)
    merged = run(config, [].append if lines is None else lines.append).merged
    assert merged is not None
    return merged


def answers(base: Path, *adapters: Path) -> torch.Tensor:
    """Logits by Transformers and PEFT alone, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for number, adapter in enumerate(adapters):
        model = PeftModel.from_pretrained(model, adapter)
        if number < len(adapters) - 1:
            model = model.merge_and_unload()
    with torch.no_grad():
        return model.eval()(IDS).logits


def beside(path: Path) -> list[str]:
    """The other files, hidden or not."""
    return sorted(p.name for p in path.parent.iterdir() if p.name != path.name)


LORA = TunerSettings(lora_rank=4)
DORA = TunerSettings(lora_rank=4, use_dora=True)
RSLORA = TunerSettings(lora_rank=4, use_rslora=True, target_modules=("q_proj", "down_proj"))
NORM_TOO = TunerSettings(lora_rank=4, modules_to_save=("norm",))


@pytest.mark.parametrize(
    ("settings", "tied"),
    [(LORA, True), (LORA, False), (DORA, True), (DORA, False), (RSLORA, True), (NORM_TOO, False)],
    ids=["lora-tied", "lora", "dora-tied", "dora", "rslora-tied", "norm-too"],
)
def test_the_merged_model_answers_as_base_and_adapter(
    tmp_path: Path, bases: Bases, train: Train, settings: TunerSettings, tied: bool
) -> None:
    base = bases(tied=tied)
    adapter = train(tmp_path / "checkpoint-3", base, settings=settings)
    lines: list[str] = []
    merged = merge(adapter, lines)
    assert merged.path == tmp_path / "checkpoint-3-merged"
    expected = answers(base, adapter)
    torch.testing.assert_close(answers(merged.path), expected, atol=2e-4, rtol=1e-4)
    assert (expected - answers(base)).abs().max() > 0.1, "the adapter does something"

    parity = merged.parity
    assert parity.difference < 2e-4 < parity.tolerance < parity.effect
    assert f"by at most {parity.difference:.3g}" in lines[-1]
    weights = load_file(merged.path / "model.safetensors")
    assert set(weights) == set(load_file(base / "model.safetensors"))
    assert ("lm_head.weight" in weights) == (not tied)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged.path / name).read_bytes() == (adapter / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        written, original = (json.loads((path / name).read_text()) for path in (merged.path, base))
        assert written == original
    assert AutoTokenizer.from_pretrained(merged.path)("12 + 3").input_ids
    assert beside(merged.path) == ["checkpoint-3"]
    assert json.loads((merged.path / "export.json").read_text())["logits"]["difference"] == parity.difference


def test_an_adapter_on_experts_is_merged(tmp_path: Path, train: Train) -> None:
    """PEFT opens one only without dropout."""
    base = make_family("qwen3_moe", tmp_path / "base", tied=False)
    experts = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    settings = TunerSettings(lora_rank=4, lora_dropout=0.0, target_parameters=experts)
    adapter = train(tmp_path / "checkpoint-3", base, settings=settings)
    merged = merge(adapter)
    expected = answers(base, adapter)
    torch.testing.assert_close(answers(merged.path), expected, atol=2e-4, rtol=1e-4)
    assert (expected - answers(base)).abs().max() > 0.1, "the adapter does something"


@pytest.mark.parametrize("asked", [None, "float16", "float32"])
def test_dtypes(tmp_path: Path, bases: Bases, train: Train, asked: str | None) -> None:
    base = bases(dtype=torch.bfloat16)
    adapter = train(tmp_path / "a", base)
    merged = merge(adapter, torch_dtype=asked)
    assert merged.dtype == (asked or "bfloat16")
    dtype = getattr(torch, merged.dtype)
    assert {tensor.dtype for tensor in load_file(merged.path / "model.safetensors").values()} == {dtype}
    assert json.loads((merged.path / "config.json").read_text())["dtype"] == merged.dtype
    expected = answers(base, adapter)
    limit = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}[dtype] * expected.abs().max()
    assert (answers(merged.path) - expected).abs().max() < limit
    assert merged.parity.difference <= merged.parity.tolerance < merged.parity.effect


def test_several_adapters_in_order(tmp_path: Path, bases: Bases, train: Train) -> None:
    base = bases()
    # DoRA's norms depend on what is below, so that the order matters.
    first = train(tmp_path / "first", base, settings=DORA)
    second = train(tmp_path / "second", base, settings=DORA, seed=1, on=(first,))
    merged = merge([first, second])
    assert merged.path == tmp_path / "second-merged"
    expected = answers(base, first, second)
    torch.testing.assert_close(answers(merged.path), expected, atol=5e-4, rtol=1e-4)
    swapped = answers(merge([second, first]).path)
    assert (swapped - expected).abs().max() > 0.01


def test_adapters_that_the_run_merged_first_are_merged_first(
    tmp_path: Path, bases: Bases, train: Train
) -> None:
    base = bases()
    first = train(tmp_path / "first", base)
    second = train(tmp_path / "run" / "checkpoint-2", base, seed=1, on=(first,))
    args = {"model": str(base), "adapters": [str(first), "start"], "package_versions": {"raytune-rl": "0"}}
    (tmp_path / "run" / "args.json").write_text(json.dumps(args))
    lines: list[str] = []
    merged = merge(second, lines)
    torch.testing.assert_close(answers(merged.path), answers(base, first, second), atol=5e-4, rtol=1e-4)
    assert merged.adapters == (str(first), str(second))
    assert any(line == f"adapter: {first} (merged before the training run)" for line in lines)


def test_where_the_base_is_found(tmp_path: Path, bases: Bases, train: Train) -> None:
    """--model, else args.json in the checkpoint, else above it, else adapter_config.json."""
    bases_by_origin = {name: tmp_path / name for name in ("flag", "in", "above", "adapter")}
    for path in bases_by_origin.values():
        shutil.copytree(bases(), path)
    adapter = train(tmp_path / "run" / "checkpoint-1", bases_by_origin["adapter"])
    (adapter / "args.json").write_text(json.dumps({"model": str(bases_by_origin["in"])}))
    (adapter.parent / "args.json").write_text(json.dumps({"model": str(bases_by_origin["above"])}))

    def found(**settings: Any) -> str:
        return Path(merge(adapter, exist_ok=True, **settings).base).name

    assert found(model=str(bases_by_origin["flag"])) == "flag"
    assert found() == "in"
    (adapter / "args.json").unlink()
    assert found() == "above"
    (adapter.parent / "args.json").write_text(json.dumps({"model": str(tmp_path / "moved away")}))
    lines: list[str] = []
    merge(adapter, lines, exist_ok=True)
    assert lines[0].startswith(f"not used: {adapter.parent / 'args.json'}: model directory")
    assert (
        lines[1] == f"base model: {bases_by_origin['adapter']} (from {adapter}/adapter_config.json), float32"
    )
    (adapter.parent / "args.json").unlink()
    assert found() == "adapter"
    shutil.rmtree(bases_by_origin["adapter"])
    with pytest.raises(ModelError, match=r"base model cannot be found .*adapter_config.json.*--model"):
        merge(adapter, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(tmp_path: Path, bases: Bases, train: Train) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases(), base)
    adapter = train(tmp_path / "a", base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised \(gptq\).*--model"):
        merge(adapter)


def test_exist_ok_really_overwrites(tmp_path: Path, bases: Bases, train: Train) -> None:
    base = bases()
    adapter = train(tmp_path / "a", base)
    target = merge(adapter).path
    (target / "old.txt").write_text("old")
    train(adapter, base, seed=5)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(ExportError, match=r"exists\. Pass --exist_ok true"):
        merge(adapter)
    assert (target / "model.safetensors").read_bytes() == before
    merge(adapter, exist_ok=True)
    torch.testing.assert_close(answers(target), answers(base, adapter), atol=2e-4, rtol=1e-4)
    assert not (target / "old.txt").exists()
    assert beside(target) == ["a"]


def test_targets_that_would_lose_something(tmp_path: Path, bases: Bases, train: Train) -> None:
    base = tmp_path / "models" / "base"
    shutil.copytree(bases(), base)
    adapter = train(tmp_path / "a", base)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear")
    with pytest.raises(ExportError, match="is not a model"):
        merge(adapter, exist_ok=True, output_dir=str(tmp_path / "home"))
    with pytest.raises(ExportError, match="which is being exported"):
        merge(adapter, exist_ok=True, output_dir=str(base))
    (tmp_path / "models" / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="which is being exported"):
        merge(adapter, exist_ok=True, output_dir=str(tmp_path / "models"))
    assert (tmp_path / "home" / "diary.txt").read_text() == "dear"
    assert (base / "model.safetensors").is_file()


def test_a_wrong_merge_is_found_and_removed(
    tmp_path: Path, bases: Bases, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = train(tmp_path / "a", bases())
    write = merging.write_weights

    def forget_one_adapter(index: Any, tensors: Any, directory: Path) -> list[str]:
        plain = load_file(bases() / "model.safetensors")
        name = "model.layers.1.mlp.down_proj.weight"
        return write(index, ((n, plain[n] if n == name else t) for n, t in tensors), directory)

    monkeypatch.setattr(merging, "write_weights", forget_one_adapter)
    with pytest.raises(ParityError, match=r"not what was trained: its logits differ by up to [\d.]+ "):
        merge(adapter)
    assert beside(adapter) == []


def test_an_adapter_on_a_tied_embedding_makes_a_head_of_its_own(
    tmp_path: Path, bases: Bases, train: Train
) -> None:
    adapter = train(
        tmp_path / "a", bases(tied=False), settings=TunerSettings(target_modules=("embed_tokens",))
    )
    tied = merge(adapter, model=str(bases(tied=True)), output_dir=str(tmp_path / "tied")).path
    assert not json.loads((tied / "config.json").read_text())["tie_word_embeddings"]
    torch.testing.assert_close(answers(tied), answers(bases(tied=True), adapter), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        answers(merge(adapter).path), answers(bases(tied=False), adapter), atol=2e-4, rtol=1e-4
    )


def test_an_adapter_that_lacks_weights_is_refused(tmp_path: Path, bases: Bases, train: Train) -> None:
    adapter = train(tmp_path / "a", bases())
    weights = load_file(adapter / "adapter_model.safetensors")
    lost = sorted(weights)[0]
    save_file({n: t for n, t in weights.items() if n != lost}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lacks 1 of the weights") as caught:
        merge(adapter)
    assert lost in str(caught.value)


def test_what_is_no_adapter(tmp_path: Path, bases: Bases, train: Train) -> None:
    with pytest.raises(ExportError, match="whole model, not an adapter"):
        merge(bases())
    adapter = train(tmp_path / "run" / "checkpoint-12", bases())
    with pytest.raises(ExportError, match=r"Did you mean .*checkpoint-12\?"):
        merge(adapter.parent)
    with pytest.raises(ModelError, match="does not exist"):
        merge(tmp_path / "nowhere")
    (adapter / "manifest.json").write_text('{"files": {"lost.bin": 3}}')
    with pytest.raises(CheckpointError, match=r"lost\.bin is missing"):
        merge(adapter)


def test_an_untrained_adapter_is_remarked(tmp_path: Path, bases: Bases, train: Train) -> None:
    adapter = train(tmp_path / "a", bases())
    file = adapter / "adapter_model.safetensors"
    save_file({n: t.zero_() if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    lines: list[str] = []
    merge(adapter, lines)
    assert any("changes no logit" in line for line in lines)


def test_an_adapter_that_drowns_in_rounding_is_remarked(tmp_path: Path, bases: Bases, train: Train) -> None:
    adapter = train(tmp_path / "a", bases(dtype=torch.bfloat16))
    file = adapter / "adapter_model.safetensors"
    save_file({n: t * 1e-3 if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    lines: list[str] = []
    merge(adapter, lines)
    assert any("as small as bfloat16's rounding" in line for line in lines)


def test_a_merged_model_is_pushed_when_both_are_asked(
    tmp_path: Path, bases: Bases, train: Train, hub: FakeHub
) -> None:
    adapter = train(tmp_path / "a", bases())
    settings = {"push_to_hub": True, "hub_model_id": "it", "use_hf": isinstance(hub, FakeHuggingFace)}
    with pytest.raises(HubTokenError):
        merge(adapter, **settings)
    assert not (tmp_path / "a-merged").exists(), "the token is asked for before the work"
    merged = merge(adapter, hub_token=TOKEN, **settings)
    received = hub.repos[f"{OWNER}/it"]
    assert received == {p.name: p.read_bytes() for p in merged.path.iterdir() if p.name != "export.json"}
    assert "model.safetensors" in received


def test_config() -> None:
    with pytest.raises(ConfigError, match="--adapters names 2"):
        ExportConfig(adapters=["a", "b"], push_to_hub=True, hub_model_id="me/it")
    assert ExportConfig(adapters=["a", "b"], merge_lora=True).adapters == ("a", "b")
