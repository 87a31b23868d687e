"""Hugging Face, by huggingface_hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from raytune_rl.export.errors import (
    HubError,
    HubNameError,
    HubPermissionError,
    HubTokenError,
    HubUnreachableError,
)
from raytune_rl.export.hub import COMMIT_MESSAGE, RemoteFile
from raytune_rl.models.hub import first_line

TOKEN_VARIABLE = "HF_TOKEN"
TOKEN_PAGE = "https://huggingface.co/settings/tokens"


def stored_token() -> str | None:
    """From the environment, else from `hf auth login`."""
    return get_token()


class HuggingFace:
    """See `Hub`."""

    name = "Hugging Face"
    failures: tuple[type[BaseException], ...] = (HTTPError, OSError, ValueError, RuntimeError)

    def __init__(self, token: str) -> None:
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
        self.endpoint = str(self._api.endpoint)

    def username(self) -> str:
        return str(self._api.whoami().get("name") or "")

    def create(self, repo_id: str, *, private: bool) -> bool:
        if self._api.repo_exists(repo_id):
            return False
        # exist_ok: a namespace's owner may allow writing to a repository and not creating one
        self._api.create_repo(repo_id, private=private, exist_ok=True)
        return True

    def upload(self, repo_id: str, folder: Path, files: Sequence[str]) -> None:
        self._api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=COMMIT_MESSAGE,
            allow_patterns=[glob.escape(file) for file in files],
        )

    def files(self, repo_id: str) -> dict[str, RemoteFile]:
        try:
            listed = [e for e in self._api.list_repo_tree(repo_id, recursive=True) if isinstance(e, RepoFile)]
        except (RevisionNotFoundError, EntryNotFoundError):
            return {}  # a repository without a commit
        # A large file's blob is its pointer, whose hash says nothing about the local file.
        return {
            e.path: RemoteFile(e.size, sha256=e.lfs.sha256)
            if e.lfs
            else RemoteFile(e.size, git_sha1=e.blob_id)
            for e in listed
        }

    def url(self, repo_id: str) -> str:
        return f"{self.endpoint}/{repo_id}"

    def is_connection_error(self, error: BaseException) -> bool:
        if isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled)):
            return False  # it did answer, or was not asked
        return isinstance(error, (HTTPError, ConnectionError, TimeoutError))

    def named(self, error: BaseException, repo_id: str, logged: Sequence[BaseException]) -> HubError:
        while not isinstance(error, (HTTPError, OfflineModeIsEnabled)) and error.__cause__ is not None:
            error = error.__cause__  # a worker thread's error comes wrapped
        said = f"({getattr(error, 'server_message', None) or first_line(error)})"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, OfflineModeIsEnabled):
            return HubUnreachableError(
                "Nothing is uploaded while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set. Unset it to "
                f"push {repo_id}."
            )
        if isinstance(error, HFValidationError):
            return HubNameError(f"{self.name} does not accept {repo_id} {said}. Check --hub_model_id.")
        # A repository that the token cannot see comes as 401 too.
        if status == 401 and not isinstance(error, RepositoryNotFoundError):
            return HubTokenError(
                f"{self.endpoint} does not accept the token {said}. Make a new one on {TOKEN_PAGE} and "
                f"pass it in {TOKEN_VARIABLE} or as --hub_token."
            )
        if status == 403 or isinstance(error, RepositoryNotFoundError):
            return HubPermissionError(
                f"The token may not write to {repo_id} on {self.name} {said}. It needs the permission to "
                "write, and its owner the right to write in that namespace; or choose another "
                "--hub_model_id."
            )
        if self.is_connection_error(error):
            return HubUnreachableError(
                f"{self.endpoint} cannot be reached {said}. Check the network, the proxy and HF_ENDPOINT, "
                "and run the command again: it goes on where it stopped."
            )
        return HubError(
            f"{self.name} did not take the upload to {repo_id} {said}. Run the command again: it goes on "
            "where it stopped."
        )
