"""The interface of a hub to an export, whichever it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raytune_rl.export.errors import HubError

COMMIT_MESSAGE = "Upload with raytune-rl"


@dataclass(frozen=True)
class RemoteFile:
    """A file as a hub lists it.

    Attributes:
        size: bytes.
        sha256: hexadecimal, of the content; None if the hub does not tell.
        git_sha1: hexadecimal, of the content as a git blob; None likewise.
    """

    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    def holds(self, file: Path) -> bool | None:
        """Whether its content is that of a local file; None if only the size is known, and is the same."""
        if file.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            with file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() == self.sha256
        if self.git_sha1 is not None:
            content = file.read_bytes()
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.git_sha1
        return None


class Hub(Protocol):
    """A hub's own client, for one token. Methods raise what the client raises, which `named` translates.

    Attributes:
        name: for messages.
        endpoint: the address in use.
        failures: everything that its client may raise.
    """

    name: str
    endpoint: str
    failures: tuple[type[BaseException], ...]

    def username(self) -> str:
        """Whose token it is."""
        ...

    def create(self, repo_id: str, *, private: bool) -> bool:
        """Makes the repository unless it is there; returns whether it is new.

        Raises:
            HubNameError: the name is taken by a repository that the token cannot see.
        """
        ...

    def upload(self, repo_id: str, folder: Path, files: Sequence[str]) -> None:
        """Uploads files under their relative names; contents that the hub has already are not sent again.

        Args:
            repo_id: owner/name.
            folder: where the files are.
            files: relative names with forward slashes.
        """
        ...

    def files(self, repo_id: str) -> dict[str, RemoteFile]:
        """The files in the repository, by relative name."""
        ...

    def url(self, repo_id: str) -> str:
        """The page of the repository."""
        ...

    def is_connection_error(self, error: BaseException) -> bool:
        """Whether a second attempt may help."""
        ...

    def named(self, error: BaseException, repo_id: str, logged: Sequence[BaseException]) -> HubError:
        """The error in our words, with the hub's in brackets; not scrubbed yet.

        Args:
            error: one of `failures`.
            repo_id: what was being worked on.
            logged: exceptions that the client has only logged.
        """
        ...
