"""Secrets in URLs and messages, in the shapes in which hubs, object stores and proxies give them."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from raytune_rl.errors import DataError
from raytune_rl.redaction import redact_text

SECRET = "S3cr3tS3cr3tS3cr3tS3cr3t"


@pytest.mark.parametrize(
    "text",
    [
        f"https://host/a.png?token={SECRET}",
        f"https://host/a.png?w=1&access_token={SECRET}&h=2",
        f"https://host/a#access_token={SECRET}",
        f"https://user:{SECRET}@host:8080/a.png",
        f"https://user:p@{SECRET}@host/a",
        f"https://{SECRET}@host/a",
        f"https://b.s3.amazonaws.com/k?X-Amz-Algorithm=A&X-Amz-Credential={SECRET}%2Fus&X-Amz-Signature={SECRET}",
        f"https://b.s3.amazonaws.com/k?X-Amz-Security-Token={SECRET}",
        f"https://b.s3.amazonaws.com/k?AWSAccessKeyId={SECRET}&Signature={SECRET}",
        f"https://storage.googleapis.com/k?X-Goog-Signature={SECRET}",
        f"https://a.blob.core.windows.net/c/k?sv=2022&sig={SECRET}%3D",
        f"https://b.oss-cn.aliyuncs.com/k?OSSAccessKeyId={SECRET}&Expires=1",
        f"https://maps.host/x?key={SECRET}",
        f"https://host/x?API_KEY={SECRET}",
        f"https://host/x?apikey={SECRET}",
        f"https://proxy/?url=https%3A%2F%2Fhost%2Fa%3Ftoken%3D{SECRET}%26w%3D4",
        f"Client error '403 Forbidden' for url 'https://cdn/x?Policy=p&Signature={SECRET}' (see the manual)",
        f"refused: api_key={SECRET}, retry",
        f"Authorization: Bearer {SECRET}",
        f"401 for hf_{SECRET}",
    ],
)
def test_a_secret_is_hidden_wherever_it_stands(text: str) -> None:
    assert SECRET not in redact_text(text)
    assert redact_text(text) != text


@pytest.mark.parametrize(
    "text",
    [
        "--max_new_tokens=512 and eos_token=</s> leave 12 tokens",
        "https://host/a.png?w=4&page_token_count=3",
        "https://github.com/owner/name/issues/1#key",
        "the token budget is 8192: key=value pairs, a == b",
        "s3://bucket/folder@2/file",
        "the user's mail is me@host.org",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == text


def test_what_stands_beside_a_secret_stays() -> None:
    assert (
        redact_text("GET https://me:pw@h/a.png?w=4&token=x&h=2.") == "GET https://h/a.png?w=4&token=***&h=2."
    )


def test_an_error_tells_no_secret_not_even_from_another_process() -> None:
    error = DataError(f"row 3: https://h/a?token={SECRET} is gone")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "row 3: https://h/a?token=*** is gone"


def test_a_defects_traceback_tells_no_secret() -> None:
    program = (
        "from raytune_rl.cli import guarded\n"
        f"guarded(lambda: open('https://h/a?token={SECRET}'.removesuffix('x') + '/'))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "FileNotFoundError" in ended.stderr
    assert "https://h/a?token=***" in ended.stderr
    assert SECRET not in ended.stderr
