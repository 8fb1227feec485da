"""Modules that compute something from their weights when eval() is called."""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter

import torch
from torch import nn

from ..data.arrays import Inputs, map_inputs
from ..runtime.fingerprint import fingerprint
from ..runtime.random_state import preserved_random_state
from .objective import Forward, as_rows, called

SWITCHES = attrgetter("train", "eval")  # of a class
PLAIN = (nn.Module.train, nn.Module.eval)


def refuse_merging(
    module: nn.Module, row: Inputs, forward: Forward | None, names: Collection[str]
) -> None:
    """Raise an error if weights that are loaded in eval mode give other outputs than before eval().

    A module that merges, fuses or caches weights in eval() would be evaluated with those of an
    earlier checkpoint. Needs two passes of one row with made-up weights, which stay in the module.
    (A module that caches weights in its first pass is not found.)
    """
    try:
        differ = _difference_in_eval(module, row, forward, names)
        changed = _changed_by_eval(module, names)
    finally:
        module.eval()
    if not changed and differ is None:
        return
    parts = {
        type(part).__name__: name
        for name, part in module.named_modules()
        if SWITCHES(type(part)) != PLAIN
    }
    kinds = [f"{kind} ({name!r})" if name else kind for kind, name in list(parts.items())[:5]]
    found = (
        f"eval() changes {changed!r}"
        if changed
        else f"With weights that are loaded in eval mode, the outputs differ by up to {differ:.3g} "
        f"from those with the same weights loaded in training mode, followed by eval()"
    )
    raise ValueError(
        f"The module can't be evaluated with one checkpoint after another: a train() or eval() of "
        f"its own merges, fuses or caches weights (in {' or '.join(kinds)}). {found}; expected "
        f"equal values. Build the module so that it does not merge, such as "
        f"lora.Linear(..., merge_weights=False) of loralib."
    )


def _changed_by_eval(module: nn.Module, names: Collection[str]) -> str | None:
    """Name of a tensor that eval() changes, such as one that factors are added to."""
    module.train()
    _load_made_up(module, names, seed=0)
    loaded = _digests(module)
    module.eval()
    found = _digests(module)
    return next((name for name in loaded if found.get(name) not in (None, loaded[name])), None)


def _digests(module: nn.Module) -> dict[str, str]:
    state = module.state_dict().items()
    return {name: fingerprint(v) for name, v in state if isinstance(v, torch.Tensor)}


def _difference_in_eval(
    module: nn.Module, row: Inputs, forward: Forward | None, names: Collection[str]
) -> float | None:
    """How much outputs differ with weights loaded before and after eval(); None for rounding."""
    try:
        _load_made_up(module, names, seed=1)  # others than eval() was called with
        after = _output(module, row, forward)
        before = _output(_reloaded(module, names), row, forward)
        if _are_close(after, before):
            return None
        again = _output(_reloaded(module, names), row, forward)
    except Exception:  # the module may refuse made-up weights; then nothing is known
        return None
    # None if its outputs differ between any two passes
    return _difference(after, before) if _are_close(before, again) else None


def _reloaded(module: nn.Module, names: Collection[str]) -> nn.Module:
    """The module after made-up weights were loaded in training mode."""
    module.train()
    _load_made_up(module, names, seed=1)
    module.eval()
    return module


@torch.no_grad()
def _output(module: nn.Module, row: Inputs, forward: Forward | None) -> torch.Tensor:
    """Output for one row."""
    with preserved_random_state():
        torch.manual_seed(0)
        row = map_inputs(torch.clone, row)  # a module may write into it
        output = as_rows(called(module, row, forward), row)
    return output.detach().double()


def _load_made_up(module: nn.Module, names: Collection[str], seed: int) -> None:
    """Fill floating-point weights with random numbers of the usual size.

    Vectors are positive, as variances have to be.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict(keep_vars=True).items():
        if name in names and value.is_floating_point():
            numbers = torch.randn(value.shape, generator=generator)
            if value.ndim > 1 and value.numel():
                numbers *= numbers[0].numel() ** -0.5
            else:
                numbers = 1 + 0.1 * numbers.tanh()
            value.detach().copy_(numbers)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape and a.numel() else float("inf")


def _are_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether outputs are equal but for rounding; also where they are not finite."""
    if a.shape != b.shape:
        return False
    is_finite = bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())
    return not is_finite or _difference(a, b) <= 1e-4 * max(float(b.abs().max()), 1e-30)
