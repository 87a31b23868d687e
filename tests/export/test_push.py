from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import ExportConfig
from raytune_rl.errors import CheckpointError, RaytuneError
from raytune_rl.export import run
from raytune_rl.export.errors import (
    ExportError,
    HubError,
    HubNameError,
    HubPermissionError,
    HubTokenError,
    HubUnreachableError,
)
from raytune_rl.export.push import Pushed
from tests.export.conftest import PUSHED
from tests.export.fake_hubs import OWNER, TOKEN, FakeHub, FakeHuggingFace, FakeModelScope, Reply

NAME = f"{OWNER}/tuned"


def push(hub: FakeHub, folder: Path, lines: list[str] | None = None, **settings: Any) -> Pushed:
    settings = {"hub_model_id": NAME, "hub_token": TOKEN, **settings}
    config = ExportConfig(
        adapters=folder, push_to_hub=True, use_hf=isinstance(hub, FakeHuggingFace), **settings
    )
    pushed = run(config, [].append if lines is None else lines.append).pushed
    assert pushed is not None
    return pushed


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PUSHED}


def test_the_files_arrive_byte_for_byte(hub: FakeHub, checkpoint: Path) -> None:
    lines: list[str] = []
    pushed = push(hub, checkpoint, lines)
    assert hub.repos == {NAME: contents(checkpoint)}
    assert hub.private == {NAME: True}
    assert pushed.repo_id == NAME
    assert pushed.files == pushed.sent == PUSHED
    assert pushed.created
    assert pushed.url.startswith(hub.endpoint)
    assert pushed.url.endswith(NAME)
    assert "of use only here, not uploaded: optimizer, trainer_state.json" in lines
    assert lines[-1] == f"pushed: {pushed.url}"


def test_a_name_without_namespace_is_the_users(hub: FakeHub, checkpoint: Path) -> None:
    pushed = push(hub, checkpoint, hub_model_id="tuned", hub_private_repo=False)
    assert pushed.repo_id == NAME
    assert hub.repos == {NAME: contents(checkpoint)}
    assert hub.private == {NAME: False}


def test_a_second_push_sends_what_has_changed(hub: FakeHub, checkpoint: Path) -> None:
    push(hub, checkpoint)
    hub.seen.clear()
    pushed = push(hub, checkpoint, hub_private_repo=False)
    assert pushed.sent == ()
    assert not pushed.created
    assert {line.split()[0] for line in hub.seen} == {"GET"}

    (checkpoint / "tokenizer.json").write_text("[]" * 5)  # of the same size
    hub.repos[NAME]["adapter_model.safetensors"] = b"x" * 256 * 300  # somebody else's, of the same size
    assert push(hub, checkpoint).sent == ("adapter_model.safetensors", "tokenizer.json")
    assert hub.repos == {NAME: contents(checkpoint)}
    assert hub.private == {NAME: True}
    assert len(hub.put) == 1, "the hub had the content of the weights"


def test_a_push_that_stopped_goes_on(hub: FakeHub, checkpoint: Path) -> None:
    hub.fail = lambda line: Reply(403, {"Message": "not now"}) if "/commit/" in line else None
    with pytest.raises(HubPermissionError, match=r"not now|403"):
        push(hub, checkpoint)
    assert hub.repos == {NAME: {}}
    hub.fail = lambda line: None
    push(hub, checkpoint)
    assert hub.repos == {NAME: contents(checkpoint)}
    assert len(hub.put) == 1, "the blob of the first attempt is sent again"


def test_a_cut_line_is_tried_again(hub: FakeHub, checkpoint: Path) -> None:
    cuts = ["drop", "drop"]
    hub.fail = lambda line: cuts.pop() if cuts and line.startswith("POST") else None
    lines: list[str] = []
    push(hub, checkpoint, lines)
    assert len([line for line in lines if "cannot be reached" in line and "trying again" in line]) == 2
    assert hub.repos == {NAME: contents(checkpoint)}


def test_an_unknown_token(hub: FakeHub, checkpoint: Path) -> None:
    with pytest.raises(HubTokenError, match="does not accept the token") as caught:
        push(hub, checkpoint, hub_token="tok-another-one")
    assert "tok-another-one" not in str(caught.value)
    assert hub.repos == {}


def test_a_token_that_may_not_write(hub: FakeHub, checkpoint: Path) -> None:
    hub.repos[NAME] = {}
    hub.readonly = True
    with pytest.raises(HubPermissionError, match="may not write to alice/tuned"):
        push(hub, checkpoint)
    assert hub.repos == {NAME: {}}


def test_no_token(hub: FakeHub, checkpoint: Path) -> None:
    variable = "HF_TOKEN" if isinstance(hub, FakeHuggingFace) else "MODELSCOPE_API_TOKEN"
    with pytest.raises(HubTokenError, match=f"needs a token.*{variable}"):
        push(hub, checkpoint, hub_token=None)
    assert hub.seen == []


@pytest.mark.parametrize("token", ["tok-1", "with a blank", "of-letters-ä"])
def test_what_cannot_be_a_token(hub: FakeHub, checkpoint: Path, token: str) -> None:
    with pytest.raises(HubTokenError, match="is none") as caught:
        push(hub, checkpoint, hub_token=token)
    assert token not in str(caught.value)
    assert hub.seen == []


@pytest.mark.parametrize(
    "name", ["<your-namespace>/<model-name>", "a/b/c", "a b", "/x", "../x", "a/-b", "a/b--c"]
)
def test_what_cannot_be_a_name(hub: FakeHub, checkpoint: Path, name: str) -> None:
    with pytest.raises(HubNameError, match="is no name"):
        push(hub, checkpoint, hub_model_id=name)
    assert hub.seen == []


@pytest.mark.parametrize("hub", ["modelscope"], indirect=True)
def test_a_name_that_is_taken(hub: FakeHub, checkpoint: Path) -> None:
    hub.hidden.add(NAME)
    with pytest.raises(HubNameError, match="is taken"):
        push(hub, checkpoint)


def test_no_hub_at_that_address(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "modelscope_hub._openapi.API_MAX_RETRIES", 1
    )  # it would try for half a minute by itself
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
        lines: list[str] = []
        with pytest.raises(
            HubUnreachableError, match=f"{address} cannot be reached .*goes on where it stopped"
        ):
            push(hub, checkpoint, lines, hub_model_id="tuned")
    assert len(lines) == 3
    assert lines[-1].endswith("trying again in 0 s")


@pytest.mark.parametrize("hub", ["huggingface"], indirect=True)
def test_offline_mode_is_told(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE"):
        push(hub, checkpoint)


def test_a_hub_that_loses_a_file_is_told(hub: FakeHub, checkpoint: Path) -> None:
    def lose(line: str) -> None:
        if line.endswith(("/repo/files", "/tree/main")):
            hub.repos[NAME].pop("empty.txt", None)

    hub.fail = lose
    with pytest.raises(HubError, match=r"does not list 1 of 5 files as they are here \(first: empty.txt\)"):
        push(hub, checkpoint)


ECHO = Reply(
    400, {"error": f"bad {TOKEN}", "Message": f"bad token {TOKEN}"}, {"X-Error-Message": f"bad {TOKEN}"}
)


@pytest.mark.parametrize("where", ["", "/commit/"])
def test_the_token_shows_nowhere(
    hub: FakeHub,
    checkpoint: Path,
    quiet_environment: Path,
    where: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A hub that repeats the token in its answers is the worst case; the clients log them."""
    hub.fail = lambda line: ECHO if where in line and "/blob/" not in line else None
    loggers = [
        logging.getLogger(name) for name in ("", "modelscope_hub", "huggingface_hub", "urllib3", "httpx2")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(caplog.handler)
    lines: list[str] = []
    try:
        with pytest.raises(HubError) as caught:
            push(hub, checkpoint, lines)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(caplog.handler)
            logger.setLevel(level)
    error = caught.value
    assert "***" in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None, "the client's error holds the request, and so the token"
    output = capfd.readouterr()
    written = b"".join(p.read_bytes() for p in quiet_environment.rglob("*") if p.is_file())
    texts = ["".join(traceback.format_exception(error)), caplog.text, output.out, output.err, *lines]
    assert TOKEN not in "\n".join(texts)
    assert TOKEN.encode() not in written
    if isinstance(hub, FakeModelScope):
        assert "***" in caplog.text, "the client logged it, so that scrubbing was put to the test"


def test_a_file_that_holds_the_token_is_not_uploaded(hub: FakeHub, checkpoint: Path) -> None:
    (checkpoint / "args.json").write_text(f'{{"hub_token": "{TOKEN}"}}')
    with pytest.raises(ExportError, match=r"args\.json holds the hub token") as caught:
        push(hub, checkpoint)
    assert TOKEN not in str(caught.value)
    assert hub.seen == []


@pytest.mark.parametrize("hub", ["modelscope"], indirect=True)
def test_only_whole_models_are_uploaded(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="There is no folder"):
        push(hub, tmp_path / "absent")
    with pytest.raises(ExportError, match="no model and no adapter"):
        push(hub, checkpoint.parent)
    (checkpoint / "manifest.json").write_text('{"files": {"tokenizer.json": 11}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 10 bytes instead of 11"):
        push(hub, checkpoint)
    assert hub.seen == []


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_the_seeds_command(hub: FakeHub, checkpoint: Path, quiet_environment: Path, way: str) -> None:
    """In a process of its own, with the addresses set as the clients document it."""
    hugging_face = isinstance(hub, FakeHuggingFace)
    own = {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(quiet_environment / "hf"),
        "MODELSCOPE_DOMAIN": hub.endpoint,
    }
    command = [sys.executable, "-m", "raytune_rl.cli", "export", "--adapters", str(checkpoint)]
    command += ["--push_to_hub", "true", "--hub_model_id", NAME]
    if way == "flag":
        command += ["--hub_token", TOKEN]
    else:
        own["HF_TOKEN" if hugging_face else "MODELSCOPE_API_TOKEN"] = TOKEN
    if hugging_face:
        command += ["--use_hf", "true"]
    environment = {**os.environ, **own}
    del environment["MODELSCOPE_ENDPOINT"]  # the older of the two names
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.repos == {NAME: contents(checkpoint)}
    assert done.stdout.splitlines()[-1].startswith(f"pushed: {hub.endpoint}")
    assert TOKEN not in done.stdout + done.stderr
    written = [p for p in quiet_environment.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert written == []


def test_errors_end_the_command_with_a_line(
    hub: FakeHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from raytune_rl import cli

    assert issubclass(HubError, RaytuneError)
    argv = ["export", "--adapters", str(checkpoint), "--push_to_hub", "--hub_model_id", NAME]
    argv += ["--hub_token", "tok-another-one", "--use_hf", str(isinstance(hub, FakeHuggingFace))]
    assert cli.main(argv) == 1
    assert "does not accept the token" in capsys.readouterr().err
