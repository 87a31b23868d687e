"""Secrets stay out of what a run writes down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ALWAYS = {"secret", "secrets", "password", "passwd", "passphrase", "apikey", "credential", "credentials"}
_TOKEN = {"token", "tokens"}
# `eos_token`, `special_tokens`... name pieces of a vocabulary, which whoever reloads the run needs.
_VOCABULARY = {"eos", "bos", "pad", "unk", "mask", "sep", "cls", "stop", "special", "image", "video", "audio"}
_URL_PASSWORD = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/@\s]+@")


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with null in place of secrets, at any depth.

    Null are: everything under a key with the word secret, password, credential or api key; text (or a list of
    text) under a key with the word token. Numbers such as `max_new_tokens` and vocabulary such as `eos_token`
    stay. A user:password@ inside a URL is cut out of any text.
    """
    return {str(key): _redact(_words(str(key)), value) for key, value in config.items()}


def _redact(words: set[str], value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if words & _ALWAYS or {"api", "key"} <= words or {"access", "key"} <= words:
        return None
    if words & _TOKEN and not words & _VOCABULARY and _is_text(value):
        return None
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, (list, tuple)):
        return [_redact(set(), item) for item in value]
    if isinstance(value, str):
        return _URL_PASSWORD.sub(r"\g<scheme>", value)
    return value


def _is_text(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_is_text(item) for item in value)
    return isinstance(value, (str, bytes)) or hasattr(value, "get_secret_value")


def _words(key: str) -> set[str]:
    """`hubToken`, `HUB_TOKEN` and `hub-token` are all {hub, token}."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return {word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word}
