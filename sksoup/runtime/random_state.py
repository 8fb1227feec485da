"""Randomness that leaves the global state as it was."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

_LOCK = threading.Lock()
_first = ExitStack()  # restores the state from before all the contexts that are open, in any thread
_n_open = 0


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave torch's, numpy's and Python's global random state as it was.

    Where contexts of several threads overlap, that is the state before the first of them.
    """
    global _n_open
    with _LOCK:
        mine = ExitStack() if _n_open else _first
        mine.enter_context(_restored())
        _n_open += 1
    try:
        yield
    finally:
        with _LOCK:
            _n_open -= 1
            if mine is not _first:
                mine.close()
            if not _n_open:
                _first.close()


@contextmanager
def _restored() -> Iterator[None]:
    """Restore the state at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
