"""Modules that compute something from their weights when eval() is called."""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter

import torch
from torch import nn

from ..data.arrays import Inputs, map_inputs
from ..runtime.random_state import preserved_random_state
from .objective import Forward, as_output, called

SWITCHES = attrgetter("train", "eval")  # of a class
PLAIN = (nn.Module.train, nn.Module.eval)


def refuse_merging(
    module: nn.Module, row: Inputs, forward: Forward | None, names: Collection[str]
) -> None:
    """Raise an error if weights that are loaded in eval mode give other outputs than before eval().

    A module that merges, fuses or caches weights in eval() would be evaluated with those of an
    earlier checkpoint. Needs two passes of one row with made-up weights, which stay in the module.
    """
    try:
        _load_made_up(module, names)
        after = _output(module, row, forward)
        before = _output(_reloaded(module, names), row, forward)
        if _are_close(after, before):
            return
        again = _output(_reloaded(module, names), row, forward)
    except Exception:  # the module may refuse made-up weights; then nothing is known
        return
    finally:
        module.eval()
    if not _are_close(before, again):  # its outputs differ between any two passes
        return
    parts = {
        type(part).__name__: name
        for name, part in module.named_modules()
        if SWITCHES(type(part)) != PLAIN
    }
    kinds = [f"{kind} ({name!r})" if name else kind for kind, name in list(parts.items())[:5]]
    raise ValueError(
        f"The module can't be evaluated with one checkpoint after another: a train() or eval() of "
        f"its own merges, fuses or caches weights (in {' or '.join(kinds)}). With weights that are "
        f"loaded in eval mode, the outputs differ by up to {_difference(after, before):.3g} from "
        f"those with the same weights loaded in training mode, followed by eval(); expected equal "
        f"outputs. Build the module so that it does not merge, such as "
        f"lora.Linear(..., merge_weights=False) of loralib."
    )


def _reloaded(module: nn.Module, names: Collection[str]) -> nn.Module:
    """The module after made-up weights were loaded in training mode."""
    module.train()
    _load_made_up(module, names)
    module.eval()
    return module


@torch.no_grad()
def _output(module: nn.Module, row: Inputs, forward: Forward | None) -> torch.Tensor:
    """Output for one row."""
    with preserved_random_state():
        torch.manual_seed(0)
        row = map_inputs(torch.clone, row)  # a module may write into it
        found = called(module, row, forward)
    output = found if isinstance(found, torch.Tensor) else as_output(found)
    return output.detach().double()


def _load_made_up(module: nn.Module, names: Collection[str]) -> None:
    """Fill floating-point weights with numbers of the usual size, which have no zeros or ties.

    Vectors are positive, as variances have to be.
    """
    for name, value in module.state_dict(keep_vars=True).items():
        if name not in names or not value.is_floating_point():
            continue
        tensor = value.detach()
        n_in = tensor[0].numel() if tensor.ndim > 1 else 1
        tensor.fill_(1.0)
        for axis, size in enumerate(tensor.shape):
            wave = torch.arange(size, dtype=tensor.dtype, device=tensor.device).add_(1 + axis)
            wave = wave.cos_() if tensor.ndim > 1 else wave.cos_().mul_(0.1).add_(1)
            tensor.mul_(wave.view(-1, *[1] * (tensor.ndim - 1 - axis)))
        tensor.mul_(n_in**-0.5)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape and a.numel() else float("inf")


def _are_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether outputs are equal but for rounding; also where they are not finite."""
    if a.shape != b.shape:
        return False
    is_finite = bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())
    return not is_finite or _difference(a, b) <= 1e-4 * max(float(b.abs().max()), 1e-30)
