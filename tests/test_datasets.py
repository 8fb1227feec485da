from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import torch

from benchmarks import reference_zoo
from sksoup import CheckpointCollection, CheckpointError, GreedySoup
from sksoup import datasets as module
from sksoup.datasets import DigitsConvNet, load_digits_checkpoints, make_digits_checkpoints

from .zoo import same_tensors


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_digits_checkpoints(tmp_path_factory.mktemp("zoo"), 3, random_state=0)


def test_shapes(zoo):
    assert zoo.checkpoints.names == ("ft00", "ft01", "ft02")
    assert zoo.X_val.shape == (1000, 64)
    assert zoo.X_test.shape == (2000, 64)
    assert zoo.y_val.shape == (1000,)
    assert zoo.y_test.shape == (2000,)
    assert zoo.X_val.dtype == zoo.X_test.dtype == np.float32
    assert zoo.X_val.min() >= 0
    assert zoo.X_val.max() <= 1
    assert set(zoo.fine_tunings) == set(zoo.checkpoints)


def test_the_networks_have_learned(zoo):
    soup = GreedySoup().fit(zoo.checkpoints, zoo.X_val, zoo.y_val)
    assert min(soup.individual_scores_.values()) > 0.5
    assert soup.score(zoo.X_test, zoo.y_test) > 0.8


def test_the_second_call_reads_and_a_larger_zoo_begins_with_the_smaller(zoo, monkeypatch):
    trained = []
    original = module._train
    monkeypatch.setattr(module, "_train", lambda *a: trained.append(1) or original(*a))
    again = make_digits_checkpoints(zoo.folder, 3, random_state=0)
    assert trained == []
    assert np.array_equal(again.X_val, zoo.X_val)
    larger = make_digits_checkpoints(zoo.folder, 4, random_state=0)
    assert trained == [1]
    assert same_tensors(larger.checkpoints["ft02"], zoo.checkpoints["ft02"])
    assert make_digits_checkpoints(zoo.folder, 2, random_state=0).checkpoints.names == (
        "ft00",
        "ft01",
    )


def test_a_run_that_was_cut_off_ends_with_the_same_bits(zoo, tmp_path, monkeypatch):
    class CutOff(Exception):
        pass

    original, done = module._train, []

    def train_two(*args):
        if len(done) == 2:
            raise CutOff
        done.append(1)
        return original(*args)

    monkeypatch.setattr(module, "_train", train_two)
    with pytest.raises(CutOff):
        make_digits_checkpoints(tmp_path, 3, random_state=0)
    monkeypatch.undo()
    resumed = make_digits_checkpoints(tmp_path, 3, random_state=0)
    for name in zoo.checkpoints:
        assert same_tensors(resumed.checkpoints[name], zoo.checkpoints[name])


def test_no_digit_serves_two_purposes():
    parts = np.cumsum(list(module.ORIGINALS.values()))
    assert parts[-1] == 1797
    a, b = module._digits(0), module._digits(0)
    assert all(np.array_equal(a[name][0], b[name][0]) for name in a)
    assert not np.array_equal(module._digits(1)["val"][0], a["val"][0])
    assert sum(len(y) // module.VARIANTS.get(name, 1) for name, (_, y) in a.items()) == (
        1797 + 3 * 847  # the pretraining rows are there four times
    )


def test_global_random_state_stays_as_it_was(tmp_path):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = state()
    make_digits_checkpoints(tmp_path, 1, random_state=3)
    assert state() == before


@pytest.mark.parametrize("n", [0, -1, 2.5])
def test_bad_numbers(tmp_path, n):
    with pytest.raises(ValueError, match="n_checkpoints must be an integer >= 1"):
        make_digits_checkpoints(tmp_path, n)


def test_a_folder_of_something_else_is_left_alone(zoo, tmp_path):
    with pytest.raises(CheckpointError, match="already holds something else"):
        make_digits_checkpoints(zoo.folder, 1, random_state=1)
    (tmp_path / "mine.safetensors").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="checkpoints of unknown origin"):
        make_digits_checkpoints(tmp_path, 1)
    (tmp_path / "zoo.json").write_text("{")
    with pytest.raises(CheckpointError, match="an unreadable manifest"):
        make_digits_checkpoints(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.safetensors", "zoo.json"]


def test_the_default_folder_is_below_the_data_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    zoo = make_digits_checkpoints(n_checkpoints=1)
    assert zoo.folder == tmp_path / "sksoup" / "digits-0"


def test_the_reference_zoo_comes_with_the_package(monkeypatch):
    monkeypatch.setattr(module, "_train", None)  # nothing is trained
    zoo = load_digits_checkpoints()
    assert zoo.checkpoints.names == tuple(f"ft{k:02d}" for k in range(24))
    assert set(zoo.fine_tunings) == set(zoo.checkpoints)
    net = DigitsConvNet()
    net.load_state_dict(zoo.checkpoints["ft00"])
    with torch.no_grad():
        right = net(torch.as_tensor(zoo.X_test)).argmax(1).numpy() == zoo.y_test
    assert right.mean() > 0.8
    assert zoo.folder == module.REFERENCE


def test_the_reference_zoo_is_copied_once(tmp_path):
    folder = tmp_path / "new" / "runs"
    zoo = load_digits_checkpoints(folder)
    whole = CheckpointCollection.from_path(folder)  # nothing but the checkpoints is there
    assert whole.names == zoo.checkpoints.names
    before = (folder / "ft03.safetensors").stat().st_mtime_ns
    load_digits_checkpoints(folder)
    assert (folder / "ft03.safetensors").stat().st_mtime_ns == before


def test_a_changed_file_of_the_reference_zoo_is_named(tmp_path):
    load_digits_checkpoints(tmp_path)
    path = tmp_path / "ft03.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ft03.* is not the file of the reference zoo"):
        load_digits_checkpoints(tmp_path)


def test_a_missing_file_of_the_reference_zoo_is_named(monkeypatch, tmp_path):
    (tmp_path / module.DIGESTS).write_text((module.REFERENCE / module.DIGESTS).read_text())
    monkeypatch.setattr(module, "REFERENCE", tmp_path)
    with pytest.raises(CheckpointError, match=r"ft00.*: got SHA-256 no such file"):
        load_digits_checkpoints()


def test_the_command_that_made_the_reference_zoo(zoo, tmp_path):
    reference_zoo.write_zoo(zoo.folder, tmp_path, 3)
    lines = (tmp_path / module.DIGESTS).read_text().splitlines()
    assert [line.split()[1] for line in lines] == [f"ft0{k}.safetensors" for k in range(3)]
    for line in lines:
        digest, name = line.split()
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    given = zoo.checkpoints["ft01"]["head.weight"]
    found = CheckpointCollection.from_path(tmp_path)["ft01"]["head.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, given.to(torch.bfloat16).float())
    assert not torch.equal(found, given)
