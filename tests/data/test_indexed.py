"""Held-out rows that are read by index: the same bits as rows in memory, and bounded memory."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
)
from sksoup.data import loaders
from sksoup.data.indexed import IndexedRows
from sksoup.data.loaders import read_loader
from sksoup.data.rows import one_ahead

from ..zoo import Zoo, make_zoo, same_tensors

ROOT = Path(__file__).parents[2]


class Pairs(Dataset):
    """Rows and targets, one at a time; counts the reads."""

    def __init__(self, X, y=None):
        self.X, self.y, self.n_read = torch.as_tensor(X), y, 0

    def __len__(self):
        return len(self.X)

    def __getitem__(self, index):
        self.n_read += 1
        return self.X[index] if self.y is None else (self.X[index], int(self.y[index]))


@pytest.fixture
def zoo() -> Zoo:
    return make_zoo(6, seed=3, batch_norm=False)


def limited(monkeypatch, n_bytes: int) -> None:
    """Let rows have this much memory: half of what is free."""
    monkeypatch.setattr(loaders, "free_bytes", lambda device: 2 * n_bytes)


SOUPS = {
    "best": BestCheckpoint(batch_size=16),
    "greedy": GreedySoup(batch_size=16),
    "greedy split": GreedySoup(ranking_fraction=0.5, batch_size=16, random_state=0),
    "greedy scored": GreedySoup(scoring="f1_macro", batch_size=16),
    "greedy loss": GreedySoup(scoring="neg_log_loss", batch_size=16),
    "learned": LearnedSoup(max_epochs=2, batch_size=16, random_state=0),
    "MEHL": MEHLSoup(layerwise=True, max_epochs=2, batch_size=16, random_state=0),
    "aside": MEHLSoup(validation_fraction=0.3, max_epochs=2, batch_size=16, random_state=0),
    "ensemble": CheckpointEnsemble(batch_size=16),
}


@pytest.mark.parametrize("name", SOUPS)
@pytest.mark.parametrize("kept", [0, 25, 10**6])
def test_rows_that_are_read_give_the_bits_of_rows_in_memory(zoo: Zoo, monkeypatch, name, kept):
    X, y = np.asarray(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    plain = SOUPS[name].fit(zoo.checkpoints, X, y)
    expected = plain.coef_, plain.history_, plain.predict(X)
    weights = plain.state_dict() if name != "ensemble" else {}
    limited(monkeypatch, 2 * kept * X[0].nbytes)
    rows = Pairs(X, y)
    soup = SOUPS[name].fit(zoo.checkpoints, rows)
    assert np.array_equal(soup.coef_, expected[0])
    assert soup.history_ == expected[1]
    assert np.array_equal(soup.predict(Pairs(X)), expected[2])
    assert soup.score(rows) == soup.score(X, y)
    if weights:
        assert same_tensors(soup.state_dict(), weights)
    assert soup.n_features_in_ == X.shape[1]


def test_each_row_is_read_once_for_the_targets_and_once_per_pass(zoo: Zoo, monkeypatch):
    X, y = np.asarray(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    limited(monkeypatch, 0)
    rows = Pairs(X, y)
    soup = MEHLSoup(center="mean", clip_deltas=None, max_epochs=3, random_state=0)
    soup.fit(zoo.checkpoints, rows)
    # and the first one to see what a row is, and what the module makes of it
    passes = soup.counts_.rows_forward + soup.counts_.rows_recalibrated
    assert len(y) + passes <= rows.n_read <= len(y) + passes + 5


class Graph:
    """A class of the user's program, which torch.load makes if it is allowed."""

    def __init__(self, x):
        self.x = x


class Stored(Pairs):
    """Each row is read from a file of such an object."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        file = io.BytesIO()
        torch.save(Graph(x), file)
        file.seek(0)
        return torch.load(file).x, y


def test_rows_may_be_objects_of_classes_that_were_allowed(zoo: Zoo, monkeypatch, tmp_path):
    """A thread reads the next checkpoints meanwhile, without touching the list of such classes."""
    X, y = np.asarray(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    for name in zoo.checkpoints:
        torch.save(zoo.checkpoints[name], tmp_path / f"{name}.pt")
    files = CheckpointCollection.from_path(tmp_path, module=zoo.checkpoints.module)
    limited(monkeypatch, 0)
    soup = MEHLSoup(model_batch_size=2, max_epochs=2, batch_size=16, random_state=0)
    names, start = [], Thread.start
    monkeypatch.setattr(Thread, "start", lambda self: (names.append(self.name), start(self)))
    with torch.serialization.safe_globals([Graph]):
        soup.fit(files, Stored(X, y))
    assert "sksoup-reader" in names
    assert soup.model_batch_size_ == 2


@pytest.mark.parametrize("recipe", [LearnedSoup, MEHLSoup])
def test_rows_are_kept_within_memory_limit(zoo: Zoo, recipe):
    X, y = np.asarray(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    fits = zoo.checkpoints.nbytes * 10  # all models
    rows = Pairs(np.tile(X, (200, 1)), np.tile(y, 200))
    assert rows.X.nbytes > fits
    soup = recipe(max_epochs=1, batch_size=4096, memory_limit=fits, random_state=0)
    soup.fit(zoo.checkpoints, rows)
    n, n_passes = len(rows), soup.counts_.rows_forward // len(rows)
    n_kept = fits // 2 // X[0].nbytes  # joining what is kept takes as much again
    assert n < rows.n_read <= n + (n_passes + 1) * (n - n_kept + 256)
    coef, rows.n_read = soup.coef_, 0
    soup.set_params(memory_limit=None).fit(zoo.checkpoints, rows)
    assert rows.n_read == n
    assert np.array_equal(soup.coef_, coef)


@given(
    st.integers(1, 40), st.integers(0, 40), st.lists(st.integers(0, 39), min_size=1, max_size=30)
)
def test_any_rows_come_in_the_order_asked_for(n, n_kept, wanted):
    X = torch.arange(2.0 * n).reshape(n, 2)
    wanted = torch.tensor([i % n for i in wanted])
    with pytest.MonkeyPatch.context() as patch:
        limited(patch, 2 * n_kept * X[0].nbytes)
        patch.setattr("sksoup.data.indexed.ROWS", 4)
        found, _ = read_loader(Pairs(X))
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, X)
        return
    assert found.n_kept <= n_kept
    assert torch.equal(found.take(wanted), X[wanted])
    some = found.select(wanted)
    assert torch.equal(torch.cat(list(some.walk(3))), X[wanted])
    assert some.digest != found.digest


def test_which_input_is_which_is_in_the_digest(monkeypatch):
    """Once, memory= gave the scores of exchanged inputs."""
    limited(monkeypatch, 0)
    X = torch.arange(20.0).reshape(10, 2)
    digests = []
    for collate in (
        lambda rows: {"a": torch.stack(rows), "b": torch.stack(rows)},
        lambda rows: {"b": torch.stack(rows), "a": torch.stack(rows)},
        lambda rows: {"a": torch.stack(rows), "c": torch.stack(rows)},
        lambda rows: torch.stack(rows),
    ):
        found, _ = read_loader(DataLoader(Pairs(X), batch_size=5, collate_fn=collate), n_inputs=1)
        assert isinstance(found, IndexedRows)
        digests.append(found.digest)
    assert len(set(digests)) == 4


def test_processes_that_are_started_while_reading_ahead_end_without_error():
    fork = multiprocessing.get_context("fork")  # as workers of a loader are started on Linux

    def exit_code(number):
        process = fork.Process(target=int)
        process.start()
        process.join(30)
        return number, process.exitcode

    assert list(one_ahead(exit_code, range(3))) == [(0, 0), (1, 0), (2, 0)]


def test_errors_while_reading_ahead_are_raised_where_the_minibatch_is_used():
    made = one_ahead(lambda number: 6 // (2 - number), range(4))
    assert [next(made), next(made)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(made)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_workers_and_collate_of_a_loader_are_used(zoo: Zoo, monkeypatch, n_workers):
    X, y = np.asarray(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    limited(monkeypatch, 0)

    def collate(rows):
        inputs, labels = zip(*rows, strict=True)
        return {"X": torch.stack(inputs), "labels": torch.tensor(labels)}

    loader = DataLoader(Pairs(X, y), batch_size=7, num_workers=n_workers, collate_fn=collate)
    found, labels = read_loader(loader)
    assert isinstance(found, IndexedRows)
    assert np.array_equal(labels, y)
    assert torch.equal(found.take(torch.tensor([5, 2]))["X"], torch.from_numpy(X[[5, 2]]))
    state = torch.get_rng_state()
    list(found.walk())
    assert torch.equal(state, torch.get_rng_state())


def test_arrays_in_files_are_read_by_index(zoo: Zoo, monkeypatch, tmp_path):
    X, y = np.asarray(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    plain = MEHLSoup(random_state=0, max_epochs=2).fit(zoo.checkpoints, X, y)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    limited(monkeypatch, 0)
    soup = MEHLSoup(random_state=0, max_epochs=2).fit(zoo.checkpoints, mapped, y)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert np.array_equal(soup.predict(mapped), plain.predict(X))
    assert soup.score(mapped, y) == plain.score(X, y)


def test_data_sets_of_hugging_face_are_read_by_index(zoo: Zoo, monkeypatch):
    X, y = np.asarray(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    plain = MEHLSoup(random_state=0, max_epochs=2).fit(zoo.checkpoints, X, y)
    rows = datasets.Dataset.from_dict({"X": X, "label": y})
    limited(monkeypatch, 0)
    soup = MEHLSoup(random_state=0, max_epochs=2, forward=lambda module, X: module(X["X"]))
    soup.fit(zoo.checkpoints, rows)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert soup.score(rows) == plain.score(X, y)


def test_bytes_stay_bytes_until_they_are_on_the_device(monkeypatch):
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    limited(monkeypatch, 20 * 48)
    monkeypatch.setattr("sksoup.data.indexed.ROWS", 4)
    found, _ = read_loader(Pairs(images))
    assert found.kept.dtype == torch.uint8
    assert found.nbytes <= 20 * 48
    assert found.take(torch.tensor([1, 49])).dtype == torch.uint8


def test_memory_takes_a_finished_fit_and_notices_other_rows(zoo: Zoo, monkeypatch, tmp_path):
    X, y = np.asarray(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    limited(monkeypatch, 0)
    soup = MEHLSoup(random_state=0, max_epochs=2, memory=tmp_path)
    first = soup.fit(zoo.checkpoints, Pairs(X, y)).coef_
    again = soup.fit(zoo.checkpoints, Pairs(X, y))
    assert np.array_equal(first, again.coef_)
    assert not any(vars(again.counts_).values())
    X[-1] += 1
    other = soup.fit(zoo.checkpoints, Pairs(X, y))
    assert other.counts_.rows_backward


@pytest.mark.parametrize("changed", ["order", "number", "rows"])
def test_rows_that_are_others_when_they_are_read_again_are_refused(zoo: Zoo, monkeypatch, changed):
    """Once, the soup was searched with the targets of other rows, and no error."""
    X, y = np.asarray(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    limited(monkeypatch, 0)
    n_read = 0

    def collate(batch):
        nonlocal n_read
        n_read += len(batch)
        if changed == "order":
            batch = sorted(batch, key=lambda row: float(row[0][0]))
        if changed == "number" and n_read > len(y):
            batch = batch + batch[:1]
        X, labels = torch.utils.data.default_collate(batch)
        return X, (labels + 1) % 3 if changed == "rows" and n_read > len(y) else labels

    rows = DataLoader(Pairs(X, y), batch_size=8, collate_fn=collate)
    with pytest.raises(ValueError, match="they have other targets than in the first pass"):
        MEHLSoup(batch_size=16, random_state=0).fit(zoo.checkpoints, rows)


def test_what_can_not_be_read_again_has_to_fit(zoo: Zoo, monkeypatch):
    X, y = np.asarray(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    limited(monkeypatch, 100)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(X, y, strict=True))

    for rows in (
        Stream(), iter(DataLoader(Pairs(X, y))),
        DataLoader(Pairs(X, y), sampler=RandomSampler(range(len(y)))),
        DataLoader(Pairs(X, y), batch_size=7, drop_last=True),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"do not fit into memory: .* Pass a data set with"):
            MEHLSoup().fit(zoo.checkpoints, rows)
    with pytest.raises(ValueError, match="needs the held-out rows in memory, but only"):
        MEHLSoup(lambda X, y: zoo.checkpoints).fit(Pairs(X, y))


def test_rows_that_are_not_finite_are_refused_though_they_are_not_kept(zoo: Zoo, monkeypatch):
    X, y = np.array(zoo.X, dtype=np.float32), np.asarray(zoo.y)
    X[-1, 0] = np.nan
    limited(monkeypatch, 100)
    with pytest.raises(ValueError, match="Input X contains NaN or infinite values"):
        MEHLSoup().fit(zoo.checkpoints, Pairs(X, y))


JOB = """
import json, re, sys
from pathlib import Path
import numpy as np, torch
from torch.utils.data import Dataset
from sksoup import CheckpointCollection, MEHLSoup
from sksoup.data import loaders
loaders.free_bytes = lambda device: 8 * 2**20

class Images(Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        return torch.full((3, 64, 64), i % 10 / 10), i % 10

def build():
    return torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(48, 10))

torch.manual_seed(0)
start = build().state_dict()
states = [{n: w + 0.01 * torch.randn_like(w) for n, w in start.items()} for _ in range(3)]
ckpts = CheckpointCollection(states, module=build)
MEHLSoup(layerwise=True, max_epochs=1).fit(ckpts, Images(600))

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
MEHLSoup(layerwise=True, max_epochs=1).fit(ckpts, Images(int(sys.argv[1])))
print(json.dumps(peak() - before))
"""


def test_memory_does_not_grow_with_the_rows():
    grown = {
        n: json.loads(
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", JOB, str(n)],
                cwd=ROOT, capture_output=True, text=True, check=True,
                # freed memory goes back at once, so that the peak is of what is held
                env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "16384"},
            ).stdout.splitlines()[-1]
        )
        for n in (2000, 20_000)
    }  # fmt: skip
    # 18,000 rows more would take 885 MB
    assert grown[20_000] - grown[2000] < 20e6, grown
