"""Module + criterion + minibatches -> loss, gradient, outputs; counts what it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.computed import counters_of, recomputed
from ..data.arrays import Inputs, map_inputs, n_rows
from ..data.indexed import IndexedRows
from ..data.labels import ignore_index_of
from ..data.outputs import Outputs, Task
from ..data.rows import Batch, HeldOut, to_inputs
from ..data.tokens import IGNORED
from ..exceptions import CheckpointError
from ..runtime.copies import copied
from ..runtime.distributed import gather_rows, share_or_last, world_size
from ..runtime.shards import own, reshard, sharded_parts

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Criterion: TypeAlias = type[nn.Module] | Loss
Forward: TypeAlias = Callable[[Any, Any], Any]  # (module, X) -> outputs

DEFAULT_CRITERIA: dict[Task, type[nn.Module]] = {
    "classification": nn.CrossEntropyLoss,
    "regression": nn.MSELoss,
    "multilabel": nn.BCEWithLogitsLoss,
    "language-modeling": nn.CrossEntropyLoss,
}


@dataclass
class Counts:
    """Cost of a fit: numbers of forward and backward passes, and of rows in them."""

    n_forward: int = 0
    n_backward: int = 0
    rows_forward: int = 0
    rows_backward: int = 0
    rows_recalibrated: int = 0  # through BatchNorm's re-estimation, forward only
    n_reduced: int = 0  # gradient numbers that the ranks of a distributed job had to sum

    def add(self, other: Counts) -> None:
        """Add the counts of a worker."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def _takes_classes(criterion: Any) -> bool:
    """Whether a criterion is one of torch's losses of an output per class."""
    while isinstance(criterion, partial):
        criterion = criterion.func
    is_module = isinstance(criterion, (nn.CrossEntropyLoss, nn.MultiMarginLoss))
    return is_module or criterion in (F.cross_entropy, F.multi_margin_loss)


class Objective:
    """The held-out loss with the current weights of the module, in eval mode, and its gradient.

    With ``precision="bf16"`` the forward pass runs under autocast; the criterion does not.
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: Criterion | None,
        outputs: Outputs,
        precision: str = "fp32",
        compile: bool = False,
        forward: Forward | None = None,
    ) -> None:
        module.eval()  # its return value may be None in a subclass
        self.module = module
        self.outputs = outputs
        self._call: Callable[..., Any] = torch.compile(self.module) if compile else self.module
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._dtype = module_dtype(module)
        self._autocast = precision == "bf16"
        self.is_sharded = bool(sharded_parts(module))  # over the ranks, which then pass together
        self._forward = forward
        is_own = criterion is not None
        criterion = DEFAULT_CRITERIA[outputs.task] if criterion is None else criterion
        criterion = criterion() if isinstance(criterion, type) else criterion
        if isinstance(criterion, nn.Module):  # class weights go along; the user's stay in place
            criterion = copy.deepcopy(criterion).to(self._device)
        self.criterion = criterion
        # a criterion of the user's takes what the module gives, unless it needs one per class
        self._wants_one_logit = outputs.one_logit and is_own and not _takes_classes(criterion)
        # rows are right or wrong; of tokens that would cost another look at all logits
        self.has_score = outputs.task != "regression" and not outputs.is_text
        self.counts = Counts()

    @property
    def n_apart(self) -> int:
        """Ranks that can evaluate weights of their own: those that share a module can't."""
        return 1 if self.is_sharded else world_size()

    def own(self) -> Objective:
        """The same with a module and counts of its own, never compiled."""
        other = copy.copy(self)
        other._call = other.module = copied(self.module)
        other.counts = Counts()
        return other

    def loss(
        self, output: torch.Tensor, batch: Batch, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean loss of a batch's outputs, times ``scale`` if given (Learned-Soup's beta)."""
        y = self.outputs.for_criterion(batch.y)
        if scale is not None:
            output = output * scale
        if self._wants_one_logit:
            self._check_ignores(batch)
            output, y = output[:, 1] - output[:, 0], y.to(output.dtype)
        if batch.counted is not None and not bool(batch.counted.any()):
            return output.sum() * 0.0  # nothing here has a label
        if self.outputs.is_text:  # no copy: the labels were shifted, not the logits
            output, y = output.flatten(0, 1), y.flatten()
        criterion = self.criterion if batch.weight is None else _per_row(self.criterion)
        loss = criterion(output, y)
        if batch.amounts is None or (loss.ndim == 0 and batch.weight is None):
            return loss.mean()
        if loss.ndim == 0:
            raise ValueError(
                f"sample_weight needs one loss per row, but the criterion returned a single number "
                f"for {len(batch)} rows. Pass a criterion with reduction='none', or omit "
                f"sample_weight."
            )
        rows, amounts = loss.reshape(len(batch), -1), batch.amounts
        if batch.counted is not None and loss.shape == y.shape:  # 0 where there is no label
            rows = rows * (amounts / batch.counted.clamp_min(1))[:, None]
            total = rows.sum()
        else:
            total = (rows.mean(dim=1) * amounts).sum()
        return total / torch.as_tensor(batch.amount).clamp_min(1e-12)

    def _check_ignores(self, batch: Batch) -> None:
        """Refuse positions without a label where a loss of one logit would take them for labels."""
        if batch.counted is not None and ignore_index_of(self.criterion) is None:
            raise ValueError(
                f"y holds {IGNORED} at positions to ignore, but the criterion {self.criterion!r} "
                f"has no ignore_index, so it would take them for labels. Use criterion=None, which "
                f"ignores them."
            )

    @torch.no_grad()
    def mean_loss(self, data: HeldOut, batch_size: int | None) -> float:
        """Loss over all rows: the mean of the batches', weighted by what is in them."""
        total = amount = 0.0
        for batch in data.batches(batch_size):
            share = float(batch.amount)
            total += share * float(self.loss(self.forward(batch.X), batch))
            amount += share
        return total / amount

    def loss_and_backward(
        self, together: Sequence[Batch], scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Accumulate the gradient into the parameters (and ``scale``), of minibatches as if one.

        Returns their loss and, but for a regression, the share of rows that are right; in a
        distributed job this rank's part of both.
        """
        total = sum(batch.total for batch in together)
        total = total.clamp_min(1e-12) if isinstance(total, torch.Tensor) else total
        found = []
        for batch in together:
            if not len(batch.y):  # fewer rows than ranks
                continue
            share = batch.amount / total
            output = self._forward_own(batch.X)
            if not output.requires_grad:
                raise ValueError(
                    f"The coefficients can't be learned: the outputs of "
                    f"{type(self.module).__name__} have no gradient, expected ones that depend on "
                    f"the weights differentiably. Remove torch.no_grad(), inference_mode() and "
                    f"detach() from its forward(), or use GreedySoup, which needs no gradient."
                )
            loss = self.loss(output, batch, scale) * share
            loss.backward()  # type: ignore[no-untyped-call]
            self.counts.n_backward += 1
            self.counts.rows_backward += len(batch.y)
            found.append([loss.detach()])
            if self.has_score:
                right = self.outputs.right(output.detach(), batch)
                found[-1].append(right.to(loss) * share)
        if not found:
            dtype, device = module_dtype(self.module), together[0].y.device
            return torch.zeros(1 + self.has_score, dtype=dtype, device=device)
        return torch.stack([torch.stack(one) for one in found]).sum(dim=0)

    def forward(self, X: Inputs, *, recalibrating: bool = False) -> torch.Tensor:
        """Outputs for these rows; counts the pass.

        The ranks that share a module share the rows out, too, and each gets all outputs.
        """
        if not self.is_sharded:
            return self._forward_own(X, recalibrating)
        n = n_rows(X)
        mine = share_or_last(n)
        output = self._forward_own(map_inputs(lambda part: part[mine], X), recalibrating)
        return gather_rows(output, n)

    def _forward_own(self, X: Inputs, recalibrating: bool = False) -> torch.Tensor:
        X = to_inputs(X, self._dtype, self._device)
        kind, half = self._device.type, torch.bfloat16
        with torch.autocast(kind, dtype=half) if self._autocast else nullcontext():
            output = feed(self._call, X, self.outputs, self._forward)
        if recalibrating:
            self.counts.rows_recalibrated += len(output)
        else:
            self.counts.n_forward += 1
            self.counts.rows_forward += len(output)
        return output

    @torch.no_grad()
    def outputs_of(self, data: HeldOut, batch_size: int | None) -> torch.Tensor:
        """All outputs (N, ...), in row order."""
        return torch.cat([self.forward(batch.X) for batch in data.batches(batch_size)])


@torch.no_grad()
def forward_in_batches(
    forward: Callable[[Inputs], torch.Tensor], X: Inputs | IndexedRows, batch_size: int | None
) -> torch.Tensor:
    """Apply ``forward`` to a few rows at a time and put the results together."""
    n = n_rows(X)
    size = n if batch_size is None else batch_size
    if isinstance(X, IndexedRows):
        return torch.cat([forward(part) for part in X.walk(size)])
    starts = range(0, n, size)
    # copied, as a module may write into what it is fed
    parts = (map_inputs(lambda part: part[i : i + size].clone(), X) for i in starts)  # noqa: B023
    return torch.cat([forward(part) for part in parts])


def feed(
    module: Callable[..., Any], X: Inputs, outputs: Outputs, forward: Forward | None = None
) -> torch.Tensor:
    """Outputs of a module for one input, inputs by name or by position, or by ``forward``.

    One logit z becomes two, 0 and z. Outputs of two bytes, as within `torch.autocast`, are widened.
    """
    output = as_rows(called(module, X, forward), X)
    if output.dtype in (torch.bfloat16, torch.float16):  # numpy has no bfloat16
        output = output.float()
    return outputs.two_logits(output) if outputs.one_logit else output


def called(module: Callable[..., Any], X: Inputs, forward: Forward | None = None) -> Any:
    """What a module returns, whatever it is.

    Within the user's own `torch.autocast`, weights are converted once and kept until it ends, also
    if other ones are copied into them meanwhile; so what is kept is removed first.
    """
    torch.clear_autocast_cache()
    if forward is not None:
        return forward(module, X)
    if isinstance(X, dict):
        return module(**X)
    return module(*X) if isinstance(X, tuple) else module(X)


def as_code(X: Inputs, found: Any, forward: Forward | None = None) -> str:
    """The code that gives the outputs, for advice; ``found`` is what the module returned."""
    kinds: dict[type, str] = {dict: "module(**X)", tuple: "module(*X)"}
    call = kinds.get(type(X), "module(X)") if forward is None else "forward(module, X)"
    if isinstance(found, torch.Tensor):
        return call
    if hasattr(found, "logits"):
        return f"{call}.logits"
    if isinstance(found, (tuple, list)):
        return f"{call}[{next(i for i, part in enumerate(found) if is_output(part))}]"
    return f"{call}['logits']"


def as_rows(found: Any, X: Inputs) -> torch.Tensor:
    """The output tensor; for a single row with the axis that a squeeze() in the module removes."""
    output = found if isinstance(found, torch.Tensor) else as_output(found)
    if output.ndim < 2 and output.shape != (1,) and n_rows(X) == 1:
        return output[None]
    return output


def as_output(output: Any) -> torch.Tensor:
    """Find the output tensor: itself, ``logits``, or the first of a tuple that has rows."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)):
        # models of Hugging Face that are given labels put the loss, a number, before the logits
        tensors = filter(is_output, output)
        output = next(tensors, output)
    if not isinstance(output, torch.Tensor):
        raise TypeError(
            f"The module returned a {type(output).__name__}, expected a tensor, a tuple with a "
            f"tensor, or an object with logits. Pass a function that returns the outputs: "
            f"forward=lambda module, X: ..."
        )
    return output


def is_output(part: Any) -> bool:
    """Whether a part of what a module returned is a tensor with rows."""
    return isinstance(part, torch.Tensor) and part.ndim > 0


def _per_row(criterion: Loss) -> Loss:
    """The same criterion with a loss per row, where it is a module that can."""
    if isinstance(criterion, nn.Module) and getattr(criterion, "reduction", None) == "mean":
        criterion = copy.deepcopy(criterion)
        criterion.reduction = "none"  # type: ignore[assignment]
    return criterion


def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into a module in place; ties and unsaved buffers are kept.

    Parameters
    ----------
    module : nn.Module
        Module to change.
    weights : mapping of str to Tensor
        Some or all entries of its state dict; for sharded tensors, the rows on this rank.
    """
    reshard(module)
    with torch.no_grad():
        for name, value in module.state_dict(keep_vars=True).items():
            if name in weights:
                own(value).copy_(weights[name])


def prepare_module(
    module: nn.Module, checkpoints: CheckpointCollection, device: torch.device
) -> nn.Module:
    """Check that the checkpoints fit the module; compute in float32, or float64 where stored so."""
    state = module.state_dict(keep_vars=True)
    if lazy := [name for name, value in state.items() if is_lazy(value)]:
        raise ValueError(
            f"The module has no shape for {lazy[0]!r} yet ({type(module).__name__} has lazy "
            f"layers), expected the architecture of the checkpoints. Let the factory call it once "
            f"with a batch before it returns it, or use layers with sizes."
        )
    present = {id(value) for name, value in state.items() if name in checkpoints.layout}
    missing = [n for n in state if n not in checkpoints.layout and id(state[n]) not in present]
    computed = recomputed(module, missing, checkpoints.build_module) if missing else set()
    computed |= counters_of([*checkpoints.layout, *missing]) if missing else set()
    missing = [name for name in missing if name not in computed]
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
                f"{tuple(state[name].shape)} in the module, but {info.shape} in the checkpoints."
            )
        if state[name].is_floating_point() != info.dtype.is_floating_point:
            raise CheckpointError(
                f"The module does not fit the checkpoints: {name!r} has dtype {state[name].dtype} "
                f"in the module, but {info.dtype} in the checkpoints."
            )
    _refuse_copies(module, state, checkpoints)
    wide = any(info.dtype == torch.float64 for info in checkpoints.layout.values())
    wide = wide or any(value.dtype == torch.float64 for value in state.values())
    module = module.to(device, torch.float64 if wide else torch.float32)
    module.eval()  # its return value may be None in a subclass
    return module


def _refuse_copies(
    module: nn.Module, state: Mapping[str, torch.Tensor], checkpoints: CheckpointCollection
) -> None:
    """Refuse entries of a state dict that are not the module's tensors: no soup could be loaded."""
    tensors = {id(value) for value in (*module.parameters(), *module.buffers())}
    copies = [n for n in checkpoints.layout if id(state[n]) not in tensors]
    if copies:
        raise ValueError(
            f"{copies[0]!r} in the state_dict() of {type(module).__name__} is neither a parameter "
            f"nor a buffer, but a tensor that get_extra_state or a hook makes, so mixed weights "
            f"can't be loaded into it. Register it as a buffer."
        )


def _remedy(wanted: list[str], found: list[str]) -> str:
    """What to do where the module's names are not those of the checkpoints."""
    for name in found:
        prefix = name.removesuffix(wanted[0]) if wanted and name.endswith(wanted[0]) else ""
        if prefix and {prefix + name for name in wanted} <= set(found):
            return (
                f"The checkpoints have all names of the module after the prefix {prefix!r}. Open "
                f"them with CheckpointCollection(..., prefix={prefix!r}), which ignores the other "
                f"tensors."
            )
    return "Pass the architecture from which they were saved: module=build_model."


def module_dtype(module: nn.Module) -> torch.dtype:
    """The floating dtype a module computes in."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
