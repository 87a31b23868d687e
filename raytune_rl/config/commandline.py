"""From the words of a command line to named values, before anything is known about types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_rl.config.flags import Flag
from raytune_rl.errors import ConfigError


@dataclass(frozen=True)
class Written:
    """A flag as it stands on the command line: its name, with underscores, and the words after it."""

    name: str
    words: tuple[str, ...]


def split(argv: Sequence[str]) -> tuple[str | None, list[Written]]:
    """Splits a command line into the config file in front, if there is one, and its flags in order.

    A word that starts with `--` and a letter is a flag; all else is a value, also `-1`.

    Raises:
        ConfigError: a word belongs to no flag.
    """
    _refuse_lone_blank(argv)
    words = list(argv)
    file = words.pop(0) if words and words[0].lower().endswith((".yaml", ".yml", ".json")) else None
    written: list[tuple[str, list[str]]] = []
    for word in words:
        if is_flag(word):
            name, equals, value = word[2:].partition("=")
            written.append((name.replace("-", "_"), [value] if equals else []))
        elif written:
            written[-1][1].append(word)
        else:
            raise ConfigError(
                f"{word!r} belongs to no flag. What comes first is a config file (*.yaml, *.json) or a "
                "--flag."
            )
    return file, [Written(name, tuple(values)) for name, values in written]


def is_flag(word: str) -> bool:
    """Whether a word names a flag."""
    return word.startswith("--") and word[2:3].isalpha()


def value_of(flag: Flag, words: tuple[str, ...]) -> Any:
    """The value that the words after a flag stand for; its type is left to the config class.

    Raises:
        ConfigError: too few or too many words.
    """
    if flag.kind == "list":
        return words
    if not words:
        if flag.kind == "bool":
            return True
        raise ConfigError(f"--{flag.name} needs a value ({flag.values}).")
    if len(words) > 1:
        shown = "" if flag.secret else ": " + " ".join(repr(word) for word in words)
        raise ConfigError(
            f"--{flag.name} takes one value, but {len(words)} follow it{shown}. "
            "Put a value that holds blanks in quotes."
        )
    word = words[0]
    # So that a command line can take back what a config file sets.
    unset = flag.optional and flag.values != "text" and not {word, "no"} & set(flag.choices)
    return None if unset and word.lower() in ("none", "null") else word


def values_of(settings: Mapping[str, tuple[str, ...]], flags: Mapping[str, Flag]) -> dict[str, Any]:
    """`value_of` for all flags that are known; the words of others stay as they are."""
    return {
        name: value_of(flags[name], words) if name in flags else words for name, words in settings.items()
    }


def _refuse_lone_blank(argv: Sequence[str]) -> None:
    if argv and argv[-1] and not argv[-1].strip():
        before = next((f" after {word}" for word in reversed(argv) if is_flag(word)), "")
        raise ConfigError(
            f"The command line ends in a lone blank{before}: there is a blank behind a backslash at the end "
            "of a "
            "line, so the shell did not read the lines after it. Remove that blank."
        )
