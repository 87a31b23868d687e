"""Secrets stay out of what a run writes down and says."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

_ALWAYS = {
    "secret", "secrets", "password", "passwd", "passphrase", "apikey", "credential", "credentials",
}  # fmt: skip
_TOKEN = {"token", "tokens"}
# `eos_token`, `special_tokens`... name pieces of a vocabulary, which whoever reloads the run needs.
_VOCABULARY = {"eos", "bos", "pad", "unk", "mask", "sep", "cls", "stop", "special", "image", "video", "audio"}
# Names that mean a secret as a parameter of a URL, and may mean anything elsewhere. Pre-signed URLs of the
# object stores say signature and sig, FTP-like ones pwd, web ones auth, jwt and key.
_IN_URL = {"signature", "sig", "sas", "pwd", "pass", "auth", "jwt", "key", "session", "sid", "authorization"}
HIDDEN = "***"

_URL = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"'<>]+")
_USER = re.compile(r"(?P<scheme>^[a-zA-Z][a-zA-Z0-9+.-]*://)[^/?#]*@")
# A URL inside a parameter of another is percent-encoded, its own parameters with it.
_START = r"(?:(?<=%3[Ff])|(?<=%26)|(?<=%23)|(?<![\w.%-]))"
_PARAMETER = re.compile(
    _START + r"(?P<name>[\w.-]+)(?P<is>=|%3[Dd])(?P<value>(?:(?!%26|%23)[^&;#\s\"'<>,)\]}])+)"
)
_KNOWN = re.compile(
    r"(?:\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-)[\w-]{16,}"
    r"|\bms-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<=[Bb]earer )[\w.~+/=-]{16,}|(?<=Authorization: Basic )[\w+/=]+)"
)
"""Tokens that are known by their look: of Hugging Face, OpenAI, GitHub, GitLab, Slack, ModelScope, AWS."""


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with null in place of secrets, at any depth.

    Null are: everything under a key with the word secret, password, credential or api key; text (or a list of
    text) under a key with the word token. Numbers such as `max_new_tokens` and vocabulary such as `eos_token`
    stay. Other text goes through `redact_text`.
    """
    return {str(key): _redact(_words(str(key)), value) for key, value in config.items()}


def redact_texts(value: Any) -> Any:
    """A value of JSON with `redact_text` over every text in it, keys too. Unlike in `redact`, no key makes a
    value null."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {redact_texts(key): redact_texts(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_texts(item) for item in value]
    return value


def hide_in_tracebacks() -> None:
    """From now on an exception that ends the program is printed by `redact_text`, unless somebody else shows
    it."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_redacted


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None, /) -> None:
    import traceback  # --help has no use for it

    print(redact_text("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def redact_text(text: str) -> str:
    """Text without the secrets that URLs and error messages carry.

    `user:password@` is cut out of URLs; of their parameters, those with a secret's name (token, api_key,
    X-Amz-Signature, ...) keep the name and lose the value, as does `name=value` elsewhere where the name
    can mean nothing else. Tokens that are known by their look go wherever they stand.
    """
    if "://" in text:
        text = _URL.sub(lambda found: _PARAMETER.sub(_hidden_in_url, _without_user(found[0])), text)
    if "=" in text:
        text = _PARAMETER.sub(_hidden, text)
    return _KNOWN.sub(HIDDEN, text)


def _without_user(url: str) -> str:
    return _USER.sub(r"\g<scheme>", url)


def _hidden(found: re.Match[str], in_url: bool = False) -> str:
    words, value = _words(found["name"]), found["value"]
    secret = _is_secret(words) or (in_url and bool(words & _IN_URL))
    if not secret and words & _TOKEN and not words & _VOCABULARY:
        # `max_tokens=512` counts, `?token=512` does not.
        secret = not value.isdigit() or (in_url and found["name"].lower().endswith("token"))
    kept = _PARAMETER.sub(_hidden_in_url if in_url else _hidden, value)  # a URL may stand in it
    return f"{found['name']}{found['is']}{HIDDEN if secret else kept}"


def _hidden_in_url(found: re.Match[str]) -> str:
    return _hidden(found, in_url=True)


def _is_secret(words: set[str]) -> bool:
    return bool(words & _ALWAYS) or {"api", "key"} <= words or {"access", "key"} <= words


def _redact(words: set[str], value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if _is_secret(words):
        return None
    if words & _TOKEN and not words & _VOCABULARY and _is_text(value):
        return None
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, (list, tuple)):
        return [_redact(set(), item) for item in value]
    if isinstance(value, str):
        return redact_text(value)
    return value


def _is_text(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_is_text(item) for item in value)
    return isinstance(value, (str, bytes)) or hasattr(value, "get_secret_value")


def _words(key: str) -> set[str]:
    """`hubToken`, `HUB_TOKEN` and `hub-token` are all {hub, token}; `AWSAccessKeyId` is {aws, access, key,
    id}.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key)
    return {word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word}
