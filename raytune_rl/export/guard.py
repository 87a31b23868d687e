"""Keeps a secret out of everything that is printed, logged or raised while a client of a hub is at work."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import traceback
from collections.abc import Iterator
from typing import Any, TextIO
from urllib.parse import quote

_HIDDEN = "***"


class Guard:
    """Knows the secret, and nothing of it shows in its `repr`.

    Attributes:
        logged: exceptions that the client passed to its logger under `watch`. Some clients raise a summary at
            the end and tell the reason only there.
    """

    def __init__(self, secret: str) -> None:
        self._forms = tuple({secret, quote(secret, safe="")})
        self.logged: list[BaseException] = []

    def scrub(self, text: str) -> str:
        """`text` with asterisks in place of the secret."""
        for form in self._forms:
            text = text.replace(form, _HIDDEN)
        return text

    def found_in(self, content: bytes) -> bool:
        """Whether the secret is in the content of a file."""
        return any(form.encode() in content for form in self._forms)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Scrubs all log records, stdout and stderr; what goes to stdout is sent to stderr instead.

        The result of a command is what it says itself; a client's progress and report are not.
        """
        previous = logging.getLogRecordFactory()

        def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
            return self._clean(previous(*args, **kwargs))

        stream = _Scrubbed(sys.stderr, self)
        self.logged.clear()
        logging.setLogRecordFactory(factory)
        try:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                yield
        finally:
            logging.setLogRecordFactory(previous)

    def _clean(self, record: logging.LogRecord) -> logging.LogRecord:
        values = record.args.values() if isinstance(record.args, dict) else record.args or ()
        self.logged += [value for value in values if isinstance(value, BaseException)]
        try:
            text = record.getMessage()
        except (
            TypeError,
            ValueError,
        ):  # a malformed call of the client's; logging would report it with its values
            text = f"{record.msg} {record.args}"
        scrubbed = self.scrub(text)
        if scrubbed != text:
            record.msg, record.args = scrubbed, ()
        if record.exc_info and record.exc_info[0] is not None:
            trace = "".join(traceback.format_exception(*record.exc_info)).rstrip()
            if self.scrub(trace) != trace:
                record.exc_text, record.exc_info = self.scrub(trace), None
        return record


class _Scrubbed(io.TextIOBase):
    """A text stream that scrubs what passes; progress bars find the terminal behind it."""

    def __init__(self, stream: TextIO, guard: Guard) -> None:
        self._stream = stream
        self._guard = guard

    def write(self, text: str) -> int:
        self._stream.write(self._guard.scrub(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding
