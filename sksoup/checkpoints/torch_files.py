"""Files that torch.save wrote: pickles, read without running what is in them."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..exceptions import CheckpointError
from .in_memory import check_state_dict
from .pickles import check_pickles, is_zip
from .protocol import Read, TensorInfo
from .read import SAFETENSORS_DTYPES, TORCH_SUFFIXES, CheckpointFile, file_identity, naming

# what training loops keep beside a model, whose tensors are no weights
NO_MODEL = re.compile(
    r"(?i)optim|sched|scaler|scaling|rng|random|callback|loops|hooks|extra_state|metric|histor"
    r"|hparam|hyper_param|config|args|(^|_)sampler|loader|datamodule|iterator"
)
REPEATED = 100  # how often the numbers in a file may occur in its tensors
# modules whose names a pickle has no harmless use for, also by their names in Python 2
_NEVER = ("builtins", "__builtin__", "os", "posix", "nt", "sys", "subprocess", "commands", "shutil",
          "socket", "importlib", "runpy", "pty", "ctypes", "code", "pdb", "webbrowser", "pickle",
          "cPickle", "operator", "functools", "multiprocessing", "asyncio", "signal", "platform",
          "pip", "torch")  # fmt: skip


class TorchFile(CheckpointFile):
    """A file of ``torch.save``: a state dict, or a training container that holds one."""

    suffixes = TORCH_SUFFIXES

    def _read_header(self) -> dict[str, TensorInfo]:
        check_pickles(self.file)
        # on 'meta' the storages stay on disk; a legacy pickle is read once and dropped
        raw = _load(self.file, "meta")
        self.is_plain = _is_state_dict(raw)  # what is no container
        state = _state_dict(raw, self.key, self.file)
        header = {name: TensorInfo.of(value) for name, value in state.items()}
        for name, info in header.items():
            if info.dtype not in SAFETENSORS_DTYPES.values() and not info.dtype.is_complex:
                raise CheckpointError(
                    f"{str(self.file)!r} can't be used: {name!r} has dtype {info.dtype}, expected "
                    f"one of {', '.join(map(str, SAFETENSORS_DTYPES.values()))}."
                )
        # tied and expanded tensors are larger than their file, but not by far
        nbytes, size = sum(info.nbytes for info in header.values()), self.file.stat().st_size
        if nbytes > REPEATED * max(size, 2**20):
            raise CheckpointError(
                f"{str(self.file)!r} can't be used: its tensors have {nbytes:,} bytes, expected at "
                f"most {REPEATED} times the {size:,} of the file. Save clones of tensors that were "
                f"expanded: tensor.clone()."
            )
        return header

    @contextmanager
    def _open(self) -> Iterator[Read]:
        yield _state_dict(_load(self.file, "cpu"), self.key, self.file).__getitem__


_ONE_AT_A_TIME = threading.Lock()  # torch has one list of safe globals for all threads


def _state_dict(raw: Any, key: str | None, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in what a file holds."""
    where = repr(str(path))
    return check_state_dict(_unwrap(raw, key, where), where)


def read_container(path: Path) -> Mapping[str, Any]:
    """All that a training container holds, tensors as maps of the file; legacy pickles are empty.

    What is in it is as the file has it: of any type, with placeholders for foreign classes.
    """
    file_identity(path)
    with naming(path):
        if not is_zip(path):
            return {}
        check_pickles(path)
        found = _load(path, "cpu")
    return found if isinstance(found, Mapping) else {}


def _load(path: Path, device: str) -> Any:
    """Load with ``weights_only``; harmless foreign classes become inert placeholders."""
    packed = is_zip(path)  # torch's format since 1.6; only its classes can be listed
    with _ONE_AT_A_TIME, _nothing_allowed():
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if packed else []
        inert: list[Any] = [(_placeholder(name), name) for name in foreign if _is_harmless(name)]
        with torch.serialization.safe_globals(inert), _without_a_warning_of_the_protocol():
            return torch.load(path, map_location=device, mmap=packed or None, weights_only=True)


@contextmanager
def _nothing_allowed() -> Iterator[None]:
    """Take back meanwhile what libraries have allowed torch to build from files: it would act."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


@contextmanager
def _without_a_warning_of_the_protocol() -> Iterator[None]:
    """Ignore torch's warning of pickle protocols that it reads all the same."""
    # the main thread opens every file first; catch_warnings in two threads at once would leave the
    # filters of the process in disorder
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
        yield


def _is_harmless(name: str) -> bool:
    """Whether a pickled name may become a placeholder: a class by its name, or part of numpy."""
    module, _, attribute = name.rpartition(".")
    package = module.partition(".")[0]
    return package not in _NEVER and (package == "numpy" or attribute[:1].isupper())


def _placeholder(name: str) -> type:
    """Make a class that can be unpickled in the place of another and does nothing."""

    def ignore(self: Any, *args: Any, **kwargs: Any) -> None:
        pass

    return type(name.rpartition(".")[2], (), {"__init__": ignore, "__setstate__": ignore})


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(n, str) and isinstance(v, torch.Tensor) for n, v in value.items())
    )


def _holds_weights(entry: Any) -> bool:
    """Whether an entry holds tensors with dimensions, at any depth, apart from optimizers'."""
    todo, seen = [entry], set()
    while todo:
        part = todo.pop()
        if isinstance(part, torch.Tensor) and part.ndim:
            return True
        if id(part) in seen or not isinstance(part, (Mapping, list, tuple)):
            continue
        seen.add(id(part))  # a pickle may hold itself
        if not isinstance(part, Mapping):
            todo.extend(part)
        elif "param_groups" not in part:
            todo.extend(
                value
                for name, value in part.items()
                if isinstance(value, torch.Tensor) or not NO_MODEL.search(str(name))
            )
    return False


def _unwrap(state: Any, key: str | None, where: str) -> Any:
    """Take the state dict out of a training container: the only one, or the one under the key."""
    if not isinstance(state, Mapping) or (key is None and _is_state_dict(state)):
        return state
    candidates = [
        name
        for name, value in state.items()
        if isinstance(name, str)
        and _is_state_dict(value)
        and not name.endswith("_extra_state")  # part of a flat one
    ]
    for name in candidates:
        twice = [n for n in state[name] if isinstance(state.get(n), torch.Tensor)]
        if twice:
            raise CheckpointError(
                f"{where} holds {twice[0]!r} twice, beside {name!r} and in it: other readers may "
                f"take the other one. Save the state dict alone: torch.save(state_dict, path)."
            )
    listed = ", ".join(f"{name!r} ({len(state[name])} tensors)" for name in candidates)
    if key is not None:
        if key in candidates:
            return state[key]
        offer = f"it offers {listed}" if listed else "it holds no state dict by any key"
        if _is_state_dict(state):
            offer = "it is a plain state dict, which needs no key"
        raise CheckpointError(f"{where} has no state dict under key={key!r}: {offer}.")
    if len(candidates) > 1:
        raise CheckpointError(
            f"{where} holds several state dicts: {listed}. Say which: key={candidates[0]!r}."
        )
    mixed = [
        repr(name)
        for name, value in state.items()
        if candidates
        and isinstance(value, Mapping)
        and name not in candidates
        and not str(name).endswith("_extra_state")
        and _holds_weights({name: value})
    ]
    if mixed:
        raise CheckpointError(
            f"{where} holds the state dict {listed}, and tensors beside other values in "
            f"{', '.join(mixed[:5])}: it is not clear which is the model. To take the former, give "
            f"key={candidates[0]!r}; else save the model's by itself: "
            f"torch.save(module.state_dict(), path)."
        )
    return state[candidates[0]] if candidates else state
