"""Files written by torch.save: pickles, read without running code in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import torch

from ..exceptions import CheckpointError
from .in_memory import check_state_dict
from .pickles import SAVE_WEIGHTS, Inert
from .protocol import Read, TensorInfo
from .read import (
    RECIPE_SUFFIX,
    SAFETENSORS_DTYPES,
    TORCH_SUFFIXES,
    CheckpointFile,
    file_identity,
    naming,
)
from .torch_archives import is_zip, map_tensors, read_torch_file

# entries of training checkpoints whose tensors are not weights
NO_MODEL = re.compile(
    r"(?i)optim|sched|scaler|scaling|rng|random|callback|loops|hooks|extra_state|metric|histor"
    r"|hparam|hyper_param|config|args|(^|_)sampler|loader|datamodule|iterator"
    r"|(^|_)(criterion|loss(es|_fn|_func)?)$"
)
REPEATED = 100  # maximum ratio of the size of tensors to the size of the file
SMALL = 1 << 14  # bytes; smaller files may have as much as one of this size


class TorchFile(CheckpointFile):
    """A file written by ``torch.save``: a state dict, or a training checkpoint with one."""

    suffixes = TORCH_SUFFIXES
    shares_memory = True

    def _read_header(self) -> dict[str, TensorInfo]:
        found = read_torch_file(self.file, "meta")
        # neither a training checkpoint, nor one in which other readers may call something
        self.is_plain = found.is_plain and is_state_dict(found.value)
        self.is_soup = self.file.with_suffix(RECIPE_SUFFIX).is_file()
        state = _state_dict(found.value, self.key, self.file)
        header = {name: TensorInfo.of(value) for name, value in state.items()}
        self._places = {name: found.places[id(value)] for name, value in state.items()}
        for name, info in header.items():
            if info.dtype not in SAFETENSORS_DTYPES.values() and not info.dtype.is_complex:
                raise CheckpointError(
                    f"{str(self.file)!r} can't be used: {name!r} has dtype {info.dtype}, expected "
                    f"one of {', '.join(map(str, SAFETENSORS_DTYPES.values()))}."
                )
        # tied and expanded tensors can be larger than their file, but not much
        nbytes, size = sum(info.nbytes for info in header.values()), self.file.stat().st_size
        if nbytes > REPEATED * max(size, SMALL):
            raise CheckpointError(
                f"{str(self.file)!r} can't be used: its tensors have {nbytes:,} bytes, expected at "
                f"most {REPEATED} times the size of the file ({size:,}). Save clones of tensors "
                f"that were expanded: tensor.clone()."
            )
        return header

    @contextmanager
    def _open(self) -> Iterator[Read]:
        yield map_tensors(self.file, self._places)


def _state_dict(raw: Any, key: str | None, path: Path) -> dict[str, torch.Tensor]:
    """The state dict among the contents of a file."""
    where = repr(str(path))
    return check_state_dict(_unwrap(raw, key, where), where)


def read_container(path: Path) -> Mapping[str, Any]:
    """All entries of a training checkpoint, tensors mapped from the file; legacy pickles are empty.

    Entries may have any type; objects of unknown classes become `Inert`.
    """
    file_identity(path)
    with naming(path):
        if not is_zip(path):
            return {}
        found = read_torch_file(path, "cpu").value
    return found if isinstance(found, Mapping) else {}


def is_state_dict(value: Any) -> TypeGuard[Mapping[str, torch.Tensor]]:
    """Whether an object is a mapping of names to tensors, and not empty."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(n, str) and isinstance(v, torch.Tensor) for n, v in value.items())
    )


def _is_beside(name: object) -> bool:
    """Whether an entry is not the model; names that are no text can be very long as text."""
    return isinstance(name, str) and NO_MODEL.search(name) is not None


def _holds_weights(entry: Any, seen: set[int], is_beside: Callable[[Any], bool]) -> bool:
    """Whether an entry contains non-scalar tensors at any depth, except in optimizer states.

    Parts that were seen in other entries are not looked at again.
    """
    todo = [entry]
    while todo:
        part = todo.pop()
        if isinstance(part, torch.Tensor) and part.ndim:
            return True
        if id(part) in seen or not isinstance(part, (Mapping, list, tuple)):
            continue
        seen.add(id(part))  # a pickle may contain itself
        if isinstance(part, Inert):
            todo += [part.given, part.more]
        if not isinstance(part, Mapping):
            todo.extend(part)
        elif "param_groups" not in part:
            todo.extend(
                value
                for name, value in part.items()
                if isinstance(value, torch.Tensor) or not is_beside(name)
            )
    return False


def _is_network(state: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict is that of a network, not, say, the weights of classes in a loss."""
    return not weights.keys().isdisjoint(state) or any(w.ndim > 1 for w in state.values())


def _refuse_module(state: Any, where: str) -> None:
    """Raise an error for a whole module."""
    if isinstance(state, Inert) and not state and state.name[:1].isupper():
        raise CheckpointError(
            f"{where} can't be read: it holds more than tensors ({state.name}), and reading "
            f"it could run code. sksoup never unpickles code. {SAVE_WEIGHTS}"
        )


def _unwrap(state: Any, key: str | None, where: str) -> Any:
    """The state dict of a training checkpoint: the only one, or the one under the key."""
    _refuse_module(state, where)
    if not isinstance(state, Mapping) or (key is None and is_state_dict(state)):
        return state
    # a pickle may hold one value under many names
    distinct = {id(value): value for value in state.values()}
    states = {number for number, value in distinct.items() if is_state_dict(value)}
    candidates = [
        name
        for name, value in state.items()
        if isinstance(name, str)
        and id(value) in states
        and not name.endswith("_extra_state")  # belongs to a flat state dict
    ]
    for name in {id(state[name]): name for name in candidates}.values():
        twice = [n for n in state[name] if isinstance(state.get(n), torch.Tensor)]
        if twice:
            raise CheckpointError(
                f"{where} holds {twice[0]!r} twice, next to {name!r} and inside it, and other "
                f"programs may read the other one. Save only the state dict: "
                f"torch.save(state_dict, path)."
            )
    listed = ", ".join(f"{name!r} ({len(state[name])} tensors)" for name in candidates[:5])
    listed += f" and {len(candidates) - 5} more" if len(candidates) > 5 else ""
    if key is not None:
        if key in candidates:
            return state[key]
        offer = f"it holds {listed}" if listed else "it holds no state dict under any key"
        if is_state_dict(state):
            offer = "it is a plain state dict, for which no key is needed"
        raise CheckpointError(f"{where} has no state dict under key={key!r}: {offer}.")
    models = [name for name in candidates if not _is_beside(name)]
    if len(models) == 1:
        weights = state[models[0]]
        apart = {number for number in states if not _is_network(distinct[number], weights)}
        candidates = [name for name in candidates if id(state[name]) not in apart]
    if len(candidates) > 1:
        raise CheckpointError(
            f"{where} holds several state dicts: {listed}. Choose one, for example with "
            f"key={candidates[0]!r}."
        )
    is_beside = cache(_is_beside)  # many dicts may share one long name
    others = {
        id(value): name
        for name, value in state.items()
        if candidates
        and isinstance(value, Mapping)
        and id(value) not in states
        and not is_beside(name)
    }
    seen: set[int] = set()
    mixed = [
        repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
        for name in others.values()
        if _holds_weights(state[name], seen, is_beside)
    ]
    if mixed:
        raise CheckpointError(
            f"{where} holds the state dict {listed}, and tensors together with other values in "
            f"{', '.join(mixed[:5])}, so it is not clear which is the model. To use the former, "
            f"pass key={candidates[0]!r}; otherwise save only the model's state dict: "
            f"torch.save(module.state_dict(), path)."
        )
    return state[candidates[0]] if candidates else state
