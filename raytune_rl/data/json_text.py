"""JSON as rows are read from it: a key that stands twice is seen, and of a long text a part is in memory."""

from __future__ import annotations

import json
import re
from typing import Any, TextIO

_SPACE = re.compile(r"\s*")
_BLOCK = 2**20
_LONGEST_WORD = 16
"""More characters than a word or an escape of JSON has."""


class RepeatedKeyError(Exception):
    """An object of JSON has a key twice: nobody can say which of its values was meant."""

    def __str__(self) -> str:
        return f"an object has the key {self.args[0]!r} twice"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)


class JsonText:
    """A text file of which memory holds what is being decoded.

    Attributes:
        line: The line, from 1, of the first character that was not dropped.
    """

    def __init__(self, file: TextIO) -> None:
        self.line = 1
        self._file = file
        self._held, self._at = "", 0
        self._ended = False

    def peek(self) -> str:
        """The first character that is no white space, to which it moves; empty at the end."""
        while True:
            found = _SPACE.match(self._held, self._at)
            self.drop(0 if found is None else found.end() - self._at)
            if self._at < len(self._held) or not self._read():
                return self._held[self._at : self._at + 1]

    def decode(self) -> tuple[Any, int]:
        """The value that begins here, or what is wrong with its keys; and its length in characters.

        Raises:
            json.JSONDecodeError: It is broken; its place is counted from here.
        """
        decoder, repeated = DECODER, None
        while True:
            try:
                value, end = decoder.raw_decode(self._held, self._at)
                if end < len(self._held) or not self._read():  # a number may go on
                    return repeated or value, end - self._at
            except RepeatedKeyError as error:
                decoder, repeated = json.JSONDecoder(), error
            except json.JSONDecodeError as error:
                # Cut off where the text in memory ends, most likely: a string that is not closed, say.
                cut_off = error.pos > len(self._held) - _LONGEST_WORD or "string" in error.msg
                if not (cut_off and self._read()):
                    raise json.JSONDecodeError(
                        error.msg, self._held[self._at :], error.pos - self._at
                    ) from None
            except (ValueError, RecursionError) as error:
                raise json.JSONDecodeError(str(error), self._held[self._at :], 0) from None

    def ahead(self, count: int) -> str:
        return self._held[self._at : self._at + count]

    def drop(self, count: int) -> None:
        self.line += self._held.count("\n", self._at, self._at + count)
        self._at += count

    def _read(self) -> bool:
        """Reads as much again as is still wanted, at least a block; false at the end."""
        kept = self._held[self._at :]
        block = "" if self._ended else self._file.read(max(_BLOCK, len(kept)))
        if not block:
            self._ended = True
            return False
        self._held, self._at = kept + block, 0
        return True
