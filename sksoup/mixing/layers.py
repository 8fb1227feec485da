"""Assign tensors to layers that share coefficients."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..checkpoints.protocol import TensorInfo
from ..exceptions import CheckpointError

Layerwise: TypeAlias = bool | Callable[[str], str]


@dataclass(frozen=True)
class Layers:
    """Assignment of tensors to rows of ``coef_``.

    The first ``n_searched`` rows belong to parameters and are found by a search. The rows after
    them belong to buffers and are means of the rows in ``averaged``.
    """

    names: tuple[str, ...]
    rows: Mapping[str, int]  # tensor name -> row
    averaged: tuple[tuple[int, ...], ...]  # per added row, the searched rows that it averages

    @property
    def n_searched(self) -> int:
        return len(self.names) - len(self.averaged)

    def expand(self, searched: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n_searched, K) -> (n_layers, K): append the means."""
        added = [searched[list(rows)].mean(axis=0) for rows in self.averaged]
        return np.vstack([searched, *added])

    def expand_columns(self, searched: torch.Tensor) -> torch.Tensor:
        """(b, n_searched) -> (b, n_layers): the same for a tensor of the engine."""
        added = [searched[:, list(rows)].mean(dim=1, keepdim=True) for rows in self.averaged]
        return torch.cat([searched, *added], dim=1)


def group_layers(
    module: nn.Module | Mapping[str, TensorInfo], tensors: Collection[str], layerwise: Layerwise
) -> Layers:
    """Assign every tensor to a row: parameters by ``layerwise``, buffers by their neighbors.

    Without a module, parameters are distinguished from statistics and integers by name and dtype.
    """
    named = module.state_dict(keep_vars=True) if isinstance(module, nn.Module) else module
    label: Callable[[str], str] = str if layerwise else lambda name: "all"
    label = layerwise if callable(layerwise) else label
    row_of_label: dict[str, int] = {}
    rows: dict[str, int] = {}
    by_identity: dict[int | str, int] = {}  # a tied parameter keeps the row of its first name
    for name, value in named.items():
        is_one = isinstance(value, nn.Parameter)
        if is_one or (module is named and value.is_floating and not is_statistic(name)):
            identity = id(value) if is_one else name
            if identity not in by_identity:
                row = row_of_label.setdefault(str(label(name)), len(row_of_label))
                by_identity[identity] = row
            rows[name] = by_identity[identity]
    if not rows:
        raise CheckpointError("The checkpoints have no parameters, so there is nothing to mix.")
    neighbors_of = _Neighbors(rows)
    names = list(row_of_label)
    averaged: dict[tuple[int, ...], int] = {}
    row_of_place: dict[tuple[str, bool], int] = {}
    for name in named:
        if name not in rows:
            place = neighbors_of.find(name)
            if place not in row_of_place:
                neighbors = neighbors_of.rows(*place)
                if len(neighbors) > 1 and neighbors not in averaged:
                    averaged[neighbors] = len(names)
                    owner = place[0] or "module"
                    names.append(f"{owner} (buffers: mean of {len(neighbors)} rows)")
                row_of_place[place] = averaged.get(neighbors, neighbors[0])
            rows[name] = row_of_place[place]
    return Layers(tuple(names), {name: rows[name] for name in tensors}, tuple(averaged))


class _Neighbors:
    """The parameters in the module of a buffer, or below the nearest ancestor with parameters."""

    def __init__(self, parameters: Mapping[str, int]) -> None:
        self._row = dict(parameters)
        self._sorted = sorted(parameters)  # so that those below a module are adjacent
        self._beside: dict[str, set[int]] = {}
        for name, row in parameters.items():
            self._beside.setdefault(name.rpartition(".")[0], set()).add(row)

    def find(self, buffer: str) -> tuple[str, bool]:
        """The module of the neighbors, and whether they are direct parameters of it."""
        owner = buffer.rpartition(".")[0]
        if owner in self._beside:
            return owner, True
        while owner and not any(self._below(owner)):
            owner = owner.rpartition(".")[0]
        return owner, False

    def rows(self, owner: str, is_own: bool) -> tuple[int, ...]:
        """Their rows, in order."""
        found = self._beside[owner] if is_own else {self._row[n] for n in self._below(owner)}
        return tuple(sorted(found))

    def _below(self, owner: str) -> Iterator[str]:
        prefix = f"{owner}." if owner else ""
        places = range(bisect_left(self._sorted, prefix), len(self._sorted))
        return takewhile(lambda n: n.startswith(prefix), map(self._sorted.__getitem__, places))


def check_layers(
    layers: Mapping[str, int] | None, layout: Mapping[str, TensorInfo], n_layers: int
) -> dict[str, int]:
    """The row of every tensor; without ``layers`` there is one row for all tensors."""
    if layers is None:
        if n_layers != 1:
            raise ValueError(
                f"coef has {n_layers} rows but layers is None. Pass the row of every tensor, "
                f"layers={{tensor name: row}}, as in soup.layers_."
            )
        return dict.fromkeys(layout, 0)
    missing = [name for name in layout if name not in layers]
    if missing:
        raise ValueError(
            f"layers lacks {', '.join(map(repr, missing[:5]))} ({len(missing)} of {len(layout)} "
            f"tensors). Map every tensor of the checkpoints to a row of coef."
        )
    wrong = next((name for name in layout if layers[name] not in range(n_layers)), None)
    if wrong is not None:
        raise ValueError(
            f"layers[{wrong!r}] is {layers[wrong]}, expected a row of coef in [0, {n_layers})."
        )
    return {name: int(layers[name]) for name in layout}


def is_variance(name: str) -> bool:
    """Whether a tensor is a running variance, which extrapolation must not make negative."""
    return name.rpartition(".")[2] == "running_var"


def is_statistic(name: str) -> bool:
    """Whether a tensor is a statistic of BatchNorm, which can be re-estimated from data."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
