"""Eleven files, for whoever needs some."""

from __future__ import annotations

import pytest
from safetensors.torch import save_file

from ..zoo import make_states


@pytest.fixture
def folder(tmp_path):
    """Eleven files whose natural order is not their alphabetical order."""
    for k, state in enumerate(make_states(11, seed=0)):
        save_file(state, tmp_path / f"ft{k}.safetensors")
    return tmp_path
