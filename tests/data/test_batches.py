"""Inputs and targets in one batch: several inputs in a tuple of their own, lists of numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from sksoup import BestCheckpoint, CheckpointCollection, CheckpointEnsemble, GreedySoup, MEHLSoup
from sksoup.data import loaders
from sksoup.data.batches import split
from sksoup.data.indexed import IndexedRows
from sksoup.data.loaders import read_loader
from sksoup.inspection import compare_soups, ingredient_importance

from ..zoo import around

N = 62  # batches of 10 and one of 2: as many rows as inputs


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(8, 3)

    def forward(self, a, b):
        return self.a(a) - self.b(b)


class Same(Siamese):
    """Inputs of one shape, which could be stacked."""

    def __init__(self):
        super().__init__()
        self.b = nn.Linear(4, 3)


class Nested(Dataset):
    """Rows ((a, b), y), or ((a, b),) without targets."""

    def __init__(self, a, b, y=None):
        self.a, self.b, self.y = a, b, y

    def __len__(self):
        return len(self.a)

    def __getitem__(self, k):
        inputs = self.a[k], self.b[k]
        return (inputs,) if self.y is None else (inputs, self.y[k])


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows[k] for k in range(len(self.rows)))


class Lists(Dataset):
    """Rows (x, y), each x of any kind."""

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, k):
        return self.X[k], self.y[k]


def problem(module):
    torch.manual_seed(0)
    a, b, y = torch.randn(N, 4), torch.randn(N, module().b.in_features), torch.arange(N) % 3
    return CheckpointCollection(around(module(), 3, 0.5), module=module), a, b, y


def forms(a, b, y):
    rows = Nested(a, b, y)
    return {
        "data set": rows,
        "loader": DataLoader(rows, batch_size=10),
        "two rows": DataLoader(rows, batch_size=2),
        "collated": DataLoader(rows, batch_size=10, collate_fn=lambda part: default_collate(part)),
        "arrays": DataLoader(Nested(a.numpy(), b.numpy(), y.numpy()), batch_size=10),
        "stream": DataLoader(Stream(rows), batch_size=10),
        "batches": DataLoader([((a, b), y)], batch_size=None),
        "tuple": iter([((a[:40], b[:40]), y[:40]), ((a[40:], b[40:]), y[40:])]),
        "lists": iter([[[a, b], y.tolist()]]),
    }


@pytest.mark.parametrize("module", [Siamese, Same])
@pytest.mark.parametrize("form", forms(*[torch.zeros(1)] * 3))
def test_a_tuple_in_the_rows_is_several_inputs(module, form):
    checkpoints, a, b, y = problem(module)
    plain = GreedySoup().fit(checkpoints, (a, b), y)
    soup = GreedySoup().fit(checkpoints, forms(a, b, y)[form])
    assert soup.input_names_ == 2
    assert soup.individual_scores_ == plain.individual_scores_
    expected = plain.predict_proba((a, b))
    assert (soup.predict_proba((a, b)) == expected).all()
    assert (plain.predict_proba(forms(a, b, y)[form]) == expected).all()
    assert plain.score(forms(a, b, y)[form]) == plain.score((a, b), y)


def test_several_inputs_without_targets():
    checkpoints, a, b, y = problem(Same)
    plain = MEHLSoup(max_epochs=1, random_state=0).fit(checkpoints, (a, b), y)
    rows = Nested(a, b)
    weight = np.arange(N) % 3.0
    for X in (rows, DataLoader(rows, batch_size=10), DataLoader(rows, batch_size=2)):
        assert np.array_equal(clone(plain).fit(checkpoints, X, y).coef_, plain.coef_)
        assert (plain.predict_proba(X) == plain.predict_proba((a, b))).all()
        assert plain.score(X, y) == plain.score((a, b), y)
    assert (plain.predict_proba(iter([((a, b),)])) == plain.predict_proba((a, b))).all()
    weighted = clone(plain).fit(checkpoints, (a, b), y, sample_weight=weight)
    soup = clone(plain).fit(checkpoints, Nested(a, b, y), sample_weight=weight)
    assert np.array_equal(soup.coef_, weighted.coef_)
    with pytest.raises(ValueError, match="requires y"):
        clone(plain).fit(checkpoints, rows)
    with pytest.raises(ValueError, match="score needs y"):
        plain.score(rows)
    three = CheckpointCollection(around(Three(), 2, 0.1), module=Three)
    other = GreedySoup().fit(three, (a, b, a), y)
    with pytest.raises(ValueError, match="got a tuple of 2 arrays, expected a tuple of 3 arrays"):
        other.predict(Nested(a, b, y))


class Three(Same):
    def forward(self, a, b, c):
        return super().forward(a, b + c)


@pytest.mark.parametrize("kept", [0, 25])
@pytest.mark.parametrize("size", [2, 10])
def test_several_inputs_larger_than_memory(monkeypatch, kept, size):
    checkpoints, a, b, y = problem(Same)
    soup = MEHLSoup(max_epochs=2, batch_size=16, random_state=0)
    plain = clone(soup).fit(checkpoints, (a, b), y)
    monkeypatch.setattr(loaders, "free_bytes", lambda device: 4 * kept * 32)
    for collate in (None, lambda part: default_collate(part)):
        loader = DataLoader(Nested(a, b, y), batch_size=10, collate_fn=collate)
        X, _ = read_loader(loader)
        assert isinstance(X, IndexedRows)
        found = X.take(torch.arange(N - size, N))  # as many rows as inputs
        assert isinstance(found, tuple)
        assert torch.equal(found[1], b[-size:])
        assert np.array_equal(clone(soup).fit(checkpoints, loader).coef_, plain.coef_)
    X, _ = read_loader(Lists(a.tolist(), y))
    assert isinstance(X, IndexedRows)
    assert torch.equal(X.take(torch.arange(4)).float(), a[:4])  # as many rows as numbers


def test_everything_that_reads_rows_takes_several_inputs(tmp_path):
    checkpoints, a, b, y = problem(Siamese)
    X, plain = DataLoader(Nested(a, b, y), batch_size=10), (a, b)
    recipes = {"best": BestCheckpoint(), "ensemble": CheckpointEnsemble()}
    found, expected = (
        compare_soups(checkpoints, X_, y_, X_, y_, recipes=recipes)
        for X_, y_ in ((X, None), (plain, y))
    )
    assert [r.test for r in found.results] == [r.test for r in expected.results]
    cached = BestCheckpoint(memory=str(tmp_path)).fit(checkpoints, plain, y)
    again = clone(cached).fit(checkpoints, X)
    assert (cached.counts_.rows_forward, again.counts_.rows_forward) == (3 * N, 0)
    soup = GreedySoup().fit(checkpoints, X)
    assert ingredient_importance(soup, X) == ingredient_importance(soup, plain, y)


def net(n_features):
    torch.manual_seed(0)
    return CheckpointCollection(
        around(nn.Linear(n_features, 3), 3, 0.5), module=lambda: nn.Linear(n_features, 3)
    )


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("named", [False, True])
def test_a_list_of_numbers_is_one_input(size, named):
    """Also in batches of as many rows as numbers, where a transposed batch has the same shape."""
    X = np.random.default_rng(0).normal(size=(N, 2))
    X[:, 1] = np.round(X[:, 1])
    y = np.arange(N) % 3
    rows = [[float(row[0]), int(row[1])] for row in X]
    loader = DataLoader(Lists([{"input": row} for row in rows] if named else rows, y), size)
    found, targets = read_loader(loader)
    assert np.array_equal(found["input"] if named else found, X)
    assert np.array_equal(targets, y)
    if not named:
        checkpoints = net(2)
        plain = GreedySoup().fit(checkpoints, X, y)
        soup = GreedySoup().fit(checkpoints, loader)
        assert np.array_equal(soup.predict_proba(loader), plain.predict_proba(X))


def test_an_input_and_a_number_are_two_inputs():
    images, age = torch.randn(5, 3, 2, 2), torch.arange(5.0)
    found, _ = read_loader(DataLoader(Nested(images, age.tolist(), age), batch_size=5))
    assert [part.shape for part in found] == [(5, 3, 2, 2), (5,)]
    found, _ = read_loader(Nested(age, images, age))
    assert [part.shape for part in found] == [(5,), (5, 3, 2, 2)]


@pytest.mark.parametrize("labels", [list, torch.tensor])
@pytest.mark.parametrize("shape", [(2,), (4,), (4, 2), (3, 4)])
def test_lists_of_rows_are_one_input(shape, labels):
    """As ``zip(*rows)`` gives them, also if there are as many rows as entries in each."""
    torch.manual_seed(0)
    X, y = torch.randn(6, *shape), list(range(6))
    batches = [(list(X[:4]), labels(y[:4])), (list(X[4:]), labels(y[4:]))]
    found, targets = read_loader(iter(batches))
    assert torch.equal(found, X)
    assert targets.tolist() == y
    found, _ = read_loader(iter([(tuple(X), tuple(X), labels(y))]))
    assert torch.equal(found[0], X)
    assert torch.equal(found[1], X)
    found, _ = split((list(X[:2]), list(X[2:4])), None, 2)
    assert torch.equal(found[1], X[2:4])


M, X3 = {"mask": torch.ones(4)}, torch.ones(4, 3)


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        (((torch.ones(3), M), 0), "Tensor, dict"),
        (((M, torch.ones(3)), 0), "dict, Tensor"),
        (((torch.ones(3), (torch.ones(3), torch.ones(2))), 0), "Tensor, list"),
        (((torch.ones(3), torch.ones(2)), torch.ones(2), 0), "Tensor, Tensor"),
        ((torch.ones(3), (torch.ones(3), torch.ones(2)), 0), "Tensor, Tensor"),
        (({"a": [torch.ones(3), torch.ones(2)]}, 0), "Tensor, Tensor"),
    ],
)
def test_deeper_nesting_is_refused(row, kinds):
    with pytest.raises(TypeError, match=rf"a list of {kinds}, expected one tensor.*\(\(a, b\), y"):
        read_loader(DataLoader([row] * 4, batch_size=2))


@pytest.mark.parametrize("parts", [[X3, {"mask": X3}], [X3, [X3, X3]]])
def test_deeper_nesting_is_refused_in_any_batches(parts):
    with pytest.raises(TypeError, match="expected one tensor"):
        split((parts, torch.zeros(4)), None, None)
