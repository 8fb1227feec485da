"""Files written by torch.save: pickles, read without running code in them."""

from __future__ import annotations

import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self, TypeGuard

import torch

from ..exceptions import CheckpointError
from .in_memory import check_state_dict
from .pickles import INERT, check_pickles, is_of_tensors, is_zip
from .protocol import Read, TensorInfo
from .read import (
    RECIPE_SUFFIX,
    SAFETENSORS_DTYPES,
    TORCH_SUFFIXES,
    CheckpointFile,
    file_identity,
    naming,
)

# entries of training checkpoints whose tensors are not weights
NO_MODEL = re.compile(
    r"(?i)optim|sched|scaler|scaling|rng|random|callback|loops|hooks|extra_state|metric|histor"
    r"|hparam|hyper_param|config|args|(^|_)sampler|loader|datamodule|iterator"
    r"|(^|_)(criterion|loss(es|_fn|_func)?)$"
)
REPEATED = 100  # maximum ratio of the size of tensors to the size of the file
# modules that no harmless pickle refers to
_NEVER = ("builtins", "os", "posix", "nt", "sys", "subprocess", "commands", "shutil", "socket",
          "importlib", "runpy", "pty", "ctypes", "code", "pdb", "webbrowser", "pickle", "operator",
          "functools", "multiprocessing", "asyncio", "signal", "platform", "pip",
          "torch")  # fmt: skip
# except for these names in them
_DATA = re.compile(
    r"builtins\.(object|bool|int|float|str|bytes|tuple|list|dict|frozenset|slice|x?range)"
    r"|functools\.partial|operator\.(item|attr)getter"
)
# packages and functions whose calls only build data
_BUILDERS = re.compile(
    r"(numpy|pandas|datetime|collections|zoneinfo)\..+|copyreg\._reconstructor|re\._compile"
)


class TorchFile(CheckpointFile):
    """A file written by ``torch.save``: a state dict, or a training checkpoint with one."""

    suffixes = TORCH_SUFFIXES
    shares_memory = True

    def _read_header(self) -> dict[str, TensorInfo]:
        self.names = check_pickles(self.file)
        # on 'meta' the storages stay on disk; a legacy pickle is read once and freed
        raw = _load(self.file, "meta", self.names)
        # neither a training checkpoint, nor one in which other readers may call something
        self.is_plain = is_state_dict(raw) and all(map(is_of_tensors, self.names))
        self.is_soup = self.file.with_suffix(RECIPE_SUFFIX).is_file()
        state = _state_dict(raw, self.key, self.file)
        header = {name: TensorInfo.of(value) for name, value in state.items()}
        for name, info in header.items():
            if info.dtype not in SAFETENSORS_DTYPES.values() and not info.dtype.is_complex:
                raise CheckpointError(
                    f"{str(self.file)!r} can't be used: {name!r} has dtype {info.dtype}, expected "
                    f"one of {', '.join(map(str, SAFETENSORS_DTYPES.values()))}."
                )
        # tied and expanded tensors can be larger than their file, but not much
        nbytes, size = sum(info.nbytes for info in header.values()), self.file.stat().st_size
        if nbytes > REPEATED * max(size, 2**20):
            raise CheckpointError(
                f"{str(self.file)!r} can't be used: its tensors have {nbytes:,} bytes, expected at "
                f"most {REPEATED} times the size of the file ({size:,}). Save clones of tensors "
                f"that were expanded: tensor.clone()."
            )
        return header

    @contextmanager
    def _open(self) -> Iterator[Read]:
        yield _state_dict(_load(self.file, "cpu", self.names), self.key, self.file).__getitem__


_ONE_AT_A_TIME = threading.Lock()  # torch has one list of safe globals for the process


def _state_dict(raw: Any, key: str | None, path: Path) -> dict[str, torch.Tensor]:
    """The state dict among the contents of a file."""
    where = repr(str(path))
    return check_state_dict(_unwrap(raw, key, where), where)


def read_container(path: Path) -> Mapping[str, Any]:
    """All entries of a training checkpoint, tensors mapped from the file; legacy pickles are empty.

    Entries may have any type; unknown classes are replaced by placeholders.
    """
    file_identity(path)
    with naming(path):
        if not is_zip(path):
            return {}
        found = _load(path, "cpu", check_pickles(path))
    return found if isinstance(found, Mapping) else {}


def _load(path: Path, device: str, names: Mapping[str, type | None]) -> Any:
    """Load with ``weights_only``; harmless unknown names become inert placeholders."""
    packed = is_zip(path)  # torch's format since 1.6; classes can only be listed for it
    with _ONE_AT_A_TIME, _nothing_allowed():
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if packed else []
        inert: list[Any] = [
            (_stand_in(name, names.get(name)), name) for name in foreign if _is_harmless(name)
        ]
        with torch.serialization.safe_globals(inert), _without_a_warning_of_the_protocol():
            return torch.load(path, map_location=device, mmap=packed or None, weights_only=True)


@contextmanager
def _nothing_allowed() -> Iterator[None]:
    """Temporarily disallow the classes that libraries allowed torch to build, since they act."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:  # those that other threads allowed meanwhile stay
        torch.serialization.add_safe_globals(allowed)


@contextmanager
def _without_a_warning_of_the_protocol() -> Iterator[None]:
    """Ignore torch's warning about pickle protocols that it can read."""
    # the main thread opens every file first; catch_warnings in two threads at once would corrupt
    # the warning filters of the process
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
        yield


def _is_harmless(name: str) -> bool:
    """Whether a stand-in may take the place of a name in a pickle."""
    in_torch = INERT.fullmatch(name) is not None
    return in_torch or _DATA.fullmatch(name) is not None or name.partition(".")[0] not in _NEVER


class Inert:
    """In place of an object of a class that is not loaded; keeps what it was built from."""

    def __new__(cls, *args: Any) -> Self:
        made = super().__new__(cls)
        made.held = [*args]
        return made

    held: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.held.append(state)


def _stand_in(name: str, filled_as: type | None) -> Any:
    """What takes the place of a name in a pickle: it runs nothing of that name.

    An empty dict or list takes the place of objects that are filled like one.
    """
    own = name.rpartition(".")[2]
    if own[:1].isupper() or _DATA.fullmatch(name) or _BUILDERS.fullmatch(name):
        made = OrderedDict if filled_as is dict else list
        return type(own, (Inert,), {} if filled_as is None else {"__new__": lambda *_: made()})

    def refuse(*given: Any, **named: Any) -> None:
        """Functions may be values, such as an activation, but not be called."""
        raise UnpicklingError(f"Unsupported global: GLOBAL {name} was not an allowed global")

    return type(own, (Inert,), {"__new__": refuse})


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


def _holds_weights(entry: Any) -> bool:
    """Whether an entry contains non-scalar tensors at any depth, except in optimizer states."""
    todo, seen = [entry], set()
    while todo:
        part = todo.pop()
        if isinstance(part, torch.Tensor) and part.ndim:
            return True
        if isinstance(part, Inert):
            part = part.held
        if id(part) in seen or not isinstance(part, (Mapping, list, tuple)):
            continue
        seen.add(id(part))  # a pickle may contain itself
        if not isinstance(part, Mapping):
            todo.extend(part)
        elif "param_groups" not in part:
            todo.extend(
                value
                for name, value in part.items()
                if isinstance(value, torch.Tensor) or not _is_beside(name)
            )
    return False


def _refuse_module(state: Any, where: str) -> None:
    """Raise an error for a whole module."""
    if isinstance(state, Inert):
        raise CheckpointError(
            f"{where} can't be read: it holds more than tensors ({type(state).__name__}), and "
            f"reading it could run code. sksoup never unpickles code. Save only the state dict: "
            f"torch.save(module.state_dict(), path)."
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
    if len(candidates) > 1:
        raise CheckpointError(
            f"{where} holds several state dicts: {listed}. Choose one, for example with "
            f"key={candidates[0]!r}."
        )
    others = {
        id(value): name
        for name, value in state.items()
        if candidates
        and isinstance(value, (Mapping, Inert))
        and id(value) not in states
        and not _is_beside(name)
    }
    mixed = [
        repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
        for name in others.values()
        if _holds_weights(state[name])
    ]
    if mixed:
        raise CheckpointError(
            f"{where} holds the state dict {listed}, and tensors together with other values in "
            f"{', '.join(mixed[:5])}, so it is not clear which is the model. To use the former, "
            f"pass key={candidates[0]!r}; otherwise save only the model's state dict: "
            f"torch.save(module.state_dict(), path)."
        )
    return state[candidates[0]] if candidates else state
