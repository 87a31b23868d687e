"""Arguments that reach vLLM's EngineArgs beside what a run decides itself."""

from pathlib import Path

import pytest

from raytune_rl.errors import ConfigError
from raytune_rl.protocol.rollout import EngineSpec


def test_further_arguments_are_vllms_own(tmp_path: Path) -> None:
    from raytune_rl.workers.vllm_args import engine_args

    def made(**more: object) -> dict[str, object]:
        return engine_args(EngineSpec(str(tmp_path), "float32", 64, "store", 1.0, more=more))

    assert made(block_size=32)["block_size"] == 32
    assert "block_size" not in made()
    with pytest.raises(ConfigError, match="EngineArgs have no blok_size, nope"):
        made(nope=1, blok_size=32)
