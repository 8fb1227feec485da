"""Where deltas are taken from, how long they are, and the module laid out flat at that point."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.protocol import same_bits
from ..mixing.layers import Layers, is_variance
from ..mixing.mix import accumulate
from ..runtime.cache import Cache
from .factors import low_rank_names, measure_stacks
from .objective import load_weights
from .problem import Problem


@dataclass(frozen=True)
class Anchor:
    """The point g = sum_k q_k w_k that deltas w_k - g are taken from, and whether they are clipped.

    ``weights`` (K,) are q times any number: a mean of n checkpoints has n ones, so that its q are
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

    @classmethod
    def of(cls, module: nn.Module, layers: Layers, differing: Collection[str]) -> FlatLayout:
        chosen = [
            (not isinstance(value, nn.Parameter), layers.rows[name], name, value)
            for name, value in distinct(module)
            if name in differing
        ]
        chosen.sort(key=lambda item: item[:2])  # stable: the module's order within a row
        segments: list[Segment] = []
        slices: list[tuple[int, int, int]] = []
        start = n_parameters = 0
        previous = None
        for is_buffer, row, name, value in chosen:
            stop = start + value.numel()
            segments.append(Segment(name, row, slice(start, stop), tuple(value.shape)))
            if previous == (is_buffer, row):
                slices[-1] = (row, slices[-1][1], stop)
            else:
                slices.append((row, start, stop))
            previous = (is_buffer, row)
            n_parameters = n_parameters if is_buffer else stop
            start = stop
        return cls(tuple(segments), n_parameters, start, tuple(slices))


def distinct(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The floating tensors of a module, tied ones once."""
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if value.is_floating_point() and id(value) not in seen:
            seen.add(id(value))
            yield name, value


class FlatModule:
    """A private module whose differing tensors are views into one flat vector."""

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
            self.weights[segment.where].copy_(tensor.detach().flatten())
            tensor.data = self.weights[segment.where].view(segment.shape)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
                tensor.grad = self.grad[segment.where].view(segment.shape)
        self.variances = [self.weights[s.where] for s in layout.segments if is_variance(s.name)]

    def release(self) -> None:
        """Give every tensor its own memory again and drop the gradients."""
        state = self.module.state_dict(keep_vars=True)
        for segment in self.layout.segments:
            tensor = state[segment.name]
            tensor.grad = None
            tensor.data = tensor.data.clone()
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)


@dataclass(frozen=True)
class Center:
    """The point that deltas are taken from, and the module that is laid out like it."""

    flat: FlatModule
    weights: torch.Tensor  # (size,), g; of adapters the module's own
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
        names = [name for name, _ in distinct(module) if name in checkpoints.layout]

        def measured() -> tuple[torch.Tensor, list[str]]:
            lengths, found = measure(checkpoints, point, anchor.q, names, layers)
            return torch.from_numpy(lengths), sorted(found)

        lengths, found = measured() if cache is None else cache(("lengths",), measured)
        differing = differing | set(found)
        factors = clip_factors(lengths.numpy()) if anchor.clips else factors
    layout = FlatLayout.of(module, layers, differing)
    if not layout.n_parameters:
        yield None
        return
    if cache is not None:
        cache.keep(torch.from_numpy(factors), "factors")
    flat = FlatModule(module, layout)
    try:
        # adapters start from their base: no copy of the point is needed
        vector = flat.weights if checkpoints.on_one_base() else torch.empty_like(flat.weights)
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
    for k, checkpoint in enumerate(checkpoints):
        for following in checkpoints.names[k + 1 : k + 2]:
            checkpoints.warm(following)
        with checkpoints.open(checkpoint) as read:
            for name in names:
                value = read(name)
                if not same_bits(value, point[name]):
                    differing.add(name)
                    wide = torch.promote_types(point[name].dtype, torch.float32)
                    delta = value.to(wide) - point[name].to(wide)
                    length = torch.linalg.vector_norm(delta, dtype=torch.float64)
                    squares[k, layers.rows[name]] += float(length) ** 2
    for row, averaged in enumerate(layers.averaged, start=layers.n_searched):
        squares[:, list(averaged)] += squares[:, [row]]
    return np.sqrt(squares[:, : layers.n_searched]), differing
