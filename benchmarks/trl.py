"""TRL in an environment and a process of its own, which takes a step when it is told to."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.clock import Clock

TRL = "trl==1.16.0"
PINNED = ("torch", "transformers", "accelerate", "datasets")
ROOT = Path(__file__).parents[1]
OWN_PYTHON = ROOT / ".cache" / "trl" / "bin" / "python"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Gives a benchmark the flags about TRL."""
    parser.add_argument("--no_trl", action="store_true", help="leave TRL out")
    parser.add_argument(
        "--trl_python",
        type=Path,
        help=f"the Python of an environment with {TRL}; default: one that is made under .cache",
    )


def python_of(options: argparse.Namespace) -> tuple[Path, str | None]:
    """The Python that has TRL, whose environment is made unless it is there; and why there is none."""
    if options.no_trl:
        return OWN_PYTHON, "not asked for"
    if options.trl_python is not None:
        return options.trl_python, None if options.trl_python.is_file() else "no such --trl_python"
    if OWN_PYTHON.is_file():
        return OWN_PYTHON, None
    here = ROOT / ".cache" / "uv" / "bin" / "uv"
    uv = str(here) if here.is_file() else "uv"
    same = [f"{name}=={version(name)}" for name in PINNED]
    words = [uv, "pip", "install", "--quiet", "--python", str(OWN_PYTHON), TRL, *same]
    try:
        own = str(OWN_PYTHON.parents[1])
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, own], check=True)
        subprocess.run(words, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return OWN_PYTHON, lines[-1] if lines else str(error)
    return OWN_PYTHON, None


class Trl:
    """One trainer of TRL.

    Args:
        python: Of TRL's environment.
        program: A file of `peers/`.
        flags: Of the program.
        threads: Of torch.
        errors: File for what it prints.
        cpu: Count its CPU-seconds instead of the seconds that it says.
    """

    def __init__(
        self, python: Path, program: str, flags: Sequence[str], threads: int, errors: Path, cpu: bool
    ) -> None:
        # Not as a module of this folder, and without our environment's packages.
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._errors = errors
        with errors.open("w") as file:
            self._process = subprocess.Popen(
                [str(python), str(ROOT / "benchmarks" / "peers" / program), *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environ | {"OMP_NUM_THREADS": str(threads)},
            )
        self._clock = Clock(cpu=True, root=self._process.pid) if cpu else None

    def answer(self) -> dict[str, Any]:
        """The next line that it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"TRL failed:\n{self._errors.read_text()[-2000:]}")
        return dict(json.loads(line))

    def step(self) -> dict[str, Any]:
        """Takes a step; what it says of it, and "seconds" by the clock that was asked for."""
        assert self._process.stdin is not None
        began = self._clock.now() if self._clock else 0.0
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        said = self.answer()
        return said if self._clock is None else said | {"seconds": self._clock.now() - began}

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
