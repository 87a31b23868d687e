from __future__ import annotations

import contextlib
import io
import logging
import sys

import pytest

from raytune_rl.export.guard import Guard

SECRET = "ab/cd+token"


def test_log_records_of_any_logger_are_scrubbed(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(SECRET)
    logger = logging.getLogger("some.client")
    caplog.set_level(logging.DEBUG)
    factory = logging.getLogRecordFactory()
    with guard.watch():
        logger.info("plain %d", 3)
        logger.info("args %s and %s", SECRET, "ab%2Fcd%2Btoken")
        logger.info("mapping %(t)s", {"t": SECRET})
        logger.info(f"text {SECRET}")
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            logger.exception("failed: %s", error)
    assert logging.getLogRecordFactory() is factory
    assert SECRET not in caplog.text
    assert "token" not in caplog.text
    assert "args *** and ***" in caplog.text
    assert "mapping ***" in caplog.text
    assert "plain 3" in caplog.text
    assert "ValueError: ***" in caplog.text, "the traceback is kept, without the secret"
    assert [str(error) for error in guard.logged] == [SECRET]
    logger.info("after %s", SECRET)
    assert SECRET in caplog.text


def test_a_malformed_record_is_scrubbed_too(caplog: pytest.LogCaptureFixture) -> None:
    with Guard(SECRET).watch():
        logging.getLogger("some.client").warning("%d", SECRET)
    assert SECRET not in caplog.text


def test_what_is_printed_is_scrubbed_and_goes_to_stderr() -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), Guard(SECRET).watch():
        print("report", SECRET)
        print("progress", SECRET, file=sys.stderr)
        assert not sys.stderr.isatty()
    assert out.getvalue() == ""
    assert err.getvalue() == "report ***\nprogress ***\n"


def test_the_secret_is_not_in_the_repr() -> None:
    guard = Guard(SECRET)
    assert SECRET not in f"{guard!r} {guard}"
    assert guard.found_in(b"x" + SECRET.encode())
    assert not guard.found_in(b"x")
