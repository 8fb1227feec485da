"""Detect modules that return probabilities, and losses of probabilities: soups need logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..data.outputs import Outputs, Task

ACTIVATIONS = {  # functions of torch that give probabilities, by name
    "sigmoid": "sigmoid", "special_expit": "sigmoid", "hardsigmoid": "sigmoid",
    "softmax": "softmax", "special_softmax": "softmax",
}  # fmt: skip
# functions of probabilities that give probabilities
KEEPS = {
    "squeeze", "unsqueeze", "view", "view_as", "reshape", "flatten", "unflatten", "__getitem__",
    "select", "narrow", "index_select", "gather", "transpose", "t", "permute", "movedim",
    "moveaxis", "swapaxes", "swapdims", "expand", "contiguous", "clone", "detach", "to", "type",
    "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "clamp", "clamp_min",
    "clamp_max", "clip", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "mean",
    "interpolate",
}  # fmt: skip
ROUNDING = 1e-5  # error of a sum of float32 probabilities
MOST = 1.05  # sum of probabilities that are rounded, or to which a little was added
TO_LOGITS = {  # finite also where a probability is rounded to 0 or 1
    "sigmoid": "torch.logit({}, eps=1e-6)",
    "softmax": "{}.clamp_min(1e-12).log()",
}


class Watch(TorchFunctionMode):
    """Follows which tensors a sigmoid or softmax has computed, without keeping them in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._found: Any = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            if kind := self._kind(getattr(func, "__name__", ""), args):
                self._found[result] = kind
            elif args and result is args[0]:  # changed in place
                self._found.pop(result, None)
        return result

    def _kind(self, name: str, args: Sequence[Any]) -> str:
        """The activation that the result of a function of these arguments comes from."""
        name = name if name.endswith("__") else name.removesuffix("_")
        if name not in KEEPS or not args:
            return ACTIVATIONS.get(name, "")
        several = isinstance(args[0], (list, tuple))
        kinds = {self.activation_of(part) for part in (args[0] if several else args[:1])}
        return kinds.pop() if len(kinds) == 1 else ""

    def activation_of(self, output: Any) -> str:
        """The activation that a tensor comes from: "sigmoid", "softmax" or ""."""
        return str(self._found.get(output, "")) if isinstance(output, torch.Tensor) else ""


def judge_outputs(output: torch.Tensor, activation: str, outputs: Outputs, call: str) -> str | None:
    """A warning if a module's output for one row is probabilities, not logits; or None.

    ``activation`` is what it comes from, as far as known, and ``call`` the code that returns it.
    """
    is_one = outputs.one_logit or outputs.task == "multilabel"
    if outputs.classes is None and not is_one:  # a regression, or a language model
        return None
    output = output.detach().cpu().double()  # MPS has no float64
    if not output.numel() or not bool(((output >= 0) & (output <= 1)).all()):
        return None
    if activation:
        found = f"The module ends in a {activation}"
    elif not is_one and _sums_to_one(output):
        found = "The module's outputs are in [0, 1] and sum to 1"
    else:
        return None
    if outputs.task == "multilabel":
        harm = "every row would get every label (outputs above 0), and "
    elif outputs.one_logit:
        harm = "every row would get the second label (outputs above 0), and "
    else:
        harm = ""
    return (
        f"{found}, so it returns probabilities, but soups read outputs as logits: {harm}losses and "
        f"probabilities would be wrong. Remove the {activation or 'softmax'} from the module, or "
        f"pass {to_logits('sigmoid' if is_one else activation or 'softmax', call)}."
    )


def _sums_to_one(output: torch.Tensor) -> bool:
    """Whether an output (1, n_outputs, ...) in [0, 1] is a probability of each output."""
    is_near = (output.sum(dim=1) - 1).abs() <= ROUNDING
    return bool(is_near.all()) and bool(output.frac().any())


def to_logits(activation: str, call: str = "module(X)") -> str:
    """The parameter of a soup that turns probabilities, which ``call`` returns, into logits."""
    return f"forward=lambda module, X: {TO_LOGITS[activation].format(call)}"


def loss_of_probabilities(criterion: Any) -> str:
    """The name of a loss of probabilities or their logarithms, or "" for other losses."""
    for loss, function in ((nn.BCELoss, F.binary_cross_entropy), (nn.NLLLoss, F.nll_loss)):
        is_class = isinstance(criterion, type) and issubclass(criterion, loss)
        if is_class or isinstance(criterion, loss) or criterion is function:
            return loss.__name__
    return ""


def check_criterion(criterion: Any, task: Task) -> None:
    """Refuse a loss of probabilities where outputs are read as logits."""
    is_read = task in ("classification", "multilabel")
    if is_read and loss_of_probabilities(criterion) == nn.BCELoss.__name__:
        raise ValueError(
            f"criterion={criterion!r} is a loss of probabilities, but soups need logits. Use "
            f"criterion=None, or torch.nn.BCEWithLogitsLoss; if the module ends in a sigmoid, "
            f"remove it, or pass {to_logits('sigmoid')}."
        )


def check_log_probabilities(criterion: Any, output: torch.Tensor, is_text: bool) -> None:
    """Refuse a loss of log-probabilities if a module's output for one row is none.

    The outputs of a language model are in the last dimension.
    """
    if loss_of_probabilities(criterion) != nn.NLLLoss.__name__ or output.ndim < 2:
        return
    total = float(output.cpu().double().exp().sum(dim=-1 if is_text else 1).max())
    if total > MOST:
        raise ValueError(
            f"criterion={criterion!r} needs log-probabilities, but the exponentials of the "
            f"module's outputs for one row sum to {total:.3g}, expected 1. Use criterion=None for "
            f"logits; if the module ends in a softmax, also remove it, or pass "
            f"{to_logits('softmax')}."
        )


def check_net(criterion: Any, task: Task, is_classifier: bool) -> None:
    """Refuse to train a skorch net with a loss of probabilities for a soup without ``forward``."""
    loss = loss_of_probabilities(criterion)
    if loss == nn.BCELoss.__name__ and task != "regression":
        activation, instead = "sigmoid", "BCEWithLogitsLoss"
    elif loss == nn.NLLLoss.__name__ and is_classifier:  # skorch applies the logarithm
        activation, instead = "softmax", "CrossEntropyLoss"
    else:
        return
    raise ValueError(
        f"The estimator's criterion is {loss}, so its module returns probabilities, but soups need "
        f"logits. Remove the {activation} from the module and use criterion=torch.nn.{instead}, or "
        f"pass a soup with {to_logits(activation)}."
    )
