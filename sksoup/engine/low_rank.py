"""Deltas of adapters, as factors side by side: no delta is ever multiplied out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .center import Center, Segment
from .factors import Stack, low_rank_names, read_stacks, squared_lengths


class LowRankBatch:
    """The deltas w_k - center of adapters of one base, as factors; heads and biases as they are.

    With delta_k = D_k - sum_j q_j D_j, and D_k the product that an adapter adds to the base,
    start + sum_k c_k delta_k = start + sum_k (c_k - q_k sum_j c_j) D_k, and the gradient's inner
    product with delta_k is that with D_k less the center's. Memory: the factors of all adapters,
    the center and the soup at the start of the outer iteration: 2 models and the factors.
    """

    def __init__(self, center: Center, delta_dtype: torch.dtype) -> None:
        self.flat = center.flat
        self.center = center.weights
        self.start = center.weights.clone()
        self._layers = center.layers
        self._names = list(center.checkpoints.names)
        device = center.weights.device
        exact = torch.float32 if device.type == "mps" else torch.float64
        self._q = torch.tensor(center.q, dtype=exact, device=device)
        low, _ = low_rank_names(center.checkpoints)
        segments = {segment.name: segment for segment in center.flat.layout.segments}
        self._segments = [segment for name, segment in segments.items() if name in low]
        self._dense = [segment for name, segment in segments.items() if name not in low]
        self._stacks: list[Stack] = []
        for segment in self._segments:
            (stack,) = read_stacks(center.checkpoints, [segment.name]).values()
            self._stacks.append(stack.to(device, delta_dtype))
        self._whole = self._read_whole(center, delta_dtype)
        self._batch = torch.arange(0, device=device)

    def release(self) -> None:
        """Let the memory go, whoever holds on to this object."""
        self._stacks.clear()
        self._whole.clear()
        del self.center, self.start

    def load(self, names: Sequence[str]) -> None:
        """Take these checkpoints for the next outer iteration; nothing is read."""
        places = [self._names.index(name) for name in names]
        self._batch = torch.tensor(places, device=self.start.device)

    @torch.no_grad()
    def combine(self, coef: torch.Tensor) -> None:
        """W <- start + sum_k coef_k delta_k, in place (Eqs. 3, 7, 8); coef is (b, n_searched)."""
        coef = self._layers.expand_columns(coef)  # (b, n_layers)
        of_products = -self._q[:, None] * coef.sum(dim=0)  # (K, n_layers)
        of_products[self._batch] += coef
        weights = self.flat.weights
        for segment, stack in zip(self._segments, self._stacks, strict=True):
            left, right = stack.weighted(of_products[:, segment.row], weights.dtype)
            shape = len(left), right.shape[1]
            start, out = self.start[segment.where].view(shape), weights[segment.where].view(shape)
            torch.addmm(start, left, right, out=out)
        for segment, deltas in zip(self._dense, self._whole, strict=True):
            c = coef[:, segment.row].to(weights)
            chosen = deltas[self._batch].to(weights)
            torch.addmv(self.start[segment.where], chosen.T, c, out=weights[segment.where])
        for variance in self.flat.variances:
            variance.clamp_(min=0)

    @torch.no_grad()
    def project(self) -> torch.Tensor:
        """(b, n_searched): the gradient's inner product with each delta, layer by layer (Eq. 6)."""
        n = len(self._names)
        products = self.center.new_zeros((n, self._layers.n_searched))
        for segment, stack in zip(self._segments, self._stacks, strict=True):
            grad = self.flat.grad[segment.where].view(len(stack.left), -1)
            products[:, segment.row] += stack.projected(grad, n)
        gradient = products[self._batch] - self._q.to(products) @ products
        for segment, deltas in zip(self._dense, self._whole, strict=True):
            if segment.where.stop <= self.flat.layout.n_parameters:
                grad = self.flat.grad[segment.where]
                gradient[:, segment.row] += torch.mv(deltas[self._batch].to(grad), grad)
        return gradient

    def norms(self) -> torch.Tensor:
        """(b, n_searched): the length of each delta in each layer; 1 where it is 0."""
        squares = np.zeros((len(self._names), self._layers.n_searched))
        q = self._q.cpu().double().numpy()
        for segment, stack in zip(self._segments, self._stacks, strict=True):
            on_cpu = stack.to(torch.device("cpu"), torch.float64)
            squares[:, segment.row] += squared_lengths(on_cpu, q)
        for segment, deltas in zip(self._dense, self._whole, strict=True):
            if segment.where.stop <= self.flat.layout.n_parameters:
                lengths = deltas.double().square().sum(dim=1)
                squares[:, segment.row] += lengths.cpu().numpy()
        found = torch.from_numpy(np.sqrt(squares)).to(self.center)[self._batch]
        return torch.where(found > 0, found, 1)

    def commit(self, coef: torch.Tensor) -> None:
        """Combine, and take the result as the start of the next outer iteration."""
        self.combine(coef)
        self.start.copy_(self.flat.weights)

    def _read_whole(self, center: Center, dtype: torch.dtype) -> list[torch.Tensor]:
        """(K, size) for each tensor that is held whole: w_k - center."""
        held = [
            self.center.new_empty((len(self._names), _size(segment)), dtype=dtype)
            for segment in self._dense
        ]
        for k, name in enumerate(self._names if held else []):
            with center.checkpoints.open(name) as read:
                for segment, deltas in zip(self._dense, held, strict=True):
                    value = read(segment.name).flatten().to(self.center)
                    deltas[k] = (value - self.center[segment.where]).to(dtype)
        return held


def _size(segment: Segment) -> int:
    return int(segment.where.stop - segment.where.start)
