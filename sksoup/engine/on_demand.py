"""Contexts that are entered only when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class OnDemand(Generic[T]):
    """A context that is entered when what it gives is first asked for."""

    def __init__(self, make: Callable[[], AbstractContextManager[T]]) -> None:
        self._make = make
        self._stack = ExitStack()
        self._given: list[T] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: Any) -> bool | None:
        return self._stack.__exit__(*exc_info)

    def __call__(self) -> T:
        if not self._given:
            self._given.append(self._stack.enter_context(self._make()))
        return self._given[0]
