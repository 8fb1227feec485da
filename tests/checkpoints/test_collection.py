"""A collection is a mapping that reads weights only when asked."""

from __future__ import annotations

import os
import pickle
import resource

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, ParameterGrid

from sksoup import BestCheckpoint, CheckpointCollection, CheckpointError, UniformSoup
from sksoup.checkpoints import pickles

from ..zoo import Net, Zoo, make_states, same_tensors


def test_an_attribute_of_a_module_is_no_trained_net():
    class Odd(torch.nn.Linear):
        module_ = "a name of its own"

    ckpts = CheckpointCollection([Odd(2, 2), Odd(2, 2)])
    assert type(ckpts.build_module()) is Odd


def test_is_a_mapping_in_natural_order(folder):
    collection = CheckpointCollection.from_path(folder)
    assert collection.names == tuple(f"ft{k}" for k in range(11))
    assert list(collection) == list(collection.names)
    assert len(collection) == 11
    assert "ft3" in collection
    assert "ft99" not in collection
    assert set(collection["ft10"]) == set(collection.layout)


def test_nothing_is_loaded_until_asked(folder, monkeypatch):
    opened = []
    original = CheckpointCollection.open
    monkeypatch.setattr(
        CheckpointCollection, "open", lambda self, name: opened.append(name) or original(self, name)
    )
    collection = CheckpointCollection.from_path(folder, module=Net)
    soup = UniformSoup(collection)
    clone(soup)
    repr(soup)
    soup._repr_html_()
    np.asarray(collection)
    pickle.loads(pickle.dumps(soup))
    search = GridSearchCV(UniformSoup(), {"checkpoints": [collection, collection.drop("ft1")]})
    clone(search)
    repr(search)
    search._repr_html_()
    list(ParameterGrid(search.param_grid))
    assert collection == collection
    assert collection.select(["ft1"]) != collection
    assert opened == []
    collection["ft1"]
    assert opened == ["ft1"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_opening_a_thousand_checkpoints_reads_headers_only(tmp_path, monkeypatch, suffix):
    """Counted by the kernel: bytes this process asked for, and its open files."""
    n, nbytes = 1000, 4_000_000
    first = tmp_path / f"ft0{suffix}"
    state = {"w": torch.zeros(nbytes // 4), "small": torch.zeros(2)}
    save_file(state, first) if suffix == ".safetensors" else torch.save(state, first)
    for k in range(1, n):
        os.link(first, tmp_path / f"ft{k}{suffix}")
    most_open = 0
    original = pickles.read_pickle, safetensors.safe_open

    def counting(function):
        def call(*args, **kwargs):
            nonlocal most_open
            most_open = max(most_open, len(os.listdir("/proc/self/fd")))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr("sksoup.checkpoints.torch_archives.read_pickle", counting(original[0]))
    monkeypatch.setattr("sksoup.checkpoints.read.safe_open", counting(original[1]))
    files_before = len(os.listdir("/proc/self/fd"))
    before, resident = bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    collection = CheckpointCollection.from_path(tmp_path)
    pickle.dumps(UniformSoup(collection))
    repr(collection)
    assert len(collection) == n
    assert collection.names[-1] == "ft999"
    assert bytes_read() - before < n * 65_536
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 200_000  # kB of 4 GB
    assert 0 < most_open <= files_before + 3
    assert len(os.listdir("/proc/self/fd")) <= files_before + 1
    before = bytes_read()
    with collection.open("ft7") as read:
        read("small")
    assert bytes_read() - before < 65_536  # mapped: what is not asked for is not read


def bytes_read() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def test_pickles_paths_not_weights(folder):
    collection = CheckpointCollection.from_path(folder, module=Net)
    collection.sha256("ft0")
    dumped = pickle.dumps(collection)
    assert len(dumped) < 10_000
    again = pickle.loads(dumped)
    assert same_tensors(again["ft4"], collection["ft4"])
    assert again.sha256("ft0") == collection.sha256("ft0")


def test_save_turns_memory_into_files(tmp_path):
    memory = CheckpointCollection(make_states(3, seed=0), module=Net)
    files = memory.save(tmp_path / "zoo")
    assert files.names == memory.names
    for name in memory:
        assert same_tensors(files[name], {tensor: memory[name][tensor] for tensor in files.layout})
        assert files.content_sha256(name) == memory.sha256(name)
    with pytest.raises(FileExistsError, match="exists"):
        memory.save(tmp_path / "zoo")


def test_names_do_not_lead_out_of_the_folder(tmp_path):
    states = make_states(2, seed=0)
    collection = CheckpointCollection({"a": states[0], "../b": states[1]})
    with pytest.raises(ValueError, match="would be outside"):
        collection.save(tmp_path / "zoo")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_select_and_drop(folder):
    collection = CheckpointCollection.from_path(
        folder, scores={f"ft{k}": k / 10 for k in range(11)}
    )
    part = collection.select(["ft5", "ft2"])
    assert part.names == ("ft5", "ft2")
    assert part.scores == {"ft5": 0.5, "ft2": 0.2}
    assert len(collection.drop("ft5")) == 10
    assert collection.drop(["ft5", "ft6"]).names[5] == "ft7"
    with pytest.raises(KeyError, match="No checkpoint named 'nope'"):
        collection.select(["nope"])
    with pytest.raises(CheckpointError, match="No checkpoints are left"):
        collection.drop(collection.names)


def test_layout_and_size():
    collection = CheckpointCollection(make_states(2, seed=0))
    assert collection.layout["head.weight"].shape == (3, 6)
    state = collection["checkpoint0"]
    assert collection.nbytes == sum(value.nbytes for value in state.values())


def test_a_collection_is_opened_again_without_a_read(zoo: Zoo, tmp_path, monkeypatch):
    files = CheckpointCollection(make_states(3, seed=0)).save(tmp_path)
    prefixed = {name: {f"module.{k}": v for k, v in files[name].items()} for name in files}
    for old in (files, CheckpointCollection(prefixed, prefix="module.")):
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointCollection, "open", None)
            scores = {name: 0.1 * k for k, name in enumerate(old)}
            again = CheckpointCollection(old, module=Net, scores=scores)
        assert again.names == old.names
        assert again.path("checkpoint0") == old.path("checkpoint0")
        assert again.layout == old.layout
        best = BestCheckpoint().fit(again, zoo.X, zoo.y)
        assert best.ingredients_ == ("checkpoint2",)
    assert CheckpointCollection(again).scores == scores
    assert CheckpointCollection(again).module is not None


def test_a_checkpoint_is_added(zoo: Zoo, tmp_path):
    scored = CheckpointCollection(
        zoo.checkpoints, scores=dict.fromkeys(zoo.checkpoints, 0.5), module=zoo.checkpoints.module
    )
    first = zoo.checkpoints["checkpoint0"]
    both = scored.add("again", first)
    assert both.names == (*scored.names, "again")
    assert both.scores is None
    assert both.module is scored.module
    assert same_tensors(both["again"], first)
    assert "again" not in scored  # which stays as it is
    with pytest.raises(ValueError, match="'checkpoint0' is already in this collection"):
        scored.add("checkpoint0", first)
    with pytest.raises(CheckpointError, match="other"):
        scored.add("other", {"x": torch.zeros(1)})
    files = zoo.checkpoints.save(tmp_path)
    assert files.add("again", files.path("checkpoint0")).path("again") == files.path("checkpoint0")


def test_a_checkpoint_is_added_with_the_key_and_prefix_of_the_others(tmp_path):
    def lightning(value: float, names=("net.", "loss.")):
        return {
            "state_dict": {name + "weight": torch.full((2, 2), value) for name in names},
            "ema": {name + "weight": torch.full((2, 2), -value) for name in names},
        }

    for k in range(3):
        torch.save(lightning(float(k)), tmp_path / f"{k}.ckpt")
    torch.save(lightning(9.0, names=("loss.",)), tmp_path / "other.ckpt")
    nets = CheckpointCollection(
        [tmp_path / "1.ckpt", tmp_path / "2.ckpt"], key="ema", prefix="net.",
        module=lambda: torch.nn.Linear(2, 2, bias=False),
    )  # fmt: skip
    both = nets.add("start", tmp_path / "0.ckpt").add("more", {"weight": torch.ones(2, 2)})
    assert [both[name]["weight"][0, 0].item() for name in both] == [-1.0, -2.0, -0.0, 1.0]
    soup = UniformSoup().fit(nets, torch.eye(2), [0, 1]).interpolate(tmp_path / "0.ckpt", 0.5)
    assert soup.state_dict()["weight"][0, 0].item() == -0.75
    with pytest.raises(CheckpointError, match=r"other\.ckpt"):
        nets.add("start", tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="'weight' has shape"):
        nets.add("start", {"weight": torch.ones(3, 2)})
    only_key = CheckpointCollection([tmp_path / "1.ckpt"], key="ema")
    assert only_key.add("start", tmp_path / "0.ckpt")["start"]["net.weight"][0, 0] == 0
    with pytest.raises(CheckpointError, match="cannot join this collection"):
        only_key.add("start", {"weight": torch.ones(3, 2)})
