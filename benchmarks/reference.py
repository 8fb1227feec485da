"""Plain readings of the papers' methods, as a script would write them: what sksoup is compared to.

Each takes state dicts, a module, and rows on the module's device, and returns weights.
Written from Wortsman et al. (arXiv:2203.05482, Recipe 1 and Appendix I) and Li et al.
(arXiv:2407.03641, Algorithm 1); they check nothing and read nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

State = dict[str, torch.Tensor]


def minibatches(
    X: torch.Tensor, y: torch.Tensor, size: int, shuffle: bool = True
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    order = (torch.randperm(len(X)) if shuffle else torch.arange(len(X))).to(X.device)
    for start in range(0, len(X), size):
        rows = order[start : start + size]
        yield X[rows], y[rows]


@torch.no_grad()
def accuracy(module: nn.Module, X: torch.Tensor, y: torch.Tensor, size: int) -> float:
    hits = [
        (module(X[i : i + size]).argmax(1) == y[i : i + size]).sum() for i in range(0, len(X), size)
    ]
    return int(torch.stack(hits).sum()) / len(X)


def greedy(
    module: nn.Module, states: Sequence[State], X: torch.Tensor, y: torch.Tensor, size: int
) -> tuple[State, list[int]]:
    """Recipe 1: rank, then keep what does not lower the held-out accuracy; 2K - 1 evaluations."""

    def score(state: State) -> float:
        module.load_state_dict(state)
        return accuracy(module, X, y, size)

    scores = [score(state) for state in states]
    order = sorted(range(len(states)), key=lambda k: -scores[k])
    soup, kept, best = states[order[0]], order[:1], scores[order[0]]
    for k in order[1:]:
        n, ingredient = len(kept), states[k]
        candidate = {name: (soup[name] * n + ingredient[name]) / (n + 1) for name in soup}
        if (found := score(candidate)) >= best:
            soup, kept, best = candidate, [*kept, k], found
    return soup, kept


def mix_by_sum(coef: torch.Tensor, states: list[State], names: list[str]) -> State:
    """coef (n_rows, K): a sum of K products for every parameter, all in the graph."""
    return {
        name: sum(c * state[name] for c, state in zip(coef[row % len(coef)], states, strict=True))
        for row, name in enumerate(names)
    }


def mix_by_einsum(coef: torch.Tensor, stacked: State, names: list[str]) -> State:
    """coef (n_rows, K): one contraction with the stacked parameters."""
    return {
        name: torch.einsum("k,k...->...", coef[row % len(coef)], stacked[name])
        for row, name in enumerate(names)
    }


def learned(
    module: nn.Module,
    states: list[State],
    X: torch.Tensor,
    y: torch.Tensor,
    size: int,
    *,
    layerwise: bool,
    stacked: bool,
    lr: float,
    max_epochs: int,
) -> State:
    """Appendix I: softmax coefficients and a temperature, by autograd through K models."""
    names = list(states[0])
    a = torch.zeros(len(names) if layerwise else 1, len(states), device=X.device)
    a.requires_grad_()
    beta = torch.ones((), device=X.device, requires_grad=True)
    optimizer = torch.optim.AdamW([a, beta], lr=lr, weight_decay=0.0)
    mix: Callable[[torch.Tensor], State]
    if stacked:
        together = {name: torch.stack([state[name] for state in states]) for name in names}
        states = []
        mix = lambda c: mix_by_einsum(c, together, names)  # noqa: E731
    else:
        mix = lambda c: mix_by_sum(c, states, names)  # noqa: E731
    for _ in range(max_epochs):
        for rows, labels in minibatches(X, y, size):
            output = functional_call(module, mix(a.softmax(dim=1)), (rows,))
            loss = cross_entropy(output * beta, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return mix(a.softmax(dim=1))


def mehl(
    module: nn.Module,
    load: Callable[[int], State],
    K: int,
    X: torch.Tensor,
    y: torch.Tensor,
    size: int,
    *,
    b: int,
    layerwise: bool,
    lr: float,
    max_epochs: int,
    differences: bool = True,
    order: Sequence[int] | None = None,
    shuffle: bool = True,
) -> State:
    """Algorithm 1 with loops over parameters and models; ``load`` gives a checkpoint's state.

    Without ``differences`` the coefficients are those of the weights themselves. The order of the
    checkpoints and that of the rows are random unless ``order`` and ``shuffle=False`` fix them.
    """
    mean = load(0)
    for k in range(1, K):
        for name, w in load(k).items():
            mean[name] = mean[name] + w
    mean = {name: w / K for name, w in mean.items()}
    soup = {name: w.clone() for name, w in mean.items()}
    parameters = dict(module.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    rows_of = {name: row if layerwise else 0 for row, name in enumerate(parameters)}
    order = torch.randperm(K).tolist() if order is None else order
    for start in range(0, K, b):
        deltas = []
        for k in order[start : start + b]:
            state = load(k)
            center = mean if differences else dict.fromkeys(parameters, 0.0)
            deltas.append({name: state[name] - center[name] for name in parameters})
        n_rows = max(rows_of.values()) + 1
        alpha = torch.zeros(len(deltas), n_rows, dtype=dtype, device=X.device)
        alpha.requires_grad_()
        optimizer = torch.optim.AdamW([alpha], lr=lr, weight_decay=0.0)
        for _ in range(max_epochs):
            for rows, labels in minibatches(X, y, size, shuffle):
                _set(parameters, soup, deltas, alpha, rows_of)
                module.zero_grad()
                cross_entropy(module(rows), labels).backward()
                alpha.grad = torch.zeros_like(alpha)
                for k, delta in enumerate(deltas):
                    for name, p in parameters.items():
                        alpha.grad[k, rows_of[name]] += (p.grad * delta[name]).sum()
                optimizer.step()
        _set(parameters, soup, deltas, alpha, rows_of)
        soup = {name: p.detach().clone() for name, p in parameters.items()}
    return soup


@torch.no_grad()
def _set(
    parameters: dict[str, nn.Parameter],
    soup: State,
    deltas: list[State],
    alpha: torch.Tensor,
    rows_of: dict[str, int],
) -> None:
    for name, p in parameters.items():
        w = soup[name].clone()
        for k, delta in enumerate(deltas):
            w += alpha[k, rows_of[name]] * delta[name]
        p.copy_(w)
