"""The deltas of a model batch on the device, and the two operations a step needs of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import numpy as np
import torch
from torch import nn

from ._layout import FlatLayout, is_variance
from ._mix import accumulate
from ._objective import Problem, load_weights
from .checkpoints import CheckpointCollection


class FlatModule:
    """A private module whose differing tensors are views into one flat vector.

    ``weights`` is (size,), ``grad`` (n_parameters,): a step on the whole model is one operation.
    """

    def __init__(self, module: nn.Module, layout: FlatLayout) -> None:
        self.module = module
        self.layout = layout
        state = module.state_dict(keep_vars=True)
        tensors = [state[segment.name] for segment in layout.segments]
        example = tensors[0]
        self.weights = torch.empty(layout.size, dtype=example.dtype, device=example.device)
        self.grad = self.weights.new_zeros(layout.n_parameters)
        self._trainable = {p: p.requires_grad for p in module.parameters()}
        module.requires_grad_(False)  # what is equal everywhere needs no gradient
        for segment, tensor in zip(layout.segments, tensors, strict=True):
            where = slice(segment.start, segment.stop)
            self.weights[where].copy_(tensor.detach().flatten())
            tensor.data = self.weights[where].view(segment.shape)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
                tensor.grad = self.grad[where].view(segment.shape)
        self._variances = [s for s in layout.segments if is_variance(s.name)]

    def clamp_variances(self) -> None:
        for segment in self._variances:
            self.weights[segment.start : segment.stop].clamp_(min=0)

    def release(self) -> None:
        """Give every tensor its own memory again and drop the gradients."""
        state = self.module.state_dict(keep_vars=True)
        for segment in self.layout.segments:
            tensor = state[segment.name]
            tensor.grad = None
            tensor.data = tensor.data.clone()
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)


@contextmanager
def flattened(module: nn.Module, layout: FlatLayout) -> Iterator[FlatModule]:
    """Lay a module out flat for the time of a search."""
    flat = FlatModule(module, layout)
    try:
        yield flat
    finally:
        flat.release()


def flatten(
    tensors: dict[str, torch.Tensor], layout: FlatLayout, like: torch.Tensor
) -> torch.Tensor:
    """Move the differing tensors into one vector (size,), emptying the mapping as it goes."""
    flat = torch.empty_like(like)
    for segment in layout.segments:
        flat[segment.start : segment.stop].copy_(tensors.pop(segment.name).flatten())
    return flat


class ModelBatch:
    """``b`` deltas w_k - center as one (b, size) tensor, and the soup they are added to.

    Memory: b deltas, the center and the soup at the start of the outer iteration: b + 2 models.
    """

    def __init__(self, flat: FlatModule, center: torch.Tensor, capacity: int) -> None:
        self.flat = flat
        self.layout = flat.layout
        self.center = center  # (size,), w-bar
        self.start = center.clone()  # (size,), the soup before this outer iteration
        self._buffer = center.new_empty((capacity, len(center)))
        self.deltas = self._buffer[:0]

    def __enter__(self) -> Self:
        return self

    @property
    def capacity(self) -> int:
        return len(self._buffer)

    def __exit__(self, *exc_info: object) -> None:
        del self.center, self.start, self._buffer, self.deltas

    def load(self, checkpoints: CheckpointCollection, names: Sequence[str]) -> None:
        """Read the deltas of these checkpoints: one sequential read of each file."""
        self.deltas = self._buffer[: len(names)]
        for delta, name in zip(self.deltas, names, strict=True):
            with checkpoints.open(name) as read:
                for segment in self.layout.segments:
                    delta[segment.start : segment.stop].copy_(read(segment.name).flatten())
            delta -= self.center

    def norms(self, n_rows: int) -> torch.Tensor:
        """(b, n_rows): the length of each delta in each layer; 1 where it is 0."""
        norms = self.deltas.new_ones((len(self.deltas), n_rows))
        for row, start, stop in self.layout.row_slices:
            if start < self.layout.n_parameters:
                norms[:, row] = torch.linalg.vector_norm(self.deltas[:, start:stop], dim=1)
        return torch.where(norms > 0, norms, 1)

    @torch.no_grad()
    def combine(self, coef: torch.Tensor) -> None:
        """W <- start + sum_k coef_k delta_k, in place (Eqs. 3, 7, 8); coef is (b, n_layers)."""
        coef = coef.to(self.deltas)
        for row, start, stop in self.layout.row_slices:
            torch.addmv(
                self.start[start:stop],
                self.deltas[:, start:stop].T,
                coef[:, row],
                out=self.flat.weights[start:stop],
            )
        self.flat.clamp_variances()

    @torch.no_grad()
    def project(self, n_rows: int) -> torch.Tensor:
        """(b, n_rows): the gradient's inner product with each delta, layer by layer (Eq. 6)."""
        gradient = self.deltas.new_zeros((len(self.deltas), n_rows))
        for row, start, stop in self.layout.row_slices:
            if start < self.layout.n_parameters:
                torch.mv(
                    self.deltas[:, start:stop],
                    self.flat.grad[start:stop],
                    out=gradient[:, row],
                )
        return gradient

    def commit(self) -> None:
        """Take the present weights as the start of the next outer iteration."""
        self.start.copy_(self.flat.weights)


@contextmanager
def model_batches(
    problem: Problem,
    model_batch_size: int | str | None,
    memory_limit: int | str | None = None,
) -> Iterator[ModelBatch | None]:
    """Average all checkpoints, lay the module out flat at that center, make room for deltas.

    One sequential read of the checkpoints. Gives None when no parameter differs between them.
    """
    checkpoints, module = problem.checkpoints, problem.module
    n = len(checkpoints)
    mean, differing = accumulate(
        checkpoints,
        np.full((1, n), 1 / n),
        dict.fromkeys(checkpoints.layout, 0),
        checkpoints.layout,
    )
    load_weights(module, mean)
    layout = FlatLayout.of(module, problem.layers, differing)
    if not layout.n_parameters:
        yield None
        return
    with flattened(module, layout) as flat:
        capacity = resolve_model_batch_size(
            model_batch_size, n, flat.weights.nbytes, memory_limit, flat.weights.device
        )
        with ModelBatch(flat, flatten(mean, layout, flat.weights), capacity) as batch:
            mean.clear()
            yield batch


def parse_bytes(limit: int | str) -> int:
    """Read a memory limit: bytes, or a string such as "8GB"."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    if isinstance(limit, str):
        number, unit = limit.strip()[:-2], limit.strip()[-2:].upper()
        try:
            value = int(float(number) * units[unit])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"memory_limit={limit!r} is not a size: expected bytes or a number with KB, MB, "
                f"GB or TB, such as '8GB'."
            ) from error
    else:
        value = int(limit)
    if value <= 0:
        raise ValueError(f"memory_limit={limit!r} must be positive.")
    return value


def free_bytes(device: torch.device) -> int:
    """Memory the device has free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    try:
        with open("/proc/meminfo") as file:
            fields: Mapping[str, str] = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def resolve_model_batch_size(
    wanted: int | str | None,
    n_checkpoints: int,
    model_bytes: int,
    memory_limit: int | str | None,
    device: torch.device,
) -> int:
    """How many deltas to hold: as asked, None for all, "auto" for what the limit holds."""
    if wanted is None:
        return n_checkpoints
    if wanted == "auto":
        limit = free_bytes(device) // 2 if memory_limit is None else parse_bytes(memory_limit)
        fits = limit // max(model_bytes, 1) - 2  # beside the deltas: the center and the soup
        return int(min(max(fits, 1), n_checkpoints))
    return min(int(wanted), n_checkpoints)
