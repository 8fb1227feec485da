"""Module + criterion + minibatches -> loss, gradient, outputs; counts what it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from ..checkpoints.collection import CheckpointCollection
from ..data.rows import IGNORED, Batch, HeldOut, Inputs, Task, map_inputs, n_rows, take
from ..exceptions import CheckpointError

Criterion: TypeAlias = type[nn.Module] | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

Forward: TypeAlias = Callable[[Any, Any], Any]  # (module, X) -> outputs

DEFAULT_CRITERIA: dict[Task, type[nn.Module]] = {
    "classification": nn.CrossEntropyLoss,
    "regression": nn.MSELoss,
    "multilabel": nn.BCEWithLogitsLoss,
}


@dataclass
class Counts:
    """What a fit cost: module calls on minibatches, and the rows in them."""

    n_forward: int = 0
    n_backward: int = 0
    rows_forward: int = 0
    rows_backward: int = 0
    rows_recalibrated: int = 0  # through BatchNorm's re-estimation, forward only
    n_reduced: int = 0  # gradient numbers that the ranks of a distributed job had to sum

    def add(self, other: Counts) -> None:
        """Count what somebody else ran, too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Objective:
    """The held-out loss of the module's present weights, and its gradient.

    The module stays in eval mode: dropout is off and BatchNorm uses its (mixed) statistics, so
    the loss that is minimised is that of the model that will be used. With ``precision="bf16"``
    the forward pass runs under autocast; the criterion does not.
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: Criterion | None,
        task: Task,
        precision: str = "fp32",
        compile: bool = False,
        forward: Forward | None = None,
        one_logit: bool = False,
    ) -> None:
        self.module = module.eval()
        self._call: Callable[..., Any] = torch.compile(self.module) if compile else self.module
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._autocast = precision == "bf16"
        self._forward = forward
        self._one_logit = one_logit
        self._task = task
        # the default takes two logits, a criterion of the user's takes what the module gives
        self._wants_one_logit = one_logit and criterion is not None
        criterion = DEFAULT_CRITERIA[task] if criterion is None else criterion
        criterion = criterion() if isinstance(criterion, type) else criterion
        if isinstance(
            criterion, nn.Module
        ):  # class weights go along; the user's stay where they are
            criterion = copy.deepcopy(criterion).to(self._device)
        self.criterion = criterion
        self._ignored = ignored_label(criterion)
        self.counts = Counts()

    def own(self) -> Objective:
        """The same with a module and counts of its own, never compiled."""
        other = copy.copy(self)
        other._call = other.module = copy.deepcopy(self.module)
        other.counts = Counts()
        return other

    def loss(self, batch: Batch, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Mean loss of a batch; ``scale`` multiplies the outputs (Learned-Soup's beta)."""
        return self._loss(self.forward(batch.X), batch, scale)

    def _loss(self, output: torch.Tensor, batch: Batch, scale: torch.Tensor | None) -> torch.Tensor:
        y = batch.y
        if scale is not None:
            output = output * scale
        if self._wants_one_logit:
            output, y = output[:, 1] - output[:, 0], y.to(output.dtype)
        if batch.counted is not None and not bool(batch.counted.any()):
            return output.sum() * 0.0  # nothing here has a label
        criterion = self.criterion if batch.weight is None else _per_row(self.criterion)
        loss = criterion(output, y)
        if batch.amounts is None or (loss.ndim == 0 and batch.weight is None):
            return loss.mean()
        if loss.ndim == 0:
            raise ValueError(
                "sample_weight needs a loss per row: the criterion returned one number for "
                f"{len(batch)} rows. Give one with reduction='none', or drop sample_weight."
            )
        rows, amounts = loss.reshape(len(batch), -1), batch.amounts
        if batch.counted is not None and loss.shape == y.shape:  # 0 where there is no label
            rows = rows * (amounts / batch.counted.clamp_min(1))[:, None]
            total = rows.sum()
        else:
            total = (rows.mean(dim=1) * amounts).sum()
        return total / torch.as_tensor(batch.amount).clamp_min(1e-12)

    @torch.no_grad()
    def mean_loss(self, data: HeldOut, batch_size: int | None) -> float:
        """Loss over all rows: the mean of the batches', weighted by what is in them."""
        total = amount = 0.0
        for batch in data.batches(batch_size):
            share = float(batch.amount)
            total += share * float(self.loss(batch))
            amount += share
        return total / amount

    def loss_and_backward(
        self, batch: Batch, scale: torch.Tensor | None = None, share: float | torch.Tensor = 1.0
    ) -> torch.Tensor:
        """Accumulate ``share`` times the gradient into the parameters (and ``scale``).

        Returns that share of the loss and, but for a regression, of the rows that are right.
        """
        output = self.forward(batch.X)
        loss = self._loss(output, batch, scale) * share
        loss.backward()  # type: ignore[no-untyped-call]
        self.counts.n_backward += 1
        self.counts.rows_backward += len(batch)
        told = [loss.detach()]
        if self.has_score:
            told.append(self._right(output.detach(), batch).to(loss) * share)
        return torch.stack(told)

    @property
    def has_score(self) -> bool:
        """Whether rows are right or wrong."""
        return self._task != "regression"

    def _right(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Weighted share of rows, or of pixels and tokens, whose prediction is right."""
        if self._task == "classification":
            right, counted = output.argmax(dim=1) == batch.y, batch.y != self._ignored
        else:
            right = ((output > 0) == (batch.y > 0)).reshape(len(batch), -1).all(dim=1)
            counted = torch.ones_like(right)
        weight = counted.to(output.dtype)
        if batch.weight is not None:
            weight = weight * batch.weight.reshape(-1, *[1] * (weight.ndim - 1))
        return (weight * right).sum() / weight.sum().clamp_min(1e-12)

    def forward(self, X: Inputs) -> torch.Tensor:
        self.counts.n_forward += 1
        self.counts.rows_forward += n_rows(X)
        return self.run(X)

    def run(self, X: Inputs) -> torch.Tensor:
        """Outputs for these rows, not counted."""
        X = map_inputs(lambda part: part.to(self._device, non_blocking=True), X)
        if not self._autocast:
            return self._output(X)
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            return self._output(X).float()

    def _output(self, X: Inputs) -> torch.Tensor:
        return feed(self._call, X, self._forward, self._one_logit)

    def outputs(self, X: Inputs, batch_size: int | None) -> torch.Tensor:
        """All outputs (N, ...), in row order."""
        return batched(self.forward, X, batch_size)


@torch.no_grad()
def batched(
    forward: Callable[[Inputs], torch.Tensor],
    X: Inputs,
    batch_size: int | None,
) -> torch.Tensor:
    """Apply ``forward`` to a few rows at a time and put the results together."""
    n = n_rows(X)
    size = n if batch_size is None else batch_size
    slices = (slice(start, start + size) for start in range(0, n, size))
    return torch.cat([forward(take(X, rows)) for rows in slices])


def feed(
    module: Callable[..., Any],
    X: Inputs,
    forward: Forward | None = None,
    one_logit: bool = False,
) -> torch.Tensor:
    """Outputs of a module for one input, inputs by name or by position, or as ``forward`` says.

    One logit z becomes two, 0 and z: their softmax is its sigmoid.
    """
    if forward is not None:
        found = forward(module, X)
    elif isinstance(X, dict):
        found = module(**X)
    else:
        found = module(*X) if isinstance(X, tuple) else module(X)
    output = as_output(found)
    if not one_logit:
        return output
    z = output.reshape(len(output))
    return torch.stack([torch.zeros_like(z), z], dim=1)


def as_output(output: Any) -> torch.Tensor:
    """Find the output tensor: itself, ``logits``, or the first of a tuple that has rows.

    (Models of Hugging Face that are given labels put the loss, a number, before the logits.)
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)):
        tensors = (part for part in output if isinstance(part, torch.Tensor) and part.ndim)
        output = next(tensors, output)
    if not isinstance(output, torch.Tensor):
        raise TypeError(
            f"The module returned a {type(output).__name__}, expected a tensor, a tuple with one, "
            f"or something with logits. Tell how to get the outputs: forward=lambda module, X: ..."
        )
    return output


def ignored_label(criterion: Any) -> int:
    """The criterion's number for a row or a position that is left out."""
    criterion = criterion() if isinstance(criterion, type) else criterion
    found = getattr(criterion, "ignore_index", None)
    return found if isinstance(found, int) else IGNORED


def _per_row(
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same criterion with a loss per row, where it is a module that can."""
    if isinstance(criterion, nn.Module) and getattr(criterion, "reduction", None) == "mean":
        criterion = copy.deepcopy(criterion)
        criterion.reduction = "none"  # type: ignore[assignment]
    return criterion


def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into a module, in place: ties and unsaved buffers survive."""
    with torch.no_grad():
        for name, value in module.state_dict(keep_vars=True).items():
            if name in weights:
                value.copy_(weights[name])


def prepare_module(
    module: nn.Module, checkpoints: CheckpointCollection, device: torch.device
) -> nn.Module:
    """Check that the checkpoints fit the module; compute in float32, or float64 where stored so."""
    state = module.state_dict(keep_vars=True)
    present = {id(value) for name, value in state.items() if name in checkpoints.layout}
    missing = [n for n in state if n not in checkpoints.layout and id(state[n]) not in present]
    unexpected = [name for name in checkpoints.layout if name not in state]
    if missing or unexpected:
        raise CheckpointError(
            "The module does not fit the checkpoints: it "
            + " and it ".join(
                f"{verb} {', '.join(map(repr, names[:5]))}"
                + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                for verb, names in (("has", missing), ("lacks", unexpected))
                if names
            )
            + f". {_remedy(list(state), list(checkpoints.layout))}"
        )
    for name, info in checkpoints.layout.items():
        if tuple(state[name].shape) != info.shape:
            raise CheckpointError(
                f"The module does not fit the checkpoints: {name!r} has shape "
                f"{tuple(state[name].shape)} in the module and {info.shape} in the checkpoints."
            )
        if state[name].is_floating_point() != info.is_floating:
            raise CheckpointError(
                f"The module does not fit the checkpoints: {name!r} has dtype {state[name].dtype} "
                f"in the module and {info.dtype} in the checkpoints."
            )
    wide = any(info.dtype == torch.float64 for info in checkpoints.layout.values())
    wide = wide or any(value.dtype == torch.float64 for value in state.values())
    module = module.to(device, torch.float64 if wide else torch.float32).eval()
    return module


def _remedy(wanted: list[str], found: list[str]) -> str:
    """What to do where the module's names are not those of the checkpoints."""
    for name in found:
        prefix = name.removesuffix(wanted[0]) if wanted and name.endswith(wanted[0]) else ""
        if prefix and {prefix + name for name in wanted} <= set(found):
            return (
                f"All of the module's names are there, behind {prefix!r}: open the checkpoints "
                f"with CheckpointCollection(..., prefix={prefix!r}), which leaves the rest out."
            )
    return "Give the architecture they were saved from: module=build_model."


def module_dtype(module: nn.Module) -> torch.dtype:
    """The floating dtype a module computes in."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
