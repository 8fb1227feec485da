"""The user's own network, by the name of its module and of what makes it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..exceptions import CheckpointError


def load_factory(given: str) -> Callable[[], nn.Module]:
    """Import PACKAGE.MODULE:FACTORY, from the current folder or what is installed."""
    name, colon, attribute = given.partition(":")
    if not (name and colon and attribute):
        raise ValueError(
            f"--module {given!r} names no factory: expected package.module:factory, such as "
            f"model:build for the function build in model.py."
        )
    factory = _import(given, name)
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"--module {given!r}: {name!r} has no {attribute!r}.")
        factory = getattr(factory, part)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ValueError(
            f"--module {given!r} is of type {type(factory).__name__}, expected a class or a "
            f"function that returns a network."
        )
    _check_arguments(given, factory)
    return _Factory(given, factory)


def _import(given: str, name: str) -> object:
    here = str(Path.cwd())
    if here not in sys.path:  # python -m sksoup has it, the command sksoup has not
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:  # of any class: this is the user's code
        raise CheckpointError(
            f"--module {given!r} can't be imported (from the folder {here!r}): "
            f"{type(error).__name__}: {error}."
        ) from error


def _check_arguments(given: str, factory: Callable[..., object]) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (ValueError, TypeError):  # some built-in ones have no signature
        return
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variable]
    if needed:
        raise ValueError(
            f"--module {given!r} needs the arguments {', '.join(needed)}, expected a class or a "
            f"function without: write a function that calls it with them."
        )


class _Factory:
    """Call the user's factory; its errors are those of the option."""

    def __init__(self, given: str, factory: Callable[[], object]) -> None:
        self.given, self.factory = given, factory

    def __call__(self) -> nn.Module:
        try:
            found = self.factory()
        except Exception as error:
            raise CheckpointError(
                f"--module {self.given!r} failed when it was called: {type(error).__name__}: "
                f"{error}."
            ) from error
        if not isinstance(found, nn.Module):
            raise CheckpointError(
                f"--module {self.given!r} returned an object of type {type(found).__name__}, "
                f"expected a network, a torch.nn.Module."
            )
        return found
