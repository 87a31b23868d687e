"""Base plus adapters, written as one model that Transformers and vLLM load like any other."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_rl.config import ExportConfig
from raytune_rl.export.directory import check_target, whole_directory
from raytune_rl.export.errors import ExportError
from raytune_rl.export.parity import Parity, Probe, compare, expected_logits, make_probe
from raytune_rl.export.source import ADAPTER_CONFIG, Base, adapter_dir, find_base
from raytune_rl.export.write import copy_companions, write_configs, write_weights
from raytune_rl.models.load import load_config, load_model
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import WeightExporter
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.tracking.files import follow_umask
from raytune_rl.tracking.run_dir import package_versions

REPORT = "export.json"


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        path: the model's folder.
        base: the base model, as it was named where it was found.
        adapters: the adapters' folders, in the order in which they were merged.
        dtype: of the weights, such as "bfloat16".
        parity: how near the written model is to base and adapter.
    """

    path: Path
    base: str
    adapters: tuple[str, ...]
    dtype: str
    parity: Parity


def merge(config: ExportConfig, say: Callable[[str], None]) -> Merged:
    """Merges `config.adapters` into their base model, on the CPU.

    Each adapted weight is made in float32 and rounded once to the dtype of the base. The result is loaded
    again and compared with base and adapter before it gets its name, so a wrong one never has it.

    Args:
        config: with at least one adapter.
        say: takes the lines for the user.

    Raises:
        ExportError: the target exists or cannot be written, or an adapter is none.
        ParityError: the written model answers differently.
        ModelError: the base is missing or quantised, or an adapter does not fit.
        CheckpointError: an adapter's checkpoint is not whole.
    """
    adapters = [adapter_dir(adapter, use_hf=config.use_hf) for adapter in config.adapters]
    target = _target(config, adapters)
    check_target(target, config.exist_ok)
    base = find_base(config, adapters)
    for notice in base.notices:
        say(notice)
    earlier = [adapter_dir(adapter, use_hf=config.use_hf) for adapter in base.earlier]
    chain = [*earlier, *adapters]
    _refuse_source(target, [Path(base.path), *chain])
    dtype = _dtype(config, base)
    say(f"base model: {base.name} (from {base.origin}), {str(dtype).removeprefix('torch.')}")
    for adapter in chain:
        say(f"adapter: {adapter}" + (" (merged before the training run)" if adapter in earlier else ""))
    peft = _load(config, base, chain, dtype, say)
    with whole_directory(target, overwrite=config.exist_ok) as directory:
        copy_companions(chain[-1], Path(base.path), directory)
        model = peft.get_base_model()
        probe = make_probe(model.config, directory, trust_remote_code=config.trust_remote_code)
        for notice in probe.notices:
            say(notice)
        expected, effect = expected_logits(peft, probe)
        exporter = WeightExporter(peft, "merged")
        if exporter.unties:
            say("the adapter has made head and embedding two matrices: tie_word_embeddings becomes false")
        write_configs(
            model, directory, untied=exporter.unties, adapter=chain[-1], trusted=config.trust_remote_code
        )
        for name in write_weights(exporter.index, exporter.tensors(), directory):
            follow_umask(directory / name)
        del peft, model, exporter
        gc.collect()  # PEFT's wrappers hold each other; two models need not be in memory at once
        scalar = _scores(chain[-1])
        parity = _verify(directory, dtype, expected, effect, probe, config.trust_remote_code, scalar)
        merged = Merged(target, base.name, tuple(map(str, chain)), str(dtype).removeprefix("torch."), parity)
        (directory / REPORT).write_text(json.dumps(_document(merged), indent=2) + "\n", encoding="utf-8")
    if parity.effect == 0:
        say("the adapter changes no logit of the base model: was it trained at all?")
    return merged


def _target(config: ExportConfig, adapters: Sequence[Path]) -> Path:
    if config.output_dir is not None:
        return Path(config.output_dir).expanduser().absolute()
    if not Path(config.adapters[-1]).expanduser().is_dir():
        raise ExportError(
            f"'{config.adapters[-1]}' is a hub id, so there is no folder to write beside: name one with "
            "--output_dir."
        )
    return adapters[-1].with_name(f"{adapters[-1].name}-merged")


def _refuse_source(target: Path, sources: Sequence[Path]) -> None:
    """Replacing what is being read would lose it."""
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise ExportError(
                f"--output_dir {target} holds {source}, which is being exported. Choose another."
            )


def _dtype(config: ExportConfig, base: Base) -> torch.dtype:
    if config.torch_dtype is not None:
        return getattr(torch, config.torch_dtype)
    settings = load_config(base.path, trust_remote_code=config.trust_remote_code)
    own = getattr(settings, "dtype", None) or getattr(settings.get_text_config(), "dtype", None)
    own = getattr(torch, own) if isinstance(own, str) else own
    return own or torch.float32


def _load(
    config: ExportConfig, base: Base, chain: Sequence[Path], dtype: torch.dtype, say: Callable[[str], None]
) -> Any:
    """Base and adapters as training had them: the last one active, those before it merged."""
    scalar = _scores(chain[-1])
    loaded = load_model(base.path, dtype=dtype, trust_remote_code=config.trust_remote_code, scalar=scalar)
    for notice in loaded.notices:
        say(notice)
    adapters = [str(adapter) for adapter in chain]
    return apply_tuner(loaded.model, TunerSettings(lora_dropout=0.0), adapters, resize=True).model.eval()


def _scores(adapter: Path) -> bool:
    """Whether it is a reward model's or a critic's: those have a head of one output, which it brings."""
    return json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"


def _verify(
    directory: Path,
    dtype: torch.dtype,
    expected: torch.Tensor,
    effect: float,
    probe: Probe,
    trusted: bool,
    scalar: bool,
) -> Parity:
    written = load_model(str(directory), dtype=dtype, trust_remote_code=trusted, scalar=scalar)
    return compare(expected, effect, written.model, probe)


def _document(merged: Merged) -> dict[str, Any]:
    return {
        "base": merged.base,
        "adapters": list(merged.adapters),
        "dtype": merged.dtype,
        "logits": asdict(merged.parity),
        "package_versions": package_versions(("raytune-rl", "torch", "transformers", "peft")),
    }
