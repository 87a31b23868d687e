"""SIGTERM ends a command as Ctrl-C does: what was started is ended too, and nothing is left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Received:
    """The signal that a command is ending by.

    Attributes:
        number: Of the signal; None while there is none.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def exit_status(self) -> int:
        """As a shell has it: 128 and the signal's number, 130 for Ctrl-C."""
        return 128 + (self.number or signal.SIGINT)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        # Ray lets no other exception of a handler through while it waits.
        raise KeyboardInterrupt


@contextmanager
def ending_on_sigterm() -> Iterator[Received]:
    """From here on SIGTERM raises KeyboardInterrupt, as Ctrl-C does. In a thread nothing is changed: there
    signals are the main thread's.
    """
    received = Received()
    before = set_handlers(dict.fromkeys(HANDLED, received._end))
    try:
        yield received
    finally:
        set_handlers(before)


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Puts back the handlers that a library's start replaces; a SIGTERM that the library's own handler took
    in the meantime counts as ours.
    """
    before = {number: signal.getsignal(number) for number in HANDLED}
    ours = before[signal.SIGTERM] not in (signal.SIG_DFL, signal.SIG_IGN, None)
    try:
        yield
    except SystemExit as error:
        if ours and error.code == signal.SIGTERM:
            set_handlers(before)
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if ours:
            set_handlers(before)


def set_handlers(handlers: dict[Any, Any]) -> dict[Any, Any]:
    """Sets handlers where that is possible, and gives those that were there."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}
