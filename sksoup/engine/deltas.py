"""The deltas of a model batch on the device, and the two operations a step needs of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..mixing.layers import FlatLayout, Segment, is_variance
from ..mixing.mix import accumulate
from ..runtime.distributed import n_ranks, rank, share, sum_over_ranks
from .objective import load_weights
from .problem import Problem
from .reader import Reader

# numbers of a delta that are widened at a time, where deltas are half as wide as the weights
BLOCK = {"cpu": 1 << 15, "cuda": 1 << 20}


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


@dataclass(frozen=True)
class Center:
    """The mean of all checkpoints as a flat vector, and the module that is laid out like it."""

    flat: FlatModule
    mean: torch.Tensor  # (size,), w-bar

    @property
    def layout(self) -> FlatLayout:
        return self.flat.layout


@contextmanager
def centered(problem: Problem) -> Iterator[Center | None]:
    """Average all checkpoints and lay the module out flat at that center.

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
        center = Center(flat, flatten(mean, layout, flat.weights))
        mean.clear()
        yield center


class ModelBatch:
    """``b`` deltas w_k - center as one (b, size) tensor, and the soup they are added to.

    Memory: b deltas, the center and the soup at the start of the outer iteration: b + 2 models, or
    b/2 + 2 with deltas of half the width. These are widened a block at a time.
    """

    def __init__(self, center: Center, capacity: int, delta_dtype: torch.dtype) -> None:
        self.flat = center.flat
        self.layout = center.layout
        self.center = center.mean  # (size,), w-bar
        self.start = center.mean.clone()  # (size,), the soup before this outer iteration
        self._buffer = center.mean.new_empty((capacity, self.layout.size), dtype=delta_dtype)
        self.deltas = self._buffer[:0]
        is_narrow = delta_dtype != center.mean.dtype
        step = self.layout.size
        if is_narrow:  # a block of all deltas is at most a quarter of a model
            most = BLOCK.get(center.mean.device.type, 1 << 18)
            step = min(most, max(1024, self.layout.size // (4 * capacity)))
        self._blocks = [
            (row, low, min(low + step, stop))
            for row, start, stop in self.layout.row_slices
            for low in range(start, stop, step)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        del self.center, self.start, self._buffer, self.deltas

    @property
    def capacity(self) -> int:
        return len(self._buffer)

    def load(
        self,
        checkpoints: CheckpointCollection,
        names: Sequence[str],
        reader: Reader | None = None,
    ) -> None:
        """Read the deltas of these checkpoints: one sequential read of each file."""
        self.deltas = self._buffer[: len(names)]
        for delta, name in zip(self.deltas, names, strict=True):
            if reader is not None:
                with reader.take(name) as weights:
                    for segment in self.layout.segments:
                        self._subtract(delta, segment, weights[segment.start : segment.stop])
                continue
            with checkpoints.open(name) as read:
                for segment in self.layout.segments:
                    self._subtract(delta, segment, read(segment.name).flatten())

    def _subtract(self, delta: torch.Tensor, segment: Segment, weights: torch.Tensor) -> None:
        where = slice(segment.start, segment.stop)
        center = self.center[where]
        weights = weights.to(center.device, center.dtype, non_blocking=True)
        torch.sub(weights, center, out=delta[where])

    def norms(self, n_rows: int) -> torch.Tensor:
        """(b, n_rows): the length of each delta in each layer; 1 where it is 0."""
        squares = self.center.new_zeros((len(self.deltas), n_rows))
        for row, start, stop in self._blocks:
            if start < self.layout.n_parameters:
                squares[:, row] += self._wide(start, stop).square().sum(dim=1)
        return torch.where(squares > 0, squares.sqrt(), 1)

    def _wide(self, start: int, stop: int) -> torch.Tensor:
        """(b, stop - start): some deltas in the dtype of the weights."""
        return self.deltas[:, start:stop].to(self.center.dtype)

    @torch.no_grad()
    def combine(self, coef: torch.Tensor) -> None:
        """W <- start + sum_k coef_k delta_k, in place (Eqs. 3, 7, 8); coef is (b, n_layers)."""
        self.add(self.start, coef)
        self.flat.clamp_variances()

    def add(self, base: torch.Tensor, coef: torch.Tensor) -> None:
        """W <- base + sum_k coef_k delta_k; the base may be the weights themselves."""
        coef = coef.to(self.center)
        for row, start, stop in self._blocks:
            torch.addmv(
                base[start:stop],
                self._wide(start, stop).T,
                coef[:, row],
                out=self.flat.weights[start:stop],
            )

    @torch.no_grad()
    def project(self, n_rows: int) -> torch.Tensor:
        """(b, n_rows): the gradient's inner product with each delta, layer by layer (Eq. 6)."""
        gradient = self.center.new_zeros((len(self.deltas), n_rows))
        for row, start, stop in self._blocks:
            if start < self.layout.n_parameters:
                gradient[:, row] += torch.mv(self._wide(start, stop), self.flat.grad[start:stop])
        return gradient

    def commit(self) -> None:
        """Take the present weights as the start of the next outer iteration."""
        self.start.copy_(self.flat.weights)


class ShardedBatch(ModelBatch):
    """A model batch whose deltas the ranks of a distributed job share out, b / n_ranks each.

    A step sends the weights and the gradient, 2 D numbers, which a whole batch on every rank does
    not need to.
    """

    def __init__(self, center: Center, capacity: int, delta_dtype: torch.dtype) -> None:
        super().__init__(center, -(-capacity // n_ranks()), delta_dtype)
        self._mine = slice(0)
        self._n_models = 0

    def load(
        self,
        checkpoints: CheckpointCollection,
        names: Sequence[str],
        reader: Reader | None = None,
    ) -> None:
        """Read this rank's part of the deltas."""
        self._mine, self._n_models = share(len(names)), len(names)
        super().load(checkpoints, names[self._mine], reader)

    def norms(self, n_rows: int) -> torch.Tensor:
        """As `ModelBatch.norms`, of all deltas."""
        return sum_over_ranks(self._placed(super().norms(n_rows)))

    @torch.no_grad()
    def combine(self, coef: torch.Tensor) -> None:
        """As `ModelBatch.combine`: each rank adds its deltas, and the sum is taken."""
        if rank():
            self.flat.weights.zero_()
        else:
            self.flat.weights.copy_(self.start)
        self.add(self.flat.weights, coef[self._mine])
        sum_over_ranks(self.flat.weights)
        self.flat.clamp_variances()

    @torch.no_grad()
    def project(self, n_rows: int) -> torch.Tensor:
        """(b, n_rows): rows of this rank's deltas; the sum over the ranks is the projection."""
        sum_over_ranks(self.flat.grad)
        return self._placed(super().project(n_rows))

    def _placed(self, mine: torch.Tensor) -> torch.Tensor:
        """(b, ...) with this rank's rows in their place and zeros elsewhere."""
        everyone = mine.new_zeros((self._n_models, *mine.shape[1:]))
        everyone[self._mine] = mine
        return everyone


class StreamedModels:
    """The two operations over more models than memory holds: each reads all the files once."""

    def __init__(self, batch: ModelBatch, checkpoints: CheckpointCollection) -> None:
        self.flat = batch.flat
        self._batch = batch
        self._checkpoints = checkpoints

    def _parts(self) -> Iterator[slice]:
        """Load as many models at a time as there is room for; tell which."""
        names, step = self._checkpoints.names, self._batch.capacity
        for start in range(0, len(names), step):
            part = slice(start, start + step)
            self._batch.load(self._checkpoints, names[part])
            yield part

    @torch.no_grad()
    def combine(self, coef: torch.Tensor) -> None:
        """As `ModelBatch.combine`; coef is (K, n_layers)."""
        self.flat.weights.copy_(self._batch.start)
        for part in self._parts():
            self._batch.add(self.flat.weights, coef[part])
        self.flat.clamp_variances()

    def project(self, n_rows: int) -> torch.Tensor:
        """As `ModelBatch.project`: (K, n_rows)."""
        return torch.cat([self._batch.project(n_rows) for _ in self._parts()])


def resolve_delta_dtype(delta_dtype: str | torch.dtype | None, weights: torch.dtype) -> torch.dtype:
    """The dtype of deltas: None is that of the weights."""
    if delta_dtype is None:
        return weights
    known: dict[str | torch.dtype, torch.dtype] = {"float32": torch.float32}
    known["bfloat16"] = torch.bfloat16
    known |= {dtype: dtype for dtype in known.values()}
    if delta_dtype not in known:
        raise ValueError(
            f"delta_dtype must be None (that of the weights), 'float32' or 'bfloat16', got "
            f"{delta_dtype!r}."
        )
    return known[delta_dtype]
