"""The fingerprint of all that encoded rows depend on: two runs with the same name would encode the same.

Files go in by their content, so that neither a copy nor a touched time stamp misleads; a model by everything
in its folder that is not weights; this program by its own code, and the libraries that do the work by their
versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b, file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raytune_rl.data.sources import PLAIN, Preparing, data_set_files, parse_spec
from raytune_rl.errors import DataError

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pillow", "torchvision", "numpy")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}


def fingerprint(
    settings: Mapping[str, Any],
    specs: Sequence[str],
    model: Path,
    *,
    use_hf: bool,
    preparing: Preparing = PLAIN,
    tell: Callable[[str], None] = lambda _: None,
) -> str | None:
    """The name of what encoding these data for this model under these settings gives.

    Args:
        settings: Plain values, as JSON knows them.
        specs: Values of `--dataset` and `--val_dataset`.
        model: Folder of the model.
        preparing: How rows are prepared.
        use_hf: As in `data.load.load_examples`.
        tell: Told of each data file that is read for it.

    Returns:
        32 hexadecimal digits; None where a data set is in no files that could be compared.

    Raises:
        DataError: A data set is not there, or cannot be read.
    """
    parts: list[Any] = [settings, [(name, version(name)) for name in _LIBRARIES]]
    parts.append(_digests(sorted(Path(__file__).parent.glob("*.py"))))
    parts.append(_digests(path for path in sorted(model.iterdir()) if _describes(path)))
    for text in specs:
        spec = parse_spec(text, use_hf=use_hf)
        files = data_set_files(spec, preparing)
        if not files or not all(path.is_file() for path in files):  # a pipe can be read only once
            return None
        parts.append([text, _digests(files, tell)])
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _describes(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() not in _WEIGHTS


def _digests(files: Iterable[Path], tell: Callable[[str], None] = lambda _: None) -> list[tuple[str, str]]:
    found = []
    for path in files:
        tell(f"comparing {path} with earlier runs")
        try:
            with path.open("rb") as file:
                digest = file_digest(file, lambda: blake2b(digest_size=16))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        found.append((str(path), digest.hexdigest()))
    return found
