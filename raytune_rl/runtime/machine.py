"""The needs of a cluster of one's own, and of the libraries in its workers, on a machine: a folder short
enough for sockets, a home for caches, a token.
"""

from __future__ import annotations

import os
import pwd
import secrets
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from raytune_rl.errors import ConfigError

SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket on Linux."""
_BELOW = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.99"
LONGEST_TMPDIR = SOCKET_PATH_BYTES - len(_BELOW)
"""Bytes that are left for the temporary folder beside what Ray adds to it."""
SHORT = Path("/tmp")


def ray_folder(environ: Mapping[str, str]) -> Path | None:
    """The folder for Ray's sessions where TMPDIR is too long for it; None where Ray's own choice will do.

    Raises:
        ConfigError: RAY_TMPDIR is too long, which is the user's own word on it.
    """
    named = environ.get("RAY_TMPDIR")
    if named:
        if len(os.fsencode(named)) > LONGEST_TMPDIR:
            raise ConfigError(
                f"RAY_TMPDIR={named} is too long: Ray opens sockets below it, whose paths a system limits, "
                f"so it may have {LONGEST_TMPDIR} bytes. Name a shorter one, or unset it."
            )
        return None
    if len(os.fsencode(environ.get("TMPDIR", ""))) <= LONGEST_TMPDIR:
        return None
    return private_folder("ray")


def short_folder(room: int) -> Path:
    """Where folders may be made in which sockets lie: the temporary one (TMPDIR), or /tmp where that one is
    too long.

    Args:
        room: Bytes of what comes after it in the longest path.
    """
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder)) + room <= SOCKET_PATH_BYTES else SHORT


def private_folder(name: str) -> Path:
    """A folder of this user below /tmp, the same for each of his runs, that nobody else can open (0700).

    Raises:
        ConfigError: /tmp cannot be written to.
    """
    folder = SHORT / f"{name}-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            # Somebody else was there first.
            return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=SHORT))
    except OSError as error:
        raise ConfigError(
            f"a folder with a short path is needed in {SHORT}, which cannot be written to ({error}): set "
            f"RAY_TMPDIR to one of at most {LONGEST_TMPDIR} bytes."
        ) from error
    return folder


def missing_identity(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that a user without a name or a home needs in the environment, as containers run with any
    user id: libraries look both up for their caches.

    Returns:
        USER, and HOME where there is none that can be written to; nothing for an ordinary user.
    """
    variables: dict[str, str] = {}
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
        named = True
    except KeyError:
        home, named = "", False
    home = environ.get("HOME") or home
    if not named and not any(environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        variables["USER"] = f"user{os.getuid()}"
    if not home or not os.access(home, os.W_OK | os.X_OK):
        variables["HOME"] = str(private_folder("raytune_rl"))
    return variables


def make_token(environ: Mapping[str, str]) -> dict[str, str]:
    """Gives a cluster that is started here the token that Ray asks for, unless the user has seen to that or
    has set RAY_AUTH_MODE=disabled. Ray would make one, too, for everybody on the machine to read.

    Returns:
        What to add to the environment: the token itself, where it cannot be kept in ~/.ray.
    """
    given = any(environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if given or environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = secrets.token_hex(32)
    kept = Path(environ.get("HOME") or Path.home()) / ".ray" / "auth_token"
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent) as draft:  # readable by its owner only
            draft.write(token)
            draft.flush()
            with suppress(FileExistsError):  # a run beside this one may have begun with it
                kept.hardlink_to(draft.name)
        if kept.read_text().strip():
            return {}
    except OSError:
        pass
    return {"RAY_AUTH_TOKEN": token}
