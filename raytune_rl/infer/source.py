"""The model to be tried: a whole model, or a base model with the adapter that was trained on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from raytune_rl.config import ExportConfig, InferConfig
from raytune_rl.data.load import resolve_system
from raytune_rl.errors import ConfigError, ModelError
from raytune_rl.export.source import ADAPTER_CONFIG, Base, adapter_dir, find_base, read_args
from raytune_rl.models.adapters import check_fits
from raytune_rl.models.hub import resolve_path
from raytune_rl.models.load import load_config, takes_media
from raytune_rl.models.served import adapter_tensors, held_back, read_adapter_config
from raytune_rl.models.traits import gpu_here, has_experts
from raytune_rl.tracking.checkpoints import MANIFEST, verify
from raytune_rl.tracking.run_dir import RunDir


@dataclass(frozen=True)
class Source:
    """The model that the engines serve.

    Attributes:
        model: Local folder of the weights.
        tokenizer: Local folder of the tokenizer: the adapter's, where it has one.
        adapter: Folder of the adapter that goes on them, or None.
        lora_rank: Of the adapter; 0 without one.
        folder: Where answers are written to, unless the user says.
        system: The system prompt as text, or None.
        notices: Sentences for the user.
    """

    model: str
    tokenizer: str
    adapter: str | None
    lora_rank: int
    folder: Path
    system: str | None
    notices: tuple[str, ...]


def find_source(config: InferConfig, scratch: Path, say: Callable[[str], None]) -> Source:
    """Finds model and adapter, and the system prompt of the training run.

    Args:
        config: What the user asked for.
        scratch: An empty folder, for a merged copy where an adapter cannot be served as it is.
        say: Takes a line before something that takes long.

    Raises:
        ModelError: A model is not there, or does not fit.
        ExportError: A folder of `--adapters` is no adapter.
        CheckpointError: A checkpoint is not whole.
        ConfigError: The system prompt's file is not there.
    """
    if not config.adapters:
        folder = _model_dir(config)
        system, notices = _system(config, folder)
        return Source(str(folder), str(folder), None, 0, folder, system, notices)
    adapters = [adapter_dir(adapter, use_hf=config.use_hf) for adapter in config.adapters]
    base = find_base(config, adapters)
    system, notices = _system(config, adapters[-1])
    notices = (*base.notices, f"base model: {base.name} (from {base.origin})", *notices)
    reason = _why_merged(adapters, base, config.trust_remote_code)
    if reason is None:
        check_fits(base.path, str(adapters[-1]), trust_remote_code=config.trust_remote_code)
        rank = int(read_adapter_config(adapters[-1])["r"])
        own = (adapters[-1] / "tokenizer_config.json").is_file()
        tokenizer = str(adapters[-1]) if own else base.path
        return Source(base.path, tokenizer, str(adapters[-1]), rank, adapters[-1], system, notices)
    say(f"{reason}: merging it into a copy of the base model, which is removed at the end")
    merged = _merged(config, adapters, scratch / "model")
    return Source(str(merged), str(merged), None, 0, adapters[-1], system, notices)


def _model_dir(config: InferConfig) -> Path:
    """The folder of a whole model; an adapter and a run's folder are told apart."""
    assert config.model is not None
    folder = Path(resolve_path(config.model, use_hf=config.use_hf)).absolute()
    if (folder / "config.json").is_file():
        if (folder / MANIFEST).is_file():
            verify(folder)
        return folder
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder} is an adapter: give it as --adapters; its base model is found by itself")
    checkpoints = [p for p in RunDir(folder).checkpoints if (p / MANIFEST).is_file()]
    flag = "--adapters" if checkpoints and (checkpoints[-1] / ADAPTER_CONFIG).is_file() else "--model"
    hint = f". Did you mean {flag} {checkpoints[-1]}?" if checkpoints else ""
    raise ModelError(f"{folder} is not a model: it has no config.json{hint}")


def _system(config: InferConfig, folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """The user's system prompt, else the one in the training run's args.json."""
    if config.system is not None:
        return resolve_system(config.system), ()
    args, file = read_args(folder)
    trained = args.get("system")
    if not trained:
        return None, ()
    try:
        return resolve_system(str(trained)), (f"system prompt as in training, from {file}: {trained!r}",)
    except ConfigError:
        return None, (f"{file}: trained with --system {trained}, which is no longer there: none is used",)


def _why_merged(adapters: Sequence[Path], base: Base, trusted: bool) -> str | None:
    """Why vLLM cannot serve the adapter beside its base model; None where it can."""
    if len(adapters) > 1 or base.earlier:
        return "several adapters lie on each other"
    names = adapter_tensors(adapters[0])
    if withheld := held_back(read_adapter_config(adapters[0]), names):
        return f"the adapter has {', '.join(withheld)}, which vLLM does not serve"
    config = load_config(base.path, trust_remote_code=trusted)
    if has_experts(config) and not gpu_here():
        return "vLLM serves no adapters of mixtures of experts on a CPU"
    if takes_media(config):
        return "the base model takes images, and vLLM serves adapters on the text part only"
    if outside := [n for n in names if "embed_tokens" in n or "lm_head" in n]:
        return f"the adapter has weights on {outside[0].partition('.lora')[0]}, which vLLM does not serve"
    return None


def _merged(config: InferConfig, adapters: Sequence[Path], target: Path) -> Path:
    from raytune_rl.export.merge import merge

    export = ExportConfig(
        adapters=tuple(map(str, adapters)),
        model=config.model,
        merge_lora=True,
        output_dir=str(target),
        trust_remote_code=config.trust_remote_code,
        use_hf=config.use_hf,
    )
    return merge(export, lambda line: None).path
