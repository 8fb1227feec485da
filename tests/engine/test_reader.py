"""The background reader: what it gives, in which order, and how it ends."""

from __future__ import annotations

import random
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints.health import Health
from sksoup.engine.center import FlatLayout
from sksoup.engine.deltas import Reader
from sksoup.mixing.layers import group_layers

from ..zoo import Net, PaperMEHL, Zoo, make_states, same_tensors


@pytest.fixture
def files(tmp_path):
    return CheckpointCollection(make_states(7, seed=0), module=Net).save(tmp_path / "zoo")


@contextmanager
def reading(files, order, n_ahead, window, device=torch.device("cpu")):  # noqa: B008
    """A reader of everything in these files, in an order."""
    module = files.build_module()
    layout = FlatLayout.of(module, group_layers(module, files.layout, True), set(files.layout))
    flat = SimpleNamespace(layout=layout, device=device)
    center = SimpleNamespace(checkpoints=files, flat=flat, weights=torch.ones(layout.size))
    reader = Reader(center, order, n_ahead, window)
    try:
        reader.begin()
        yield reader, layout
    finally:
        reader.close()


@pytest.mark.parametrize("n_ahead", [0, 1, 2, 9])
def test_gives_flat_deltas_in_order(files, n_ahead):
    order = [files.names[k] for k in (3, 1, 1, 6, 0)]
    with reading(files, order, n_ahead, window=2) as (reader, layout):
        assert (reader._thread is not None) == bool(n_ahead)  # it may have ended by now
        names = {segment.name for segment in layout.segments}
        assert names == {n for n, i in files.layout.items() if i.is_floating}
        for name in order:
            delta = torch.empty(layout.size)
            reader.read_into(delta, name)
            for s in layout.segments:
                assert torch.equal(delta[s.where].view(s.shape), files[name][s.name] - 1)
    assert not running()


def test_pinned_memory_is_used_again_only_when_it_was_copied(files, monkeypatch):
    """The path of CUDA, with what it needs of CUDA put in."""
    events, pinned = [], []
    empty = torch.empty

    def pin(*size, pin_memory=False, **kwargs):
        found = empty(*size, **kwargs)
        if pin_memory:
            pinned.append(found.data_ptr())
        return found

    class Out(torch.Tensor):
        def copy_(self, other, non_blocking=False):
            events.append(("copy", pinned.index(other.data_ptr()), non_blocking))
            return super().copy_(other)

    stream = SimpleNamespace(synchronize=lambda: events.append("synchronize"))
    monkeypatch.setattr(torch, "empty", pin)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    order = list(files)
    with reading(files, order, 2, 3, device=SimpleNamespace(type="cuda")) as (reader, layout):
        for name in order:
            delta = empty(layout.size).as_subclass(Out)
            reader.read_into(delta, name)
            for s in layout.segments:
                found = delta[s.where].view(s.shape).as_subclass(torch.Tensor)
                assert torch.equal(found, files[name][s.name] - 1)
    assert len(pinned) == 2
    assert events[1::2] == ["synchronize"] * len(order)  # after each copy, before it is free again
    assert events[::2] == [("copy", k % 2, True) for k in range(len(order))]


def running():
    return [thread for thread in threading.enumerate() if thread.name == "sksoup-reader"]


def test_what_is_not_taken_is_not_waited_for(files):
    with reading(files, list(files), 2, window=3) as (reader, layout):
        reader.read_into(torch.empty(layout.size), files.names[0])
        assert running()
    assert not running()


def test_files_of_the_next_window_are_warmed_while_it_waits(files, monkeypatch):
    warmed = []
    monkeypatch.setattr(CheckpointCollection, "warm", lambda self, name: warmed.append(name))
    order = list(files)
    with reading(files, order, 1, window=3) as (reader, layout):
        while len(warmed) < 3:  # the first is read, the next three are warmed
            time.sleep(1e-3)
        assert warmed == order[1:4]
        reader.read_into(torch.empty(layout.size), order[0])


def test_warming_a_file_changes_nothing(files):
    before = files["checkpoint0"]
    files.warm("checkpoint0")
    assert same_tensors(files["checkpoint0"], before)
    CheckpointCollection(make_states(1, seed=0)).warm("checkpoint0")


def test_an_error_of_the_reader_is_raised_where_the_delta_is_needed(files, zoo: Zoo):
    files.path("checkpoint2").unlink()
    taken = []

    def take_all():
        with reading(files, list(files), 1, window=3) as (reader, layout):
            for name in files:
                reader.read_into(torch.empty(layout.size), name)
                taken.append(name)

    with pytest.raises(CheckpointError, match=r"checkpoint2\.safetensors' can't be opened"):
        take_all()
    assert taken == ["checkpoint0", "checkpoint1"]
    assert not running()


def test_a_file_that_is_replaced_during_the_fit_stops_it(files, zoo: Zoo):
    def replace(context=None, **_):
        path = files.path("checkpoint5")
        path.write_bytes(path.read_bytes())

    class Replacing(torch.nn.CrossEntropyLoss):
        def forward(self, output, y):
            replace()
            return super().forward(output, y)

    soup = PaperMEHL(model_batch_size=1, criterion=Replacing(), random_state=0)
    with pytest.raises(CheckpointError, match=r"checkpoint5\.safetensors' changed on disk"):
        soup.fit(files, zoo.X, zoo.y)
    assert not running()
    assert not hasattr(soup, "coef_")


@pytest.mark.parametrize("prefetch", [1, 3, 20])
@pytest.mark.parametrize("delta_dtype", [None, "bfloat16"])
def test_the_same_bits_whatever_the_timing(files, zoo: Zoo, monkeypatch, prefetch, delta_dtype):
    settings = {"layerwise": True, "model_batch_size": 3, "model_epochs": 2, "max_epochs": 2,
                "batch_size": 20, "random_state": 0, "delta_dtype": delta_dtype}  # fmt: skip
    plain = PaperMEHL(prefetch=0, **settings).fit(files, zoo.X, zoo.y)
    original = Health.see
    rng = random.Random(0)

    def slow(self, *arguments):
        time.sleep(rng.random() * 2e-3)
        return original(self, *arguments)

    monkeypatch.setattr(Health, "see", slow)
    soup = PaperMEHL(prefetch=prefetch, **settings).fit(files, zoo.X, zoo.y)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert same_tensors(soup.state_dict(), plain.state_dict())
    assert soup.history_ == plain.history_


def test_checkpoints_in_memory_need_no_thread(zoo: Zoo, monkeypatch):
    monkeypatch.setattr("sksoup.engine.deltas.Thread", None)  # would fail if one were made
    PaperMEHL(model_batch_size=3, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)


def test_ctrl_c_while_the_thread_begins(monkeypatch, files, zoo: Zoo):
    """Thread.start waits for the thread, which is where it arrives."""
    start = threading.Thread.start

    def interrupted(self):
        start(self)
        if self.name == "sksoup-reader":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PaperMEHL(max_epochs=1, model_batch_size=2, prefetch=2).fit(files, zoo.X, zoo.y)
    for _ in range(100):
        if not running():
            break
        time.sleep(0.02)
    assert not running()
