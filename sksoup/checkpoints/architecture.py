"""The module into which checkpoints are loaded: passed by the user or found in a checkpoint."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from ..exceptions import CheckpointError
from ..runtime.copies import copied
from ..runtime.random_state import preserved_random_state
from ..runtime.shards import sharded_parts
from .hub import HubModule, hub_folder

ModuleSource: TypeAlias = nn.Module | Callable[[], nn.Module]


def _build_skorch_module(net: Any) -> nn.Module:
    given = getattr(net, "module", None)
    memo = {id(given): copied(given)} if isinstance(given, nn.Module) else {}
    module: nn.Module = copy.deepcopy(net, memo).initialize().module_
    return module


def _refuse_arguments(factory: Callable[..., Any]) -> None:
    """Raise an error for a class or function that can't be called without arguments."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (ValueError, TypeError):  # some built-in functions have no signature
        return
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variable]
    if needed:
        inner = factory.func if isinstance(factory, partial) else factory
        name = getattr(inner, "__name__", repr(inner))
        raise TypeError(
            f"module={name} needs arguments ({', '.join(needed)}), expected a factory without "
            f"required arguments. Pass module=lambda: {name}(...), such as module=lambda: "
            f"nn.Linear(10, 2), or functools.partial({name}, ...), which can be sent to workers."
        )


def find_architecture(
    given: Sequence[Any], module: Any, key: str | None = None
) -> ModuleSource | None:
    """The module or factory that was passed, or that of the first checkpoint that has one."""
    if isinstance(module, (str, os.PathLike)):
        return _of_folder(module, key)
    for item in [module] if module is not None else given:
        trained = getattr(item, "module_", None)
        if isinstance(item, nn.Module) or isinstance(trained, nn.Module):
            network = cast(nn.Module, item if isinstance(item, nn.Module) else trained)
            if sharded_parts(network):
                return network
            try:
                return copied(network)
            except ValueError:
                if module is not None:
                    raise
                return partial(copied, network)  # an error where it is needed; others may be mixed
        if module is None:
            if isinstance(item, (str, os.PathLike)):
                path = Path(os.path.expanduser(item)).absolute()
                if folder := hub_folder(path):
                    return HubModule(folder, path, key)
        elif hasattr(item, "initialize") and hasattr(item, "get_params"):
            return partial(_build_skorch_module, item)
        elif callable(item):
            _refuse_arguments(item)
            factory: ModuleSource = item
            return factory
        else:
            raise TypeError(
                f"module must be a factory without arguments, an nn.Module, a skorch net or the "
                f"path of a Hugging Face folder, got {type(item).__name__}."
            )
    return None


def _of_folder(module: str | os.PathLike[str], key: str | None) -> HubModule:
    """The architecture in a Hugging Face folder passed by the user."""
    path = Path(os.path.expanduser(module)).absolute()
    folder = hub_folder(path)
    if folder is None:
        raise CheckpointError(
            f"module={os.fspath(module)!r} is not a Hugging Face folder: it has no config.json."
        )
    return HubModule(folder, path, key)


def skeleton(module: ModuleSource | None) -> nn.Module | None:
    """The module that was passed, or built on 'meta', without memory and initialization."""
    if module is None or isinstance(module, nn.Module):
        return module
    try:
        with preserved_random_state(), torch.device("meta"):
            built = module()
    except Exception:  # it will be built normally later, or not at all for averaging
        return None
    return built if isinstance(built, nn.Module) else None


def module_names(module: ModuleSource | None) -> set[str] | None:
    """Names in the module's state dict."""
    built = skeleton(module)
    return None if built is None else set(built.state_dict())
