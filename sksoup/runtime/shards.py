"""A module that PyTorch's FSDP2 shards over the ranks: built, wrapped, read and written in place.

Each rank holds rows of every parameter; for the time of its forward and its backward pass a block
is whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from .distributed import rank, world_size


def sharded_parts(module: nn.Module) -> list[Any]:
    """The modules in it that were wrapped with ``fully_shard``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is wrapped
    if fsdp is None:
        return []
    return [part for part in module.modules() if isinstance(part, fsdp.FSDPModule)]


def class_of(module: nn.Module) -> type:
    """Its class, without what ``fully_shard`` made of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return type(module)
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, fsdp.FSDPModule))


def refuse_copy(module: nn.Module) -> None:
    """An error for what needs a second module."""
    if sharded_parts(module):
        raise TypeError(
            "A sharded module can't be copied. Save the soup (save_pretrained, or "
            "recipe_.cook(checkpoints, out=folder)) and continue from its files."
        )


def reshard(module: nn.Module) -> None:
    """Give the whole weights of the last pass up, so that the next one gathers the shards."""
    for part in sharded_parts(module):
        part.reshard()


def own(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, to read and to write: a shard, or all of it."""
    found: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()


def rows_of(module: nn.Module) -> dict[str, slice]:
    """The rows (dimension 0) that this rank holds of each sharded tensor."""
    rows = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not hasattr(value, "to_local"):
            continue
        placements = [str(kind) for kind in value.placements]
        if placements != ["S(0)"] or value.device_mesh.size() != world_size():
            raise ValueError(
                f"{name!r} is placed as {', '.join(placements)} on {value.device_mesh.size()} of "
                f"{world_size()} ranks, expected rows, S(0), on all of them, as fully_shard(module)"
                f" places them on the default process group."
            )
        size = -(-value.shape[0] // world_size())  # as torch.chunk cuts
        start = min(rank() * size, value.shape[0])
        rows[name] = slice(start, start + len(own(value)))
    return rows


def build_sharded(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Build a module and shard it, block by block; no rank ever holds all of it.

    Parameters are made one at a time and kept as shapes; buffers are real, as the state dict lacks
    some. A module that is whole already is cut.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "shard='auto' shards the module across the ranks of a distributed job, but there is no "
            "job. Start several processes with torchrun, and call "
            "torch.distributed.init_process_group() first. On one device use shard=None."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with parameters_as_shapes():
        module = build()
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    materialize(module, device)
    return module


@contextmanager
def parameters_as_shapes() -> Iterator[None]:
    """Let every parameter that is registered give its memory up at once."""

    def forget(module: nn.Module, name: str, value: nn.Parameter | None) -> Any:
        if value is None or value.is_meta:
            return value
        return nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)

    handle = nn.modules.module.register_module_parameter_registration_hook(forget)
    try:
        yield
    finally:
        handle.remove()


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of the outermost lists of modules; the rest is sharded as one more block."""
    found: list[nn.Module] = []

    def walk(part: nn.Module) -> None:
        for child in part.children():
            if isinstance(child, nn.ModuleList):
                found.extend(block for block in child if any(True for _ in block.parameters()))
            else:
                walk(child)

    walk(module)
    _refuse_ties(module, found)
    return found


def _refuse_ties(module: nn.Module, blocks: list[nn.Module]) -> None:
    """FSDP2 keeps a tie inside a block only: elsewhere the two would drift apart."""
    inside = {id(part): i for i, block in enumerate(blocks) for part in block.modules()}
    first: dict[int, tuple[str, int]] = {}
    for prefix, part in module.named_modules():
        for name, value in part.named_parameters(prefix, recurse=False, remove_duplicate=False):
            block = inside.get(id(part), -1)
            known, where = first.setdefault(id(value), (name, block))
            if where != block:
                raise ValueError(
                    f"{name!r} is tied to {known!r} in another block, but FSDP2 can't shard "
                    f"weights that are tied across blocks. Wrap the module yourself, with both in "
                    f"one block: fully_shard(module), module=that."
                )


def _refuse_lost(module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Refuse buffers without values that no checkpoint has: they are computed from a parameter."""
    state = module.state_dict(keep_vars=True)
    lost = [name for name, value in buffers.items() if value.is_meta and name not in state]
    if lost:
        raise ValueError(
            f"The buffer {lost[0]!r} of {type(module).__name__} is computed from a parameter and "
            f"is not in its state_dict(), so shard='auto', which builds parameters without values, "
            f"can't know it. Compute it from sizes (torch.ones(n, n) instead of "
            f"torch.ones_like(weight)), or wrap the module yourself: fully_shard(module), "
            f"module=that."
        )


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give the shards memory on the device; what is in the buffers stays."""
    buffers: Mapping[str, torch.Tensor] = dict(module.named_buffers())
    _refuse_lost(module, buffers)
    kept = {name: value.clone() for name, value in buffers.items() if not value.is_meta}
    module.to_empty(device=device)
    with torch.no_grad():
        for name, value in module.named_buffers():
            if name in kept:
                value.copy_(kept[name])
