"""Values that are not finite are found while they are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints import health

from ..zoo import make_states


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 2])
def test_values_that_are_not_finite_name_file_and_tensor(tmp_path, value, which):
    states = make_states(3, seed=0)
    states[which]["head.weight"][1, 1] = value
    for k, state in enumerate(states):
        save_file(state, tmp_path / f"ft{k}.safetensors")
    collection = CheckpointCollection.from_path(tmp_path)
    with pytest.raises(CheckpointError, match=rf"ft{which}\.safetensors.*'head\.weight'"):
        collection.check()


def test_a_constant_infinity_is_allowed_but_only_where_it_is_constant():
    mask = torch.tensor([0.0, -torch.inf])
    CheckpointCollection([{"w": torch.ones(1), "mask": mask}] * 3).check()
    other = torch.tensor([-torch.inf, 0.0])
    with pytest.raises(CheckpointError, match="'mask'"):
        CheckpointCollection([{"mask": mask}, {"mask": other}]).check()
    with pytest.raises(CheckpointError, match=r"checkpoint 0 .*'mask'"):
        CheckpointCollection([{"mask": mask}, {"mask": torch.zeros(2)}]).check()


@pytest.mark.parametrize(("most", "n"), [(1 << 24, 256), (6 * 100, 100), (1, 16)])
def test_fewer_numbers_of_each_of_many_tensors_are_kept(monkeypatch, most, n):
    monkeypatch.setattr(health, "MOST_SAMPLED", most)
    states = [{"a": torch.randn(1000), "b": torch.randn(10, 200)} for _ in range(3)]
    collection = CheckpointCollection(states)
    collection.check()
    kept = [values for of in collection.health._samples.values() for values in of.values()]
    assert [len(values) for values in kept] == [n] * 6
    norms = [float(w.norm()) for state in states for w in state.values()]
    assert [np.linalg.norm(values) for values in kept] == pytest.approx(norms, rel=0.7)
