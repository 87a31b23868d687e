"""The optimizer's state as safetensors, one file a rank, restored into a world of the same or another size.

ZeRO-1 and ZeRO-2 lay each parameter group out flat, pad it, and cut it into one equal partition a rank. So
the partitions
of all ranks, one after the other, are the whole group, whatever the number of ranks was: to restore, the
pieces are read as one array and cut anew. ZeRO-3 does the same with each parameter by itself. Without ZeRO
every rank holds everything. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raytune_rl.errors import CheckpointError
from raytune_rl.tracking.files import follow_umask

INDEX = "optimizer.json"
MASTER = "master"
SCALE = "loss_scale"
"""Key of the index: state of float16's loss scale, empty in other types."""
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def save(engine: Any, directory: Path, rank: int, world_size: int) -> None:
    """Writes this rank's share; rank 0 also writes the index that says how the shares fit together."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in parts(engine).items()}
    write(copies, index_of(engine, world_size), directory, rank)


def write(share: Mapping[str, Tensor], index: Mapping[str, Any], directory: Path, rank: int) -> None:
    """Writes a rank's share, as `parts` gives it, and of rank 0 the index."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(share), directory / _file(rank))
    follow_umask(directory / _file(rank))
    if rank == 0:
        (directory / INDEX).write_text(json.dumps(index))


def index_of(engine: Any, world_size: int) -> dict[str, Any]:
    """How the shares of all ranks fit together."""
    return {
        "world_size": world_size,
        "stage": engine.zero_optimization_stage(),
        "group_numels": _group_numels(engine),
        SCALE: loss_scale(engine),
    }


def load(engine: Any, directory: Path, rank: int, world_size: int) -> None:
    """Restores optimizer state, master weights and the model's own weights.

    Raises:
        CheckpointError: Files are missing, the model has other parameters, or the ZeRO stage cannot be
            converted.
    """
    index_file = directory / INDEX
    if not index_file.is_file():
        raise CheckpointError(
            f"{directory} has no {INDEX}: it was saved with --save_only_model and cannot be resumed"
        )
    index = json.loads(index_file.read_text())
    stage = engine.zero_optimization_stage()
    if index["group_numels"] != _group_numels(engine):
        raise CheckpointError(
            f"{directory} holds the state of other parameters ({index['group_numels']} values) than this run "
            "trains "
            f"({_group_numels(engine)}): resume with the model and tuner settings of the first run"
        )
    if index["stage"] != stage and not {index["stage"], stage} <= {1, 2}:
        raise CheckpointError(
            f"{directory} was saved under ZeRO stage {index['stage']} and cannot be read under {stage}"
        )
    shards = [directory / _file(r) for r in range(index["world_size"])]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{directory} lacks {', '.join(missing)}")
    partitioned = stage > 0

    def fill(key: str, target: Tensor) -> None:
        if target.ndim == 0:
            target.copy_(_read(shards[0], key))
        else:
            offset = rank * target.numel() if partitioned else 0
            _fill(target.view(-1), shards if partitioned else shards[:1], key, offset)

    put_back(engine, fill, index.get(SCALE) or {})


def parts(engine: Any) -> dict[str, Tensor]:
    """This rank's share by the names that files have: its pieces of the master weights, and AdamW's state of
    each. No copies.
    """
    tensors = {}
    for number, (partition, state) in enumerate(_partitions(engine)):
        tensors[f"{number}.{MASTER}"] = partition.detach()
        tensors |= {f"{number}.{name}": value for name, value in state.items()}
    return tensors


def put_back(engine: Any, fill: Callable[[str, Tensor], None], scale: Mapping[str, float]) -> None:
    """Gives this rank's share its values and renews what follows from them: the weights that the model
    computes with. All ranks at once.

    Args:
        engine: Of DeepSpeed.
        fill: Given a name of `parts` and where its values belong.
        scale: State of the loss scale, as `loss_scale` gives it.
    """
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # small parameters, which it keeps whole, are cut up too
    for number, (partition, state) in enumerate(_partitions(engine, create=True)):
        for name, target in {MASTER: partition.data, **state}.items():
            fill(f"{number}.{name}", target)
    if stage == 3:
        _renew_sharded(engine.optimizer)
    elif stage:
        engine.optimizer.update_lp_params()
    else:
        _renew_replicated(engine.optimizer)
    scaler = _loss_scaler(engine)
    for name, value in scale.items():
        if scaler is not None:
            setattr(scaler, name, value)


def _renew_replicated(optimizer: Any) -> None:
    """Copies the master weights that 16-bit training without ZeRO has into those that the model computes
    with.
    """
    masters, weights = getattr(optimizer, "fp32_groups", ()), getattr(optimizer, "fp16_groups", ())
    for master, weight in zip(masters, weights, strict=True):
        for source, target in zip(master, weight, strict=True):
            target.data.copy_(source.data)


def _loss_scaler(engine: Any) -> Any | None:
    """The object that adapts the loss scale of float16; None in other types."""
    if not engine.fp16_enabled():
        return None
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def loss_scale(engine: Any) -> dict[str, float]:
    """The state of the loss scale, by the names that DeepSpeed gives its parts."""
    scaler = _loss_scaler(engine)
    state = {} if scaler is None else vars(scaler)
    return {name: state[name] for name in _SCALE if state.get(name) is not None}


def _renew_sharded(optimizer: Any) -> None:
    """Copies ZeRO-3's master weights into the parameters that the model computes with."""
    for number in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    optimizer.checkpoint_event_epilogue()


def _fill(target: Tensor, shards: list[Path], key: str, offset: int) -> None:
    """Copies `target.numel()` values from `offset` on, out of the shards read as one array; what is beyond is
    padding.
    """
    target.zero_()
    start = 0
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            piece = file.get_slice(key)
            size = 1
            for extent in piece.get_shape():
                size *= extent
            low, high = max(offset, start), min(offset + target.numel(), start + size)
            if low < high:
                flat = file.get_tensor(key).reshape(-1)
                target[low - offset : high - offset].copy_(flat[low - start : high - start])
            start += size


def _read(shard: Path, key: str) -> Tensor:
    with safe_open(shard, framework="pt") as file:
        return file.get_tensor(key)


def _partitions(engine: Any, create: bool = False) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """This rank's flat pieces and AdamW's state of each. `create` makes the state that the first step would
    make.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if engine.zero_optimization_stage() == 3:
        yield from _sharded_partitions(engine.optimizer, create)
        return
    for group in inner.param_groups:
        for partition in group["params"]:
            yield partition, _state(inner, partition, create)


def _sharded_partitions(optimizer: Any, create: bool) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Of each parameter the piece of it that ZeRO-3 keeps here: a view of a buffer of many."""
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        state = _state(optimizer.optimizer, flat, create)
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            pieces = {n: v.narrow(0, offset, size) if v.ndim else v for n, v in state.items()}
            yield flat.detach().narrow(0, offset, size), pieces
            offset += size


def _state(optimizer: torch.optim.Optimizer, tensor: Tensor, create: bool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = optimizer.state[tensor]
    if create and not state:
        # Where AdamW in one pass looks for it (torch 2.13, `optim/adam.py`, `_init_group`).
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        state["exp_avg"] = torch.zeros_like(tensor)
        state["exp_avg_sq"] = torch.zeros_like(tensor)
    return state


def _group_numels(engine: Any) -> list[int]:
    """Values in each parameter group, without padding: what makes two runs comparable."""
    trainable = [p for p in engine.module.parameters() if p.requires_grad]
    sizes = [getattr(p, "ds_numel", p.numel()) for p in trainable]
    matrices = sum(
        n for p, n in zip(trainable, sizes, strict=True) if len(getattr(p, "ds_shape", p.shape)) >= 2
    )
    return [matrices, sum(sizes) - matrices]


def _file(rank: int) -> str:
    return f"optimizer-rank{rank}.safetensors"
