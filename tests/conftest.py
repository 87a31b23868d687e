"""For all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded rows of tests end with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYTUNE_RL_CACHE", str(tmp_path_factory.mktemp("encoded")))
        yield
