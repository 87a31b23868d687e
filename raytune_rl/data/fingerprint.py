"""What encoded rows depend on, as one name: two runs with the same name would encode the same.

Files go in by their content, so that neither a copy nor a touched time stamp misleads; a model by everything
in its folder that is not weights; this program by its own code, and the libraries that do the work by their
versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b, file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raytune_rl.data.sources import local_files, parse_spec

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pillow", "torchvision", "numpy")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}


def fingerprint(
    settings: Mapping[str, Any], specs: Sequence[str], model: Path, *, use_hf: bool
) -> str | None:
    """The name of what encoding these data for this model under these settings gives.

    Args:
        settings: Plain values, as JSON knows them.
        specs: Values of `--dataset` and `--val_dataset`.
        model: Folder of the model.
        use_hf: As in `data.load.load_examples`.

    Returns:
        32 hexadecimal digits; None where a data set is in no files that could be compared.

    Raises:
        DataError: A data set is not there.
    """
    parts: list[Any] = [settings, [(name, version(name)) for name in _LIBRARIES]]
    parts.append(_digests(sorted(Path(__file__).parent.glob("*.py"))))
    parts.append(_digests(path for path in sorted(model.iterdir()) if _describes(path)))
    for text in specs:
        spec = parse_spec(text, use_hf=use_hf)
        if spec.path is not None:
            files, _ = local_files(spec, spec.path)
        else:
            from raytune_rl.data.hubs import hub_files

            files = hub_files(spec)
        if not files:
            return None
        parts.append([text, _digests(files)])
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _describes(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() not in _WEIGHTS


def _digests(files: Iterable[Path]) -> list[tuple[str, str]]:
    found = []
    for path in files:
        with path.open("rb") as file:
            found.append((str(path), file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()))
    return found
