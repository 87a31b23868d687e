"""Makes the object-store weight transfer known to vLLM.

Named in pyproject.toml as a vLLM plugin, so that vLLM calls it in every process of its own, tensor-parallel
workers included. It imports nothing heavy: vLLM loads plugins before its own modules are complete.
"""

import sys

BACKEND = "ray_object_store"


def register() -> None:
    """Registers the engine by name; may be called more than once, as vLLM does. The files by which its
    processes meet are named so that what a killed one leaves is cleared away by the next; heads that its
    models do not tie are loaded; on a CPU adapters cost less and every head has its positions.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.utils import network_utils

    from raytune_rl.workers.leftovers import file_store
    from raytune_rl.workers.vllm_lora import multiply_once
    from raytune_rl.workers.vllm_rotary import turn_every_head
    from raytune_rl.workers.vllm_tied import load_tied_heads

    # Under this name there, and where it was imported from there already.
    executors = (sys.modules.get(f"vllm.v1.executor.{kind}_executor") for kind in ("uniproc", "multiproc"))
    for module in (network_utils, *filter(None, executors)):
        module.get_file_store_init_method = file_store
    load_tied_heads()
    multiply_once()
    turn_every_head()
    try:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "raytune_rl.workers.weight_transfer", "ObjectStoreEngine"
        )
    except ValueError:  # already registered in this process
        return
