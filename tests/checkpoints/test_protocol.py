"""A checkpoint is any object with named tensors, such as one that is computed."""

from __future__ import annotations

import pickle
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch

from sksoup import CheckpointCollection, CheckpointError, GreedySoup, MEHLSoup, mix
from sksoup.checkpoints import sources
from sksoup.checkpoints.in_memory import content_sha256
from sksoup.checkpoints.protocol import Checkpoint, Entry, TensorInfo
from sksoup.checkpoints.read import CheckpointFile

from ..zoo import Net, Zoo, make_states, same_tensors


class Moved(Checkpoint):
    """A base state and a multiple of a difference to it, computed tensor by tensor."""

    def __init__(self, base, difference, scale):
        self.base, self.difference, self.scale = base, difference, scale
        self.header = {name: TensorInfo.of(value) for name, value in base.items()}

    @contextmanager
    def open(self):
        yield self.compute

    def compute(self, name):
        base = self.base[name]
        return base + self.scale * self.difference[name] if base.is_floating_point() else base

    def identity(self):
        return (self.sha256(),)

    def sha256(self, prefix=""):
        return content_sha256(Entry(self, prefix))


@pytest.fixture
def moved():
    base, tuned = make_states(2, seed=0)
    difference = {name: (tuned[name] - base[name]).float() for name in base}
    difference["norm.running_var"].zero_()
    return [Moved(base, difference, scale) for scale in (0.0, 0.5, 1.0, 1.5)]


def plain(checkpoint):
    return {name: checkpoint.compute(name) for name in checkpoint.header}


def test_computed_checkpoints_are_mixed_and_fitted_as_files_are(moved, zoo: Zoo, tmp_path):
    computed = CheckpointCollection(moved, module=Net)
    states = CheckpointCollection([plain(one) for one in moved], module=Net)
    coef = [0.4, 0.3, 0.2, 0.1]
    assert same_tensors(mix(computed, coef), mix(states, coef))
    for recipe in (GreedySoup(), MEHLSoup(max_epochs=1, random_state=0)):
        soup = recipe.fit(computed, zoo.X, zoo.y)
        weights, found = soup.state_dict(), soup.coef_
        assert np.array_equal(recipe.fit(states, zoo.X, zoo.y).coef_, found)
        assert same_tensors(soup.recipe_.cook(computed), weights)
    again = pickle.loads(pickle.dumps(computed)).save(tmp_path / "zoo")
    assert [again.content_sha256(name) for name in again] == [computed.sha256(n) for n in computed]


def test_computed_and_other_checkpoints_are_one_collection(moved, tmp_path):
    mixed = CheckpointCollection({"moved": moved[1], "state": plain(moved[0])})
    assert "in memory" in repr(mixed)
    assert same_tensors(mixed["moved"], plain(moved[1]))
    assert mixed.path("moved") is None
    assert mixed.drop("state").names == ("moved",)


class NumpyFile(CheckpointFile):
    """Arrays of numpy, as a format that the package does not have."""

    suffixes = (".npz",)

    def _read_header(self):
        with np.load(self.file) as arrays:
            return {name: TensorInfo.of(torch.as_tensor(arrays[name])) for name in arrays}

    @contextmanager
    def _open(self):
        with np.load(self.file) as arrays:
            yield lambda name: torch.as_tensor(arrays[name])


def test_a_new_format_is_a_class_and_a_line(tmp_path, zoo: Zoo):
    states = make_states(3, seed=0)
    for k, state in enumerate(states):
        np.savez(tmp_path / f"ft{k}.npz", **{name: w.numpy() for name, w in state.items()})
    with pytest.raises(CheckpointError, match="No checkpoints found"):
        CheckpointCollection.from_path(tmp_path)
    registered = (*sources.KINDS, NumpyFile)
    with patch.multiple(sources, KINDS=registered, SUFFIXES=(*sources.SUFFIXES, ".npz")):
        files = CheckpointCollection.from_path(tmp_path, module=Net)
    assert files.names == ("ft0", "ft1", "ft2")
    assert same_tensors(mix(files, [0.5, 0.3, 0.2]), mix(states, [0.5, 0.3, 0.2]))
    soup = GreedySoup().fit(files, zoo.X, zoo.y)
    assert soup.recipe_.cook(files).keys() == states[0].keys()
    with (tmp_path / "ft1.npz").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=r"ft1\.npz' changed on disk"):
        files["ft1"]
    (tmp_path / "ft2.npz").write_bytes(b"no arrays")
    with pytest.raises(CheckpointError, match=r"ft2\.npz' can't be read"):
        NumpyFile(tmp_path / "ft2.npz")
