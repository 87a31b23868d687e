"""Where scalars go besides logging.jsonl: TensorBoard, wandb, SwanLab; imported only when asked for."""

from __future__ import annotations

import difflib
import importlib
import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from raytune_rl.errors import ConfigError
from raytune_rl.tracking.line_file import LineFile
from raytune_rl.tracking.run_dir import RunDir

_NUMBERS = itertools.count()
SINKS = ("tensorboard", "wandb", "swanlab")


class Sink(Protocol):
    """A place for scalars."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_sinks(report_to: Sequence[str]) -> list[str]:
    """The named sinks, each once; to be called before the work begins whose scalars they get.

    Raises:
        ConfigError: A name is unknown, or its package is not installed.
    """
    names = [name for name in dict.fromkeys(report_to) if name != "none"]
    for name in names:
        if name not in SINKS:
            near = difflib.get_close_matches(name, SINKS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--report_to {name} is unknown; it takes {', '.join(SINKS)} or none.{hint}")
        if name != "tensorboard":
            _require(name)
    return names


def open_sinks(report_to: Sequence[str], run_dir: RunDir, resume_step: int | None) -> list[Sink]:
    """Opens the named sinks; `none` (or nothing) is none of them, `all` is not offered because it hides what
    runs.

    Raises:
        ConfigError: As `check_sinks`.
    """
    sinks: list[Sink] = []
    for name in check_sinks(report_to):
        if name == "tensorboard":
            sinks.append(TensorBoardSink(run_dir.runs, resume_step))
        elif name == "wandb":
            sinks.append(WandbSink(run_dir))
        else:
            sinks.append(SwanlabSink(run_dir))
    return sinks


def tag(name: str) -> str:
    """The Hugging Face naming: `eval_reward` -> `eval/reward`, everything else -> `train/...`."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


class TensorBoardSink:
    """Event files of TensorBoard's own records, without importing torch, and without its thread, which a
    disk that is full once would end for good.

    Args:
        directory: The run's `runs/`.
        resume_step: On resume, the step gone on from; TensorBoard then drops what earlier files say of later
            steps.
    """

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        event_pb2 = importlib.import_module("tensorboard.compat.proto.event_pb2")
        summary_pb2 = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        writer = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2.Summary
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._records: Any = writer.RecordWriter(LineFile(directory / f"{name}.{next(_NUMBERS)}"))
        self._add(wall_time=time.time(), file_version="brain.Event:2")
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(wall_time=time.time(), step=resume_step + 1, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag(name), simple_value=value) for name, value in scalars.items()]
        self._add(wall_time=time.time(), step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self._records.close()

    def _add(self, **event: Any) -> None:
        self._records.write(self._event(**event).SerializeToString())


class WandbSink:
    """Weights & Biases, set by its own WANDB_* variables. A resumed run goes on in place."""

    def __init__(self, run_dir: RunDir) -> None:
        wandb: Any = _require("wandb")
        with _starting("wandb", "WANDB_MODE"):
            self._run: Any = wandb.init(
                dir=str(run_dir.path),
                name=run_dir.path.name,
                id=_run_id(run_dir),
                resume="allow",
                config=_config(run_dir),
            )
        self._run.define_metric("*", step_metric="train/global_step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        # Not wandb's own step: it refuses to go back, which a resume from an earlier checkpoint does.
        self._run.log({**{tag(name): value for name, value in scalars.items()}, "train/global_step": step})

    def close(self) -> None:
        self._run.finish()


class SwanlabSink:
    """SwanLab; settings come from its own SWANLAB_* variables."""

    def __init__(self, run_dir: RunDir) -> None:
        self._swanlab: Any = _require("swanlab")
        with _starting("swanlab", "SWANLAB_MODE"):
            self._swanlab.init(
                experiment_name=run_dir.path.name,
                logdir=str(run_dir.path / "swanlog"),
                config=_config(run_dir),
            )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._swanlab.log({tag(name): value for name, value in scalars.items()}, step=step)

    def close(self) -> None:
        self._swanlab.finish()


def _require(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--report_to {module} needs the package {module}, which cannot be imported here ({error}). "
            f"Install it with `pip install {module}`, or leave {module} out of --report_to."
        ) from error


@contextmanager
def _starting(name: str, mode: str) -> Iterator[None]:
    """Whatever a service refuses at its start, no login before all, becomes the flag's error."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"--report_to {name} cannot start: {reason} Log in with `{name} login`, set {mode}=offline, or "
            f"leave {name} out of --report_to."
        ) from error


def _run_id(run_dir: RunDir) -> str:
    """The same for every resume of this run, different from same-named runs of other output directories."""
    return f"{run_dir.path.parent.name}-{run_dir.path.name}".replace("/", "-")


def _config(run_dir: RunDir) -> dict[str, Any]:
    return run_dir.read_args() if run_dir.args_json.exists() else {}
