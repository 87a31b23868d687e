"""The command line as a program."""

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_rl import cli
from raytune_rl.errors import ConfigError, DataError

HEAVY = ("torch", "ray", "transformers", "vllm", "deepspeed", "datasets", "numpy", "peft", "matplotlib")
ROOT = Path(__file__).parents[1]
SFT = ["sft", "--model", "m", "--dataset", "d"]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "USE_HF", "MAX_PIXELS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


class Pipelines:
    """Stands in for the modules that commands are dispatched to, and keeps their calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.error: BaseException | None = None

    def module(self, name: str) -> types.ModuleType:
        module = types.ModuleType(name)

        def run(*args: Any, **kwargs: Any) -> object:
            self.calls.append((name, args, kwargs))
            if self.error is not None:
                raise self.error
            return object()

        module.run = run  # type: ignore[attr-defined]
        return module


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipelines]:
    stand_in = Pipelines()
    parts = ("pipelines.sft", "pipelines.online", "pipelines.preference", "export")
    for name in (f"raytune_rl.{part}" for part in parts):
        monkeypatch.setitem(sys.modules, name, stand_in.module(name))
    return stand_in


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ.copy())


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["sft", "--help"],
        ["rlhf", "--help"],
        ["export", "--help"],
        ["rlhf", "--modl", "m"],
    ],
)
def test_nothing_heavy_is_imported_before_dispatch(argv: list[str]) -> None:
    code = (
        "import sys; from raytune_rl.cli import main\n"
        f"main({argv!r})\n"
        f"sys.exit(','.join(name for name in {HEAVY!r} if name in sys.modules) or None)"
    )
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr


def test_a_config_is_made_without_anything_heavy() -> None:
    code = (
        "import sys, raytune_rl\n"
        "raytune_rl.RLHFConfig(model='m', dataset='d', reward_funcs='accuracy')\n"
        f"sys.exit(','.join(name for name in {HEAVY!r} if name in sys.modules) or None)"
    )
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr


def test_the_package_alone_imports_nothing_of_its_own() -> None:
    done = in_a_process("import sys, raytune_rl; sys.exit('pydantic' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_public_names_are_there() -> None:
    import raytune_rl

    assert raytune_rl.ConfigError is ConfigError
    assert raytune_rl.SFTConfig.COMMAND == "sft"
    assert set(raytune_rl.__all__) <= set(dir(raytune_rl))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = raytune_rl.nothing_like_it


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("sft", "rlhf", "export"):
        assert f"\n  {name} " in out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip()
    assert cli.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rlhf", "--help"]) == 0
    assert "--num_generations" in capsys.readouterr().out
    assert cli.main(["rlhf", "--rlhf_type", "simpo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--simpo_gamma" in shown
    assert "--num_generations" not in shown


def test_help_into_a_closed_pipe() -> None:
    code = "import sys; from raytune_rl.cli import main; sys.exit(main(['rlhf', '--help']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as it:
        assert it.stdout is not None
        assert it.stderr is not None
        it.stdout.close()
        assert it.stderr.read() == b""
    assert it.returncode == 0


def test_preferences_have_a_pipeline_of_their_own(pipelines: Pipelines) -> None:
    assert cli.main(["rlhf", "--model", "m", "--dataset", "d", "--rlhf_type", "kto", "--beta", "0.3"]) == 0
    ((name, (config,), _),) = pipelines.calls
    assert name == "raytune_rl.pipelines.preference"
    assert (config.rlhf_type, config.beta) == ("kto", 0.3)


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rhlf"]) == 2
    assert "Did you mean rlhf?" in capsys.readouterr().err


def test_commands_go_to_their_pipelines(pipelines: Pipelines, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SFT, "--seed", "1", "--seed", "2"]) == 0
    assert cli.main(["rlhf", "--model", "m", "--dataset", "d", "--reward_funcs", "accuracy"]) == 0
    assert cli.main(["export", "--adapters", "a", "--merge_lora", "true"]) == 0
    (sft, sft_args, sft_kwargs), (rlhf, rlhf_args, _), (export, export_args, export_kwargs) = pipelines.calls
    assert (sft, rlhf, export) == (
        "raytune_rl.pipelines.sft",
        "raytune_rl.pipelines.online",
        "raytune_rl.export",
    )
    assert sft_args[0].seed == 2
    assert sft_kwargs == export_kwargs == {}
    assert rlhf_args[0].reward_funcs == ("accuracy",)
    assert export_args[0].merge_lora
    err = capsys.readouterr().err
    assert err.count("--seed is given more than once") == 1
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("these do not go together"), 2, "these do not go together"),
        (DataError("a.jsonl line 3"), 1, "a.jsonl line 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_are_a_message_and_a_status(
    pipelines: Pipelines, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    pipelines.error = error
    assert cli.main(SFT) == status
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_defect_keeps_its_traceback(pipelines: Pipelines) -> None:
    pipelines.error = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        cli.main(SFT)


@pytest.mark.parametrize("name", ["grpo", "dpo", "ppo", "sft", "demo"])
def test_examples_answer_mistakes_as_the_command_does(name: str) -> None:
    assert "sys.exit(guarded(main))" in (ROOT / "examples" / f"{name}.py").read_text()


def test_a_guarded_program(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken() -> int:
        raise ConfigError("Unknown flag --max_stepz.")

    assert cli.guarded(lambda: 7) == 7
    assert cli.guarded(mistaken) == 2
    assert capsys.readouterr().err == "raytune-rl: Unknown flag --max_stepz.\n"


def test_a_wrong_flag_runs_nothing(pipelines: Pipelines, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SFT, "--lora_rank", "none"]) == 2
    assert "--lora_rank: 'none' is not a whole number" in capsys.readouterr().err
    assert pipelines.calls == []
