"""Progress of a fit: scikit-learn's callbacks, and a line in the log."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from sklearn.callback import CallbackSupportMixin, with_callbacks
from torch import nn

from ..engine.objective import load_weights
from ..engine.problem import Problem, Step, Weights
from ..runtime.copies import copied
from ..runtime.distributed import rank

LOGGER = logging.getLogger("sksoup")
Search = TypeVar("Search", bound=Callable[..., Any])


def one_attempt(search: Search) -> Search:
    """Close the callbacks when a search ends, as it may start again with less memory.

    scikit-learn closes those of the last start only, and the thread of an open progress bar would
    keep the process alive.
    """
    closing: Search = with_callbacks(search)
    return closing


class ProgressMixin(CallbackSupportMixin):  # type: ignore[misc]
    """Report the steps of a fit."""

    def _log_steps(self, problem: Problem, **factors: int) -> None:
        """Log the number of steps of a search at its start, as a product of named factors."""
        named = " x ".join(f"{n} {what.replace('_', ' ')}" for what, n in factors.items())
        total = f" = {math.prod(factors.values())} steps" if len(factors) > 1 else ""
        if not rank():
            n = len(problem.checkpoints)
            LOGGER.info("%s: %d checkpoints, %s%s", type(self).__name__, n, named, total)

    @contextmanager
    def _progress(
        self, data: Mapping[str, Any], module: nn.Module, name: str, n_steps: int
    ) -> Iterator[Step]:
        """Report each step to scikit-learn's callbacks; their protocol is used only here."""
        root = self._init_callback_context(max_subtasks=n_steps)
        root.call_on_fit_task_begin(estimator=self)
        running: list[Any] = []
        remaining = n_steps

        def step(weights: Weights | None = None) -> None:
            """End the running task, if any, and begin the next, if there is one."""
            nonlocal remaining

            def as_if_fitted() -> dict[str, Any]:
                found = None if weights is None else weights()
                soup = copied(module)
                load_weights(soup, found or {})
                return {"module_": soup, "coef_": None}

            if running:
                running.pop().call_on_fit_task_end(
                    estimator=self, reconstruction_attributes=as_if_fitted, **data
                )
            if remaining:
                remaining -= 1
                task = root.subcontext(task_name=name)
                running.append(task.call_on_fit_task_begin(estimator=self))

        step()
        yield step
        root.call_on_fit_task_end(estimator=self)
