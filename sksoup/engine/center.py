"""The point from which deltas are measured, their norms, and the flat layout of the module."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.protocol import same_values
from ..mixing.layers import Layers, is_variance
from ..mixing.mix import accumulate
from ..runtime.cache import Cache
from ..runtime.distributed import agreed, all_gather, all_reduce, rank
from ..runtime.shards import own, reshard, sharded_parts
from .factors import low_rank_names, measure_stacks
from .objective import load_weights, module_dtype
from .problem import Problem


@dataclass(frozen=True)
class Anchor:
    """The point g = sum_k q_k w_k from which deltas are measured, and whether they are clipped.

    ``weights`` (K,) are q up to a factor: for a mean of n checkpoints they are n ones, so that q is
    exactly 1/n.
    """

    weights: NDArray[np.float64]
    clips: bool

    @classmethod
    def mean(cls, n_checkpoints: int) -> Anchor:
        """The mean of all checkpoints, as in the papers."""
        return cls(np.ones(n_checkpoints), clips=False)

    @property
    def q(self) -> NDArray[np.float64]:
        """(K,), sums to 1."""
        coef: NDArray[np.float64] = self.weights / self.weights.sum()
        return coef

    @property
    def is_full(self) -> bool:
        """Whether every checkpoint is in it."""
        return bool(self.weights.all())

    def affine_coef(self, alpha: NDArray[np.float64]) -> NDArray[np.float64]:
        """Coefficients of g + sum_k alpha_k (w_k - g), (n_layers, K): rows sum to 1."""
        rest = 1 - alpha.sum(axis=1, keepdims=True)
        coef: NDArray[np.float64] = alpha + rest * self.weights / self.weights.sum()
        return coef


def clip_factors(lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """s_kl = min(1, median_j |delta_jl| / |delta_kl|) for (K, n_layers), over lengths not 0."""
    factors = np.ones_like(lengths)
    for length, factor in zip(lengths.T, factors.T, strict=True):
        if (moves := length > 0).any():
            usual = np.median(length[moves])
            factor[moves] = usual / np.maximum(length[moves], usual)
    return factors


@dataclass(frozen=True)
class Segment:
    """One tensor's place in a flat vector."""

    name: str
    row: int
    where: slice
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FlatLayout:
    """The tensors that differ, layer by layer in one vector, parameters before buffers."""

    segments: tuple[Segment, ...]
    n_parameters: int
    size: int
    row_slices: tuple[tuple[int, int, int], ...]  # (row, start, stop), each row contiguous
    has_parameters: bool = True  # of which another rank may have the rows

    @classmethod
    def of(cls, module: nn.Module, layers: Layers, differing: Collection[str]) -> FlatLayout:
        """Of a sharded module the rows that this rank holds, each tensor in a slice of its own."""
        is_sharded = bool(sharded_parts(module))
        chosen = [
            (not isinstance(value, nn.Parameter), layers.rows[name], name, value)
            for name, value in distinct(module, differing)
        ]
        chosen.sort(key=lambda item: item[:2])  # stable: the module's order within a row
        segments: list[Segment] = []
        slices: list[tuple[int, int, int]] = []
        start = n_parameters = 0
        previous = None
        for is_buffer, row, name, value in chosen:
            stop = start + own(value).numel()
            segments.append(Segment(name, row, slice(start, stop), tuple(own(value).shape)))
            if previous == (is_buffer, row) and not is_sharded:
                slices[-1] = (row, slices[-1][1], stop)
            else:
                slices.append((row, start, stop))
            previous = (is_buffer, row)
            n_parameters = n_parameters if is_buffer else stop
            start = stop
        has_parameters = not all(is_buffer for is_buffer, *_ in chosen)
        return cls(tuple(segments), n_parameters, start, tuple(slices), has_parameters)


def distinct(module: nn.Module, names: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The floating tensors of a module that have these names, tied ones once."""
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if name in names and value.is_floating_point() and id(value) not in seen:
            seen.add(id(value))
            yield name, value


class FlatModule:
    """A private module whose differing tensors are views into one flat vector."""

    weights: torch.Tensor  # (size,), the vector
    grad: torch.Tensor  # (n_parameters,)
    is_sharded = False

    def __init__(self, module: nn.Module, layout: FlatLayout) -> None:
        self.module = module
        self.layout = layout
        state = module.state_dict(keep_vars=True)
        tensors = [state[segment.name] for segment in layout.segments]
        self.device = tensors[0].device
        self._trainable = {p: p.requires_grad for p in module.parameters()}
        module.requires_grad_(False)  # what is equal everywhere needs no gradient
        self._lay_out(tensors)
        self.variances = [
            self.weights_at(s.where.start, s.where.stop)
            for s in layout.segments
            if is_variance(s.name)
        ]

    def _lay_out(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make the vectors, and let the tensors point into them."""
        layout, example = self.layout, tensors[0]
        self.weights = torch.empty(layout.size, dtype=example.dtype, device=example.device)
        self.grad = self.weights.new_zeros(layout.n_parameters)
        for segment, tensor in zip(layout.segments, tensors, strict=True):
            self.weights[segment.where].copy_(tensor.detach().flatten())
            tensor.data = self.weights[segment.where].view(segment.shape)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
                tensor.grad = self.grad[segment.where].view(segment.shape)

    def weights_at(self, start: int, stop: int) -> torch.Tensor:
        """The weights from one place of the layout to another, to write to."""
        return self.weights[start:stop]

    def grad_at(self, start: int, stop: int) -> torch.Tensor:
        """Their gradient."""
        return self.grad[start:stop]

    def written(self) -> None:
        """Must be called after weights were written."""

    def forget_grad(self) -> None:
        """Set the gradient to 0."""
        self.grad.zero_()

    def release(self) -> None:
        """Give every tensor its own memory again and drop the gradients."""
        state = self.module.state_dict(keep_vars=True)
        for segment in self.layout.segments:
            tensor = state[segment.name]
            tensor.grad = None
            tensor.data = tensor.data.clone()
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)


class ShardedModule(FlatModule):
    """A private module in shards, each of which is written in place: FSDP2 gathers no other memory.

    The layout is that of the rows which this rank holds. A place is never in two tensors.
    """

    is_sharded = True

    def _lay_out(self, tensors: Sequence[torch.Tensor]) -> None:
        self._starts = [segment.where.start for segment in self.layout.segments]
        self._tensors = tensors
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
        for part in sharded_parts(self.module):  # the sum over the ranks' rows, not its mean
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        self.forget_grad()

    def _at(self, start: int) -> tuple[torch.Tensor, int]:
        """The tensor that a place belongs to, and how far in it is."""
        index = bisect_right(self._starts, start) - 1
        return self._tensors[index], start - self._starts[index]

    def weights_at(self, start: int, stop: int) -> torch.Tensor:
        """The weights from one place of the layout to another, to write to."""
        tensor, skipped = self._at(start)
        return own(tensor).view(-1)[skipped : skipped + stop - start]

    def grad_at(self, start: int, stop: int) -> torch.Tensor:
        """Their gradient; 0 where no output depends on them."""
        tensor, skipped = self._at(start)
        if tensor.grad is None:
            return own(tensor).new_zeros(stop - start)
        return own(tensor.grad).reshape(-1)[skipped : skipped + stop - start]

    def written(self) -> None:
        """Discard weights that were gathered before."""
        reshard(self.module)

    def forget_grad(self) -> None:
        """Drop the gradient."""
        for tensor in self._tensors:
            tensor.grad = None

    def release(self) -> None:
        """Drop the gradients."""
        self.forget_grad()
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)


@dataclass(frozen=True)
class Center:
    """The point that deltas are taken from, and the module that is laid out like it."""

    flat: FlatModule
    weights: torch.Tensor  # (size,), g, in host memory; of adapters the module's own
    q: NDArray[np.float64]  # (K,), g as coefficients
    factors: NDArray[np.float64]  # (K, n_searched), s: what each delta is multiplied by
    checkpoints: CheckpointCollection
    layers: Layers


@contextmanager
def centered(
    problem: Problem, anchor: Anchor, cache: Cache | None = None
) -> Iterator[Center | None]:
    """Lay the module out flat at the anchor; None if no parameter differs.

    Reads the checkpoints that the anchor mixes, and all of them once more where it leaves some out
    or deltas are clipped; the cache keeps what that shows.
    """
    checkpoints, module, layers = problem.checkpoints, problem.objective.module, problem.layers
    rows = dict.fromkeys(checkpoints.layout, 0)
    point, differing = accumulate(checkpoints, anchor.q[None], rows, checkpoints.layout)
    load_weights(module, point)
    factors = np.ones((len(checkpoints), layers.n_searched))
    if anchor.clips or not anchor.is_full:
        names = [name for name, _ in distinct(module, checkpoints.layout)]

        def measured() -> tuple[torch.Tensor, list[str]]:
            lengths, found = measure(checkpoints, point, anchor.q, names, layers)
            return torch.from_numpy(lengths), sorted(found)

        lengths, found = measured() if cache is None else cache(("lengths",), measured)
        differing = differing | set(found)
        factors = clip_factors(lengths.numpy()) if anchor.clips else factors
    layout = FlatLayout.of(module, layers, differing)
    if not layout.has_parameters:
        yield None
        return
    if cache is not None:
        cache.keep(torch.from_numpy(factors), "factors")
    flat = (ShardedModule if sharded_parts(module) else FlatModule)(module, layout)
    try:
        # adapters start from their base: no copy of the point is needed
        vector = flat.weights if checkpoints.on_one_base() else torch.empty(
            layout.size, dtype=module_dtype(module), pin_memory=flat.device.type == "cuda"
        )  # fmt: skip
        for segment in layout.segments:  # the mapping is emptied on the way
            vector[segment.where].copy_(point.pop(segment.name).flatten())
        point.clear()
        yield Center(flat, vector, anchor.q, factors, checkpoints, layers)
    finally:
        flat.release()


def measure(
    checkpoints: CheckpointCollection,
    point: Mapping[str, torch.Tensor],
    q: NDArray[np.float64],
    names: Collection[str],
    layers: Layers,
) -> tuple[NDArray[np.float64], set[str]]:
    """(K, n_searched): how far each checkpoint is from a point, and the tensors that differ.

    The length of a row's delta is that of all the tensors that the row mixes, buffers included;
    those that take the mean of several rows count in each of them. Reads every file once; of
    adapters of one base, their factors. The point is sum_j q_j w_j.
    """
    squares = np.zeros((len(checkpoints), len(layers.names)))
    differing: set[str] = set()
    if checkpoints.on_one_base():
        low, whole = low_rank_names(checkpoints)
        differing = low.intersection(names)
        squares = measure_stacks(checkpoints, differing, q, layers.rows, len(layers.names))
        names = [name for name in names if name in whole]
    # what is not in shards every rank has: it counts once
    counted_elsewhere = set(names) - checkpoints.rows.keys() if checkpoints.rows and rank() else ()
    for k, checkpoint in enumerate(checkpoints):
        for following in checkpoints.names[k + 1 : k + 2]:
            checkpoints.warm(following)
        with agreed(bool(checkpoints.rows)), checkpoints.open(checkpoint) as read:
            for name in names:
                value = read(name)
                if not same_values(value, point[name]):
                    differing.add(name)
                    if name in counted_elsewhere:
                        continue
                    wide = torch.promote_types(point[name].dtype, torch.float32)
                    delta = value.to(wide) - point[name].to(wide)
                    length = torch.linalg.vector_norm(delta, dtype=torch.float64)
                    squares[k, layers.rows[name]] += float(length) ** 2
    if checkpoints.rows:
        all_reduce(torch.from_numpy(squares))
        differing = set[str]().union(*all_gather(differing))
    for row, averaged in enumerate(layers.averaged, start=layers.n_searched):
        squares[:, list(averaged)] += squares[:, [row]]
    return np.sqrt(squares[:, : layers.n_searched]), differing
