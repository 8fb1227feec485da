from __future__ import annotations

import pytest

from sksoup import CheckpointCollection

from ..zoo import Net, make_states


@pytest.fixture
def files(tmp_path):
    return CheckpointCollection(make_states(4, seed=0), module=Net).save(tmp_path / "zoo")
