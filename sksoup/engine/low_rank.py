"""Deltas of adapters, as factors side by side: no delta is ever multiplied out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .center import Center
from .factors import Stack, low_rank_names, read_stacks, squared_lengths

ROUNDING = 1e-6  # of a layer's longest delta: shorter ones are what a center is rounded by


class LowRankBatch:
    """The deltas w_k - center of adapters of one base, as factors; heads and biases as they are.

    With D_k the product that an adapter adds to the base and a_k the coefficients so far, the soup
    is w_0 + sum_k c_k D_k, c_k = a_k + q_k (1 - sum_j a_j), and the gradient's inner product with
    w_k - center is that with D_k less the center's. Memory: the base as it is stored, and the
    factors of all adapters.
    """

    def __init__(self, center: Center, delta_dtype: torch.dtype) -> None:
        self.flat = center.flat
        self._layers = center.layers
        self._names = list(center.checkpoints.names)
        self._device = self.flat.weights.device
        exact = torch.float32 if self._device.type == "mps" else torch.float64
        self._q = torch.tensor(center.q, dtype=exact, device=self._device)[:, None]  # (K, 1)
        # (K, n_layers): a after the outer iterations before
        self._moved = self._q.new_zeros((len(self._names), len(self._layers.names)))
        self._batch = torch.arange(0, device=self._device)
        low, _ = low_rank_names(center.checkpoints)
        segments = self.flat.layout.segments
        self._segments = [segment for segment in segments if segment.name in low]
        self._dense = [segment for segment in segments if segment.name not in low]
        self._base = self._read_base(center)
        stacks = read_stacks(center.checkpoints, [segment.name for segment in self._segments])
        self._stacks: list[Stack] = [
            stacks.pop(segment.name).to(self._device, delta_dtype) for segment in self._segments
        ]
        self._centers, self._whole = self._read_whole(center, delta_dtype)

    def release(self) -> None:
        """Free the memory, even if there are references to this object."""
        for held in (self._base, self._stacks, self._centers, self._whole):
            held.clear()

    def load(self, names: Sequence[str]) -> None:
        """Select these checkpoints for the next outer iteration; nothing is read."""
        places = [self._names.index(name) for name in names]
        self._batch = torch.tensor(places, device=self._device)

    @torch.no_grad()
    def combine(self, coef: torch.Tensor) -> None:
        """W <- soup so far + sum_k coef_k delta_k (Eqs. 3, 7, 8); coef is (b, n_searched)."""
        moved = self._with(coef)
        of_products = moved + self._q * (1 - moved.sum(dim=0))  # c, (K, n_layers)
        weights = self.flat.weights
        for segment, base, stack in zip(self._segments, self._base, self._stacks, strict=True):
            left, right = stack.weighted(of_products[:, segment.row], weights.dtype)
            out = weights[segment.where].view(len(left), right.shape[1])
            out.copy_(base.view_as(out)).addmm_(left, right)
        for segment, start, deltas in zip(self._dense, self._centers, self._whole, strict=True):
            c = moved[:, segment.row].to(weights)
            torch.addmv(start, deltas.to(weights).T, c, out=weights[segment.where])
        for variance in self.flat.variances:
            variance.clamp_(min=0)

    @torch.no_grad()
    def project(self) -> torch.Tensor:
        """(b, n_searched): the gradient's inner product with each delta, layer by layer (Eq. 6)."""
        n = len(self._names)
        products = self.flat.grad.new_zeros((n, self._layers.n_searched))
        for segment, stack in zip(self._segments, self._stacks, strict=True):
            grad = self.flat.grad[segment.where].view(len(stack.left), -1)
            products[:, segment.row] += stack.projected(grad, n)
        gradient = products[self._batch] - self._q[:, 0].to(products) @ products
        for segment, deltas in zip(self._dense, self._whole, strict=True):
            if segment.where.stop <= self.flat.layout.n_parameters:
                grad = self.flat.grad[segment.where]
                gradient[:, segment.row] += torch.mv(deltas[self._batch].to(grad), grad)
        return gradient

    def norms(self) -> torch.Tensor:
        """(b, n_searched): the length of each delta in each layer; 1 where it is 0."""
        squares = np.zeros((len(self._names), self._layers.n_searched))
        q = self._q[:, 0].cpu().double().numpy()
        for segment, stack in zip(self._segments, self._stacks, strict=True):
            on_cpu = stack.to(torch.device("cpu"), torch.float64)
            squares[:, segment.row] += squared_lengths(on_cpu, q)
        for segment, deltas in zip(self._dense, self._whole, strict=True):
            if segment.where.stop <= self.flat.layout.n_parameters:
                lengths = deltas.double().square().sum(dim=1)
                squares[:, segment.row] += lengths.cpu().numpy()
        found = np.sqrt(squares)
        found[found <= ROUNDING * found.max(axis=0)] = 1
        return torch.from_numpy(found).to(self.flat.weights)[self._batch]

    @torch.no_grad()
    def commit(self, coef: torch.Tensor) -> None:
        """Combine, and begin the next outer iteration with the result."""
        self.combine(coef)
        self._moved = self._with(coef)

    def _with(self, coef: torch.Tensor) -> torch.Tensor:
        """(K, n_layers): the coefficients so far, and those of this model batch."""
        moved = self._moved.clone()
        moved[self._batch] += self._layers.expand_columns(coef).to(moved)
        return moved

    def _read_base(self, center: Center) -> list[torch.Tensor]:
        """w_0 of the tensors with factors, flat, as it is stored."""
        base = next(iter(center.checkpoints.on_one_base().values())).base
        with base.open() as read:
            return [
                read(segment.name).flatten().to(self._device, copy=True)
                for segment in self._segments
            ]

    def _read_whole(
        self, center: Center, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The center (size,) of each tensor that is held whole, and w_k - center, (K, size)."""
        weights, n = self.flat.weights, len(self._names)
        sizes = [segment.where.stop - segment.where.start for segment in self._dense]
        held = [weights.new_empty((n, size)) for size in sizes]
        for k, name in enumerate(self._names if held else []):
            with center.checkpoints.open(name) as read:
                for segment, values in zip(self._dense, held, strict=True):
                    values[k] = read(segment.name).flatten().to(weights)
        centers = [self._q[:, 0].to(values) @ values for values in held]
        return centers, [
            (values - start).to(dtype) for values, start in zip(held, centers, strict=True)
        ]
