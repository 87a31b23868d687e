"""The source of an export: the adapter's folder, and the base model that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_rl.config import ExportConfig, InferConfig
from raytune_rl.errors import ModelError
from raytune_rl.export.errors import ExportError
from raytune_rl.models.hub import resolve_path
from raytune_rl.models.load import load_config
from raytune_rl.tracking.checkpoints import MANIFEST, verify
from raytune_rl.tracking.run_dir import RunDir

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Base:
    """The model that the adapters go on.

    Attributes:
        name: as it was written where it was found.
        path: local directory, not quantised.
        origin: where it was found, in words.
        earlier: adapters that the training run merged into it before the exported one was trained.
        notices: lines for the user.
    """

    name: str
    path: str
    origin: str
    earlier: tuple[str, ...]
    notices: tuple[str, ...]


def adapter_dir(adapter: str, *, use_hf: bool) -> Path:
    """The local folder of an adapter, which is whole.

    Raises:
        ModelError: it is not there, or cannot be fetched.
        ExportError: it holds no adapter; a whole model and a run's directory are told apart.
        CheckpointError: files of the checkpoint are missing.
    """
    path = Path(resolve_path(adapter, use_hf=use_hf)).absolute()
    if not (path / ADAPTER_CONFIG).is_file():
        if (path / "config.json").is_file():
            raise ExportError(
                f"{path} is a whole model, not an adapter: there is nothing to merge. It can be used as it "
                "is, and uploaded with --model."
            )
        checkpoints = [p for p in RunDir(path).checkpoints if (p / ADAPTER_CONFIG).is_file()]
        hint = f" Did you mean {checkpoints[-1]}?" if checkpoints else ""
        raise ExportError(f"{path} is not an adapter: it has no {ADAPTER_CONFIG}.{hint}")
    if (path / MANIFEST).is_file():
        verify(path)
    return path


def find_base(config: ExportConfig | InferConfig, adapters: Sequence[Path]) -> Base:
    """The base model of the first adapter: --model, else args.json, else adapter_config.json.

    args.json is looked for in the adapter's folder and in the one above it, the run's.

    Raises:
        ModelError: no source names a model that can be had, or it is quantised.
    """
    args, args_file = read_args(adapters[0])
    earlier = _merged_before(args)
    notices: list[str] = []
    if args.get("trust_remote_code") and not config.trust_remote_code:
        # Not taken over: a downloaded adapter must not be able to switch it on.
        notices.append(
            f"{args_file}: trained with --trust_remote_code true; pass it here too if you trust the base"
        )
    if config.model is not None:
        if earlier:
            notices.append(
                f"{args_file}: the run merged {', '.join(earlier)} before training; --model is taken to "
                "hold that"
            )
        candidates = [(config.model, "--model", config.use_hf)]
    else:
        candidates = []
        if args.get("model"):
            candidates.append((str(args["model"]), str(args_file), bool(args.get("use_hf", config.use_hf))))
        written = _read_json(adapters[0] / ADAPTER_CONFIG).get("base_model_name_or_path")
        if written:
            candidates.append((str(written), str(adapters[0] / ADAPTER_CONFIG), config.use_hf))
    failures = []
    for name, origin, use_hf in candidates:
        try:
            path = resolve_path(name, use_hf=use_hf)
        except ModelError as error:
            failures.append(f"{origin}: {error}")
            continue
        _refuse_quantised(path, config.trust_remote_code)
        notices += [f"not used: {failure}" for failure in failures]
        ours = config.model is None and len(adapters) == 1
        return Base(name, path, origin, earlier if ours else (), tuple(notices))
    reasons = "; ".join(failures) or f"neither args.json nor {ADAPTER_CONFIG} of {adapters[0]} names it"
    raise ModelError(f"The base model cannot be found ({reasons}). Name it with --model.")


def _merged_before(args: dict[str, Any]) -> tuple[str, ...]:
    """Of several --adapters, a LoRA run trains the last one and merges those before it; see `apply_tuner`."""
    adapters = args.get("adapters") or []
    ours = "package_versions" in args  # ms-swift, which does not write it, means something else by a list
    if not ours or args.get("train_type") == "full" or not isinstance(adapters, list):
        return ()
    return tuple(str(adapter) for adapter in adapters[:-1])


def _refuse_quantised(path: str, trust_remote_code: bool) -> None:
    quantization = getattr(
        load_config(path, trust_remote_code=trust_remote_code), "quantization_config", None
    )
    if quantization is None:
        return
    settings = quantization if isinstance(quantization, dict) else vars(quantization)
    method = settings.get("quant_method", "unknown")
    raise ModelError(
        f"'{path}' is quantised ({getattr(method, 'value', method)}), and merging into quantised weights "
        "loses what the adapter learned. Name the model it was quantised from with --model."
    )


def read_args(checkpoint: Path) -> tuple[dict[str, Any], Path]:
    """args.json of the run that wrote a checkpoint, from its folder or the one above; empty without one.

    Raises:
        ModelError: It cannot be read.
    """
    for folder in (checkpoint, checkpoint.parent):
        file = folder / "args.json"
        if file.is_file():
            return _read_json(file), file
    return {}, checkpoint / "args.json"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{file} cannot be read: it holds no JSON object")
    return document
