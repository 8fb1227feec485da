"""Small zoos that every test can afford."""

from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "Agg")  # figures without a screen
os.environ.setdefault("SCIPY_ARRAY_API", "1")  # scikit-learn checks inputs of the array API, too

import pytest
import torch
from hypothesis import settings

from .zoo import Zoo, make_zoo

# machines differ in speed: time is never asserted
settings.register_profile("sksoup", deadline=None)
settings.load_profile("sksoup")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    """Seven float32 nets with BatchNorm and dropout, in memory, and data they are good at."""
    return make_zoo(7, seed=0)


@pytest.fixture(scope="session")
def zoo64() -> Zoo:
    """Five float64 nets without buffers: for comparisons to 1e-8."""
    return make_zoo(5, seed=1, dtype=torch.float64, batch_norm=False)
