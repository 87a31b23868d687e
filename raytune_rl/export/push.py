"""Uploads a model or an adapter to a hub, by the hub's own client."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from raytune_rl.config import ExportConfig
from raytune_rl.errors import ConfigError
from raytune_rl.export.errors import HubError, HubNameError, HubTokenError
from raytune_rl.export.files import files_to_push
from raytune_rl.export.guard import Guard
from raytune_rl.export.hub import Hub
from raytune_rl.models.hub import first_line

Answer = TypeVar("Answer")

ATTEMPTS = 3
WAIT = wait_exponential_jitter(initial=1, max=20)
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
_SHORTEST_TOKEN = 8


@dataclass(frozen=True)
class Pushed:
    """The result of an upload.

    Attributes:
        hub: "ModelScope" or "Hugging Face".
        repo_id: owner/name, with the owner that was found if only a name was given.
        url: page of the repository.
        files: relative names of the model's files, all of which the hub lists as they are here.
        sent: those of them that were not there before.
        created: whether the repository is new.
    """

    hub: str
    repo_id: str
    url: str
    files: tuple[str, ...]
    sent: tuple[str, ...]
    created: bool


@dataclass(frozen=True)
class Destination:
    """Where to, checked as far as that goes offline. The token is inside `hub` and `guard` only."""

    hub: Hub
    guard: Guard
    name: str
    private: bool


def prepare(config: ExportConfig) -> Destination:
    """Checks name and token of a push.

    Raises:
        HubNameError: `--hub_model_id` is no name.
        HubTokenError: there is no token, or what is there is none.
    """
    name = config.hub_model_id or ""
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise HubNameError(
            f"--hub_model_id {name!r} is no name: write <your-namespace>/<model-name> with letters, "
            "digits, '-', '_' and '.'."
        )
    # One of the two clients, and only when something is pushed: neither is quick to import.
    if config.use_hf:
        from raytune_rl.export import huggingface as module
        from raytune_rl.export.huggingface import HuggingFace as Client
    else:
        from raytune_rl.export import modelscope as module  # type: ignore[no-redef]
        from raytune_rl.export.modelscope import ModelScope as Client  # type: ignore[assignment]
    given = config.hub_token.get_secret_value() if config.hub_token else module.stored_token()
    token = (given or "").strip()
    if not token:
        raise HubTokenError(
            f"Uploading to {Client.name} needs a token: make one that may write on {module.TOKEN_PAGE} and "
            f"pass it in the environment as {module.TOKEN_VARIABLE}, or as --hub_token."
        )
    if len(token) < _SHORTEST_TOKEN or not re.fullmatch(r"[!-~]+", token):
        raise HubTokenError(
            f"The token for {Client.name} ({len(token)} characters) is none: it is too short, or holds "
            f"blanks or letters that no token has. Copy it again from {module.TOKEN_PAGE}."
        )
    return Destination(Client(token), Guard(token), name, config.hub_private_repo)


def push(destination: Destination, folder: Path, say: Callable[[str], None]) -> Pushed:
    """Uploads what is in `folder`; run again after a failure, it goes on.

    Args:
        destination: from `prepare`.
        folder: a checkpoint with an adapter, or a model.
        say: takes the lines for the user.

    Raises:
        HubError: by name, see `raytune_rl.export.errors`.
        ExportError: there is no model in the folder, or one of its files holds the token.
        CheckpointError: it is a checkpoint that is not whole.
    """
    hub, guard = destination.hub, destination.guard
    files = files_to_push(folder, guard, say)
    session = _Session(destination, say)
    with guard.watch():
        repo_id = session.repo_id()
        created = session.ask(lambda: hub.create(repo_id, private=destination.private))
        remote = {} if created else session.ask(lambda: hub.files(repo_id))
        missing = [f for f in files if f not in remote or not remote[f].holds(folder / f)]
        if missing:
            kind = (
                f"new {'private' if destination.private else 'public'} repository"
                if created
                else "repository"
            )
            size = sum((folder / file).stat().st_size for file in missing)
            known = f", {len(files) - len(missing)} are there already" if len(missing) < len(files) else ""
            say(f"uploading {folder} ({len(missing)} files, {size:,} bytes{known}) to the {kind} {repo_id}")
            session.ask(lambda: hub.upload(repo_id, folder, missing))
            remote = session.ask(lambda: hub.files(repo_id))
        else:
            say(f"all {len(files)} files are in {repo_id} already")
        lacking = [f for f in missing if f not in remote or remote[f].holds(folder / f) is False]
        if lacking:
            raise HubError(
                f"{hub.name} took the upload to {repo_id} but does not list {len(lacking)} of {len(files)} "
                f"files as they are here (first: {lacking[0]}). Look at {hub.url(repo_id)} and run the "
                "command again."
            )
    say(f"pushed: {hub.url(repo_id)}")
    return Pushed(hub.name, repo_id, hub.url(repo_id), tuple(files), tuple(missing), created)


class _Session:
    """Calls of one push: retried where that may help, and failing in our words."""

    def __init__(self, destination: Destination, say: Callable[[str], None]) -> None:
        self._hub = destination.hub
        self._guard = destination.guard
        self._repo_id = destination.name
        self._say = say

    def repo_id(self) -> str:
        """owner/name; a bare name gets the token's owner."""
        if "/" not in self._repo_id:
            owner = self.ask(self._hub.username)
            if not owner:
                raise ConfigError(
                    f"{self._hub.name} does not tell whose token it is: write --hub_model_id "
                    f"<your-namespace>/{self._repo_id}."
                )
            self._repo_id = f"{owner}/{self._repo_id}"
            self._say(f"--hub_model_id has no namespace: {self._repo_id}")
        return self._repo_id

    def ask(self, action: Callable[[], Answer]) -> Answer:
        """The action's result.

        Raises:
            HubError: it failed, or still failed to connect at the last attempt.
        """
        retrying = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=WAIT,
            retry=retry_if_exception(self._hub.is_connection_error),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return retrying(action)
        except self._hub.failures as error:
            failure = self._hub.named(error, self._repo_id, self._guard.logged)
        # Raised out here without the client's error as its context: that holds the request, and so the token.
        raise type(failure)(self._guard.scrub(str(failure)))

    def _tell(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0
        reason = self._guard.scrub(first_line(error)) if error else ""
        self._say(f"{self._hub.name} cannot be reached ({reason}); trying again in {pause:.0f} s")
