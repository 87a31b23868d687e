"""Errors of an export, by name. Each message says what to do."""

from __future__ import annotations

from raytune_rl.errors import RaytuneError


class ExportError(RaytuneError):
    """The target cannot be written, or there is nothing in the source that could be exported."""


class ParityError(ExportError):
    """The merged model does not answer as base and adapter do; it has been removed."""


class HubError(RaytuneError):
    """The hub refused, for a reason that has no class of its own here; its words are in the message."""


class HubTokenError(HubError):
    """There is no token, or the hub does not know it (HTTP 401)."""


class HubPermissionError(HubError):
    """The token is known and may not write there (HTTP 403, or 404 on what it may not even see)."""


class HubNameError(HubError):
    """`--hub_model_id` is no name of a repository, or the name is taken by one that the token cannot see."""


class HubUnreachableError(HubError):
    """The hub did not answer, after several attempts."""
