"""A small Ray for the tests of this folder: another folder's, if one is running, else one of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from raytune_rl.runtime.cluster import session


@pytest.fixture(scope="package")
def running() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    with session():
        yield
