"""ModelScope, by the client that the modelscope package is made of."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import requests
from modelscope_hub import HubApi, HubConfig
from modelscope_hub import errors as client

from raytune_rl.export.errors import (
    HubError,
    HubNameError,
    HubPermissionError,
    HubTokenError,
    HubUnreachableError,
)
from raytune_rl.export.hub import COMMIT_MESSAGE, RemoteFile
from raytune_rl.models.hub import first_line

TOKEN_VARIABLE = "MODELSCOPE_API_TOKEN"
TOKEN_PAGE = "https://modelscope.cn/my/myaccesstoken"
_MODEL = "model"
# The most telling first: after a refusal the client goes on and fails for lesser reasons too.
_REASONS = (
    client.AuthenticationError,
    client.PermissionDeniedError,
    client.QuotaExceededError,
    client.NotExistError,
    client.NetworkError,
    client.APIError,
)


def stored_token() -> str | None:
    """From the environment, else from `modelscope login`."""
    return HubConfig().token or None


class ModelScope:
    """See `Hub`."""

    name = "ModelScope"
    failures: tuple[type[BaseException], ...] = (
        client.HubError,
        requests.RequestException,
        OSError,
        ValueError,
        RuntimeError,
    )

    def __init__(self, token: str) -> None:
        config = HubConfig(token=token)
        self._api = HubApi(config)
        self.endpoint = str(config.endpoint)

    def username(self) -> str:
        return self._api.whoami().username or ""

    def create(self, repo_id: str, *, private: bool) -> bool:
        try:
            self._api.get_repo(repo_id, _MODEL)
        except client.NotExistError:
            pass
        else:
            return False
        taken = False
        try:
            self._api.create_repo(repo_id, _MODEL, visibility="private" if private else "public")
        except client.AlreadyExistsError:
            taken = True
        if taken:
            raise HubNameError(
                f"{repo_id} is taken on {self.name}, by a repository that this token cannot see. Choose "
                "another --hub_model_id, or a token that may write there."
            )
        return True

    def upload(self, repo_id: str, folder: Path, files: Sequence[str]) -> None:
        # Without its cache: that remembers what it once committed, also when something else is there by now.
        self._api.upload_folder(
            repo_id,
            _MODEL,
            folder,
            commit_message=COMMIT_MESSAGE,
            allow_patterns=[glob.escape(file) for file in files],
            use_cache=False,
        )

    def files(self, repo_id: str) -> dict[str, RemoteFile]:
        try:
            listed = self._api.list_repo_files(repo_id, _MODEL)
        except client.NotExistError:
            return {}  # a repository without a commit
        listed = [file for file in listed if file.type != "tree"]
        return {f.path: RemoteFile(int(f.size or 0), sha256=f.sha256 or None) for f in listed}

    def url(self, repo_id: str) -> str:
        return f"{self.endpoint}/models/{repo_id}"

    def is_connection_error(self, error: BaseException) -> bool:
        return isinstance(error, (client.NetworkError, requests.ConnectionError, requests.Timeout))

    def named(self, error: BaseException, repo_id: str, logged: Sequence[BaseException]) -> HubError:
        uploading = isinstance(error, (client.StorageError, RuntimeError))
        if uploading:
            # What an upload raises at its end is a count of failed files.
            error = next((e for reason in _REASONS for e in logged if isinstance(e, reason)), error)
        said = f"({first_line(error)})"
        if isinstance(error, client.AuthenticationError):
            return HubTokenError(
                f"{self.endpoint} does not accept the token {said}. Make a new one on {TOKEN_PAGE} and "
                f"pass it in {TOKEN_VARIABLE} or as --hub_token."
            )
        if isinstance(error, (client.PermissionDeniedError, client.NotExistError)):
            return HubPermissionError(
                f"The token may not write to {repo_id} on {self.name} {said}. It needs the permission to "
                "write, and its owner the right to write in that namespace; or choose another "
                "--hub_model_id."
            )
        if self.is_connection_error(error):
            return HubUnreachableError(
                f"{self.endpoint} cannot be reached {said}. Check the network, the proxy and "
                "MODELSCOPE_ENDPOINT, and run the command again: it goes on where it stopped."
            )
        if isinstance(error, client.InvalidParameter) and not uploading:
            return HubNameError(f"{self.name} does not accept {repo_id} {said}. Check --hub_model_id.")
        return HubError(
            f"{self.name} did not take the upload to {repo_id} {said}. Run the command again: it goes on "
            "where it stopped."
        )
