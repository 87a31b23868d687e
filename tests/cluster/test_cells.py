"""Every tuner on texts and on pictures, and every way to shard: trained, saved, and loaded by others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raytune_rl.algorithms.registry import get_loss
from raytune_rl.config import SFTConfig, deepspeed
from raytune_rl.errors import ConfigError, ModelError
from raytune_rl.export.parity import logits, make_probe
from raytune_rl.groups.world import TOKENS_SAVED
from raytune_rl.protocol.model import Settled
from raytune_rl.protocol.rows import Prefixes, TrainBatch
from raytune_rl.runtime.cluster import reserve
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.runtime.weights import read
from raytune_rl.tiny.shapes import write_shapes
from raytune_rl.tiny.vision import make_tiny_vision_model
from tests.cluster.cells import Rows, World, rows_of, spec_of
from tests.cluster.conftest import Tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
TUNERS: dict[str, dict[str, Any]] = {
    "full": {"train_type": "full"},
    "lora": {},
    "qlora": {"quant_method": "bnb", "quant_bits": 4},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="module")
def places(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By kind, the model and its data."""
    root = tmp_path_factory.mktemp("vision")
    return {
        "text": (tiny.tied, tiny.data.sft),
        "vision": (make_tiny_vision_model(root / "model"), write_shapes(root / "data", train=8).sft),
    }


@pytest.fixture(scope="module")
def worlds(cluster: None, places: dict[str, tuple[Path, Path]]) -> Iterator[dict[int, World]]:
    """A world of one rank and one of two."""
    model, data = places["text"]
    first = spec_of(SFTConfig(model=str(model), dataset=str(data)))
    with reserve([GroupSpec("one", 1, cpus=0.5), GroupSpec("two", 2, cpus=0.5)], 60.0) as slots:
        made = {1: World(1, slots["one"], first), 2: World(2, slots["two"], first)}
        for world in made.values():
            world.policy.ready()
        yield made
        for world in made.values():
            world.group.shutdown()


def loaded(kind: str, tuner: str, base: Path, checkpoint: Path) -> Any:
    """The checkpoint as a user loads it, with Transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    auto = AutoModelForImageTextToText if kind == "vision" else AutoModelForCausalLM
    if tuner == "full":
        return auto.from_pretrained(checkpoint).eval()
    options: dict[str, Any] = {}
    if tuner == "qlora":
        options["device_map"] = {"": "cpu"}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        )
    model = auto.from_pretrained(base, **options)
    for module in model.modules():  # else bitsandbytes computes in bfloat16 on CPUs that have it
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, checkpoint).eval()


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_what_is_trained_is_what_others_load(
    worlds: dict[int, World],
    places: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    kind: str,
    tuner: str,
) -> None:
    model, data = places[kind]
    config = SFTConfig(
        model=str(model),
        dataset=f"{data}#8",
        **TUNERS[tuner],
        learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    world = worlds[1]
    world.become(spec_of(config, vision=kind == "vision"))
    before = world.logits(model)
    rows = rows_of(config, tmp_path)
    losses = world.train(rows, range(2))
    # As between two generations on a GPU that is shared with an engine; here the CPU is both ends of the way.
    world.policy.world.offload(weights=True, optimizer=True)
    world.policy.world.reload()
    losses += world.train(rows, range(2, 4))
    assert losses[-1] < losses[0] - 0.1, losses
    mine = world.logits(model)
    assert np.abs(mine - before).max() > 0.05, "training moves the logits"

    checkpoint = tmp_path / "checkpoint"
    world.policy.world.save(checkpoint, only_model=True)
    again = loaded(kind, tuner, model, checkpoint)
    probe = make_probe(again.config, checkpoint, trust_remote_code=False)
    assert probe.medium == ("picture" if kind == "vision" else None)
    theirs = logits(again, probe).numpy()
    np.testing.assert_allclose(theirs, mine, rtol=0, atol=2e-5)
    modes = {oct(file.stat().st_mode & 0o777) for file in checkpoint.iterdir() if file.is_file()}
    assert len(modes) == 1, "weights are as readable as what lies beside them"


def test_a_quantised_model_is_not_trained_in_full(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="--train_type full cannot train a model quantised"):
        SFTConfig(model=str(tiny.tied), dataset=str(tiny.data.sft), train_type="full", **TUNERS["qlora"])


@pytest.fixture(scope="module")
def straight(
    worlds: dict[int, World], tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Rows, list[float]]:
    """Five steps of one rank without ZeRO, on rows that do not divide evenly."""
    config = sft(tiny, "zero0")
    rows = rows_of(config, tmp_path_factory.mktemp("rows"))
    worlds[1].become(spec_of(config))
    return rows, worlds[1].train(rows, range(5))


def sft(tiny: Tiny, variant: str, **settings: Any) -> SFTConfig:
    given: dict[str, Any] = {
        "model": str(tiny.tied),
        "dataset": f"{tiny.data.sft}#11",
        "train_type": "full",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "deepspeed": variant,
    }
    return SFTConfig(**{**given, **settings})


@pytest.mark.parametrize("variant", [*deepspeed.PRESETS, "a JSON file"])
def test_every_way_to_shard_gives_one_loss_curve_and_one_checkpoint(
    worlds: dict[int, World],
    straight: tuple[Rows, list[float]],
    tiny: Tiny,
    tmp_path: Path,
    variant: str,
) -> None:
    rows, expected = straight
    if variant == "a JSON file":
        settings = deepspeed.load("zero3")
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        file = tmp_path / "zero3.json"
        file.write_text(json.dumps(settings))
        variant = str(file)
    config = sft(tiny, variant, gradient_checkpointing="3" in variant)
    spec = spec_of(config, publish_mode="full")
    world = worlds[2]
    world.become(spec)
    assert world.train(rows, range(3)) == pytest.approx(expected[:3], abs=2e-5)

    checkpoint = tmp_path / "checkpoint"
    world.policy.world.save(checkpoint, only_model=False)
    mine = world.logits(tiny.tied)
    again = loaded("text", "full", tiny.tied, checkpoint)
    probe = make_probe(again.config, checkpoint, trust_remote_code=False)
    np.testing.assert_allclose(logits(again, probe).numpy(), mine, rtol=0, atol=2e-5)
    published = dict(read(world.policy.publish(0), 30.0))
    stored = {n: t for n, t in again.state_dict().items() if n != "lm_head.weight"}
    assert published.keys() == stored.keys()
    assert all(torch.equal(published[name], stored[name]) for name in stored)

    rest = world.train(rows, range(3, 5))
    assert rest == pytest.approx(expected[3:], abs=2e-5)
    world.become(spec)
    world.policy.world.load(checkpoint)
    assert world.train(rows, range(3, 5)) == rest, "it goes on as if nothing had been"
    if variant in ("zero2", "zero3"):
        worlds[1].become(spec_of(config))
        worlds[1].policy.world.load(checkpoint)
        assert worlds[1].train(rows, range(3, 5)) == pytest.approx(rest, abs=2e-5)


def test_rows_that_begin_alike_share_it_in_shares_of_weights(
    worlds: dict[int, World], straight: tuple[Rows, list[float]], tiny: Tiny
) -> None:
    """Two ranks, ZeRO-3 and checkpointing: the template's first tokens are computed once a micro-batch."""
    rows, expected = straight
    spec = spec_of(sft(tiny, "zero3", gradient_checkpointing=True))
    spec = replace(spec, model=replace(spec.model, sharing="true"))
    world = worlds[2].policy.world
    assert not [notice for notice in worlds[2].become(spec) if "cannot share" in notice]
    world.settled = Settled("padded", sharing="true")
    count = len(rows.pointers)
    batch = TrainBatch(
        rows.pointers,
        np.asarray(rows.lengths),
        scalars={"weight": rows.weights},
        prefixes=Prefixes(np.zeros(count, np.int64), np.full(count, 12)),
    )
    steps = [world.train(batch, step) for step in range(3)]
    assert [step.metrics["loss"] for step in steps] == pytest.approx(expected[:3], abs=2e-5)
    assert steps[0].metrics[TOKENS_SAVED] > 0


@pytest.mark.parametrize(("variant", "whole"), [("zero2", ()), ("zero2", ("lm_head",)), ("zero3", ())])
def test_without_its_adapter_the_policy_is_what_it_started_from(
    worlds: dict[int, World],
    straight: tuple[Rows, list[float]],
    tiny: Tiny,
    variant: str,
    whole: tuple[str, ...],
) -> None:
    """The reference of online RL; asking for it changes neither the adapter nor what is learned."""
    rows = straight[0]
    more = {"train_type": "lora", "learning_rate": 1e-2, "modules_to_save": whole, "model": str(tiny.untied)}
    spec = spec_of(sft(tiny, variant, **more))
    world = worlds[2]

    batch = TrainBatch(rows.pointers, np.asarray(rows.lengths))

    def sums(without_adapter: bool = False) -> np.ndarray:
        score = world.policy.base_logprobs if without_adapter else world.policy.logprobs
        return score(batch).sums

    world.become(spec)
    start = sums()
    world.train(rows, range(2))
    moved = sums()
    assert np.abs(moved - start).max() > 0.1
    np.testing.assert_allclose(sums(without_adapter=True), start, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(sums(), moved)
    rest = world.train(rows, range(2, 4))
    world.become(spec)
    world.train(rows, range(2))
    assert world.train(rows, range(2, 4)) == rest


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("zero0", "float32"), ("zero0", "bfloat16"), ("zero2", "bfloat16"), ("zero3", "float32")],
)
def test_a_gradient_that_is_not_finite_leaves_no_trace(
    worlds: dict[int, World],
    straight: tuple[Rows, list[float]],
    tiny: Tiny,
    tmp_path: Path,
    variant: str,
    dtype: str,
) -> None:
    """The step is left out; what follows, and a resume, are as if it had not been."""
    rows, expected = straight
    world, spec = worlds[2], spec_of(sft(tiny, variant, torch_dtype=dtype))
    world.become(spec)
    losses = world.train(rows, range(2))
    assert losses == pytest.approx(expected[:2], abs=2e-5 if dtype == "float32" else 0.05)
    world.policy.world.save(tmp_path, only_model=False)

    def norm(weights: np.ndarray) -> float:
        batch = TrainBatch(rows.pointers, np.asarray(rows.lengths), scalars={"weight": weights})
        step = world.policy.world.train(batch, 2)
        return step.metrics["grad_norm"]

    assert norm(np.full_like(rows.weights, np.nan)) == np.inf
    rest = [norm(rows.weights), *world.train(rows, range(3, 5))]
    assert 0 < rest[0] < 100
    world.become(spec)
    world.policy.world.load(tmp_path)
    assert [norm(rows.weights), *world.train(rows, range(3, 5))] == rest


@pytest.mark.parametrize("wire", ["merged", "adapter"])
def test_a_sharded_adapter_is_published_and_saved(
    worlds: dict[int, World], straight: tuple[Rows, list[float]], tiny: Tiny, tmp_path: Path, wire: str
) -> None:
    config = sft(tiny, "zero3", train_type="lora", learning_rate=1e-2)
    world = worlds[2]
    world.become(spec_of(config, publish_mode=wire))
    world.train(straight[0], range(2))
    world.policy.world.save(tmp_path, only_model=False)
    model = loaded("text", "lora", tiny.tied, tmp_path)
    probe = make_probe(model.config, tmp_path, trust_remote_code=False)
    np.testing.assert_allclose(logits(model, probe).numpy(), world.logits(tiny.tied), rtol=0, atol=2e-5)

    published = dict(read(world.policy.publish(0), 30.0))
    if wire == "adapter":
        want = load_file(tmp_path / "adapter_model.safetensors")
    else:
        want = {n: t for n, t in model.merge_and_unload().state_dict().items() if n != "lm_head.weight"}
    assert published.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(published[name], tensor, rtol=0, atol=1e-6, msg=name)


CUT: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ("lm_head",)},
    "vision": {"train_type": "full", "torch_dtype": "bfloat16"},
    "vision adapter": {},
}


@pytest.mark.parametrize("cell", CUT)
def test_what_is_cut_while_it_is_loaded_learns_as_what_is_whole(
    worlds: dict[int, World], places: dict[str, tuple[Path, Path]], tiny: Tiny, tmp_path: Path, cell: str
) -> None:
    vision = cell.startswith("vision")
    model, data = places["vision"] if vision else (tiny.untied, tiny.data.sft)
    given = {"train_type": "lora", "learning_rate": 1e-2, "model": str(model), "dataset": f"{data}#8"}
    given |= CUT[cell]
    rows = rows_of(sft(tiny, "zero2", **given), tmp_path)
    world, losses, logits = worlds[2], {}, {}
    for variant in ("zero2", "zero3"):
        notices = world.become(spec_of(sft(tiny, variant, **given), vision=vision))
        assert not any("loads the whole model" in notice for notice in notices)
        losses[variant] = world.train(rows, range(3))
        logits[variant] = world.logits(model)
    assert losses["zero3"][0] == pytest.approx(losses["zero2"][0], abs=1e-5), "its buffers are not rounded"
    if "torch_dtype" not in given:
        assert losses["zero3"] == pytest.approx(losses["zero2"], abs=5e-5)
        assert np.abs(logits["zero3"] - logits["zero2"]).max() < 5e-3
    assert world.group.call("share") == pytest.approx([0.5, 0.5], abs=1e-3), "no rank ever has the whole"
    if given["train_type"] == "full":
        return
    world.policy.world.save(tmp_path / "saved", only_model=True)
    for train_type in ("lora", "full"):  # goes on with the adapter, or merges it into what is cut
        given |= {"train_type": train_type, "adapters": (str(tmp_path / "saved"),), "modules_to_save": ()}
        given |= {"use_dora": False}
        world.become(spec_of(sft(tiny, "zero3", **given), vision=vision))
        np.testing.assert_allclose(world.logits(model), logits["zero3"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("loss", ["rm", "ppo_value"])
def test_a_new_head_of_a_model_that_is_cut(
    worlds: dict[int, World], tiny: Tiny, tmp_path: Path, loss: str
) -> None:
    saved = {}
    for variant in ("zero2", "zero3"):
        spec = spec_of(sft(tiny, variant, model=str(tiny.untied)))
        spec = replace(spec, loss=loss, loss_settings=get_loss(loss).settings_type())
        notices = worlds[2].become(spec)
        assert any("the head that gives" in notice for notice in notices)
        worlds[2].policy.world.save(tmp_path / variant, only_model=True)
        saved[variant] = load_file(tmp_path / variant / "model.safetensors")
    assert saved["zero3"].keys() == saved["zero2"].keys()
    assert all(torch.equal(saved["zero3"][name], tensor) for name, tensor in saved["zero2"].items())
    assert bool(saved["zero3"]["score.weight"].any()) == (loss == "rm")


def test_what_a_model_lacks_is_told_before_any_rank_waits(
    worlds: dict[int, World], tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(tiny.untied, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of the model \(first: lm_head.weight\)"):
        worlds[2].become(spec_of(sft(tiny, "zero3", model=str(tmp_path))))
    save_file({**weights, "extra": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tied = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(tied))
    notices = worlds[2].become(spec_of(sft(tiny, "zero3", model=str(tmp_path))))
    assert any("1 weights in" in notice and "extra" in notice for notice in notices)
