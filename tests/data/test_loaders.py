"""Data sets and loaders: walked once, the same soup as from arrays."""

from __future__ import annotations

import itertools
import random
import weakref

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from skorch import NeuralNetClassifier
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from sksoup import (
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    UniformSoup,
)
from sksoup.data import loaders
from sksoup.data.loaders import minibatches
from sksoup.model_selection import SoupSearchCV

from ..zoo import PlainNet, Zoo, around

SOUPS = [
    CheckpointEnsemble(),
    GreedySoup(batch_size=25),
    LearnedSoup(max_epochs=2, batch_size=25, random_state=0),
    MEHLSoup(layerwise=True, model_batch_size=3, max_epochs=2, batch_size=25, random_state=0),
]
every_soup = pytest.mark.parametrize("soup", SOUPS, ids=lambda soup: type(soup).__name__)


class Rows(Dataset):
    """Map-style, with targets, numpy rows; counts how often it is asked."""

    def __init__(self, X, y):
        self.X, self.y = X, y
        self.n_asked = 0

    def __len__(self):
        return len(self.X)

    def __getitem__(self, k):
        self.n_asked += 1
        return self.X[k], int(self.y[k])


class Stream(IterableDataset):
    def __init__(self, X, y):
        self.X, self.y = X, y

    def __iter__(self):
        return iter(zip(self.X, self.y.tolist(), strict=True))


class Named(Dataset):
    """Rows as a mapping, like those of a data set on a hub."""

    column_names = ("pixels", "label")

    def __init__(self, X, y, key="label"):
        self.X, self.y, self.key = X, y, key

    def with_format(self, kind):
        assert kind == "torch"
        return self

    def __len__(self):
        return len(self.X)

    def __getitem__(self, k):
        return {"x": torch.as_tensor(self.X[k]), self.key: torch.tensor(self.y[k])}


def forms(zoo):
    X, y = torch.as_tensor(zoo.X), torch.as_tensor(zoo.y)
    rows = Rows(zoo.X, zoo.y)
    return {
        "TensorDataset": TensorDataset(X, y),
        "Dataset": rows,
        "DataLoader": DataLoader(rows, batch_size=7),
        "workers": DataLoader(TensorDataset(X, y), batch_size=16, num_workers=2),
        "batch sampler": DataLoader(
            rows, batch_sampler=BatchSampler(SequentialSampler(rows), 9, drop_last=False)
        ),
        "IterableDataset": Stream(zoo.X, zoo.y),
        "iterable loader": DataLoader(Stream(zoo.X, zoo.y), batch_size=8),
        "mapping": Named(zoo.X, zoo.y),
        "loader of mappings": DataLoader(Named(zoo.X, zoo.y, "y"), batch_size=11),
        "inputs alone": DataLoader(TensorDataset(X), batch_size=13),
    }


@every_soup
def test_the_same_bits_from_any_form(zoo: Zoo, soup):
    plain = clone(soup).fit(zoo.checkpoints, zoo.X, zoo.y)
    for form, X in forms(zoo).items():
        y = zoo.y if form == "inputs alone" else None
        fitted = clone(soup).fit(zoo.checkpoints, X, y)
        assert np.array_equal(fitted.coef_, plain.coef_), form
        if isinstance(X, Named) or (hasattr(X, "dataset") and isinstance(X.dataset, Named)):
            assert fitted.input_names_ == ("x",)
        else:
            assert (fitted.predict_proba(X) == plain.predict_proba(zoo.X)).all()
            assert (fitted.predict(zoo.X) == plain.predict(zoo.X)).all()
        assert fitted.score(X, y) == plain.score(zoo.X, zoo.y)


def test_an_iterator_of_batches_is_walked_once(zoo: Zoo):
    plain = MEHLSoup(max_epochs=1, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    batches = iter(DataLoader(Rows(zoo.X, zoo.y), batch_size=7))
    soup = MEHLSoup(max_epochs=1, random_state=0).fit(zoo.checkpoints, batches)
    assert np.array_equal(soup.coef_, plain.coef_)
    with pytest.raises(ValueError, match="returned no rows: an iterator can be used only once"):
        clone(soup).fit(zoo.checkpoints, batches)
    with pytest.raises(ValueError, match="returned no rows"):
        soup.score(batches)


def test_a_data_set_is_asked_for_each_row_once(zoo: Zoo):
    rows = Rows(zoo.X, zoo.y)
    MEHLSoup(max_epochs=3, random_state=0).fit(zoo.checkpoints, rows)
    assert rows.n_asked == 60


def test_a_loader_that_shuffles_fits_but_does_not_predict(zoo: Zoo):
    loader = DataLoader(Rows(zoo.X, zoo.y), batch_size=7, shuffle=True)
    soup = GreedySoup().fit(zoo.checkpoints, loader)
    plain = GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.individual_scores_ == plain.individual_scores_  # rows and labels stay together
    assert soup.score(loader) == plain.score(zoo.X, zoo.y)
    with pytest.raises(ValueError, match=r"shuffles \(RandomSampler\).*shuffle=False"):
        soup.predict(loader)
    with pytest.raises(ValueError, match="shuffles"):
        GreedySoup().fit(zoo.checkpoints, loader, sample_weight=np.ones(60))
    with pytest.raises(ValueError, match="shuffles"):
        soup.score(loader, sample_weight=np.ones(60))


def test_a_loader_that_drops_rows_does_not_predict(zoo: Zoo):
    soup = GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    loader = DataLoader(Rows(zoo.X, zoo.y), batch_size=7, drop_last=True)
    batches = BatchSampler(SequentialSampler(range(60)), 7, drop_last=True)
    for dropping in (loader, DataLoader(Rows(zoo.X, zoo.y), batch_sampler=batches)):
        with pytest.raises(ValueError, match="leaves out 4 of 60 rows"):
            soup.predict(dropping)
    whole = DataLoader(Rows(zoo.X, zoo.y), batch_size=6, drop_last=True)
    assert (soup.predict(whole) == soup.predict(zoo.X)).all()


@pytest.mark.parametrize("shuffle", [False, True])
def test_walking_leaves_global_random_state(zoo: Zoo, shuffle):
    class Noisy(Rows):
        def __getitem__(self, k):
            torch.rand(1), np.random.rand(), random.random()
            return super().__getitem__(k)

    soup = GreedySoup()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    soup.fit(zoo.checkpoints, DataLoader(Noisy(zoo.X, zoo.y), batch_size=7, shuffle=shuffle))
    soup.score(DataLoader(Noisy(zoo.X, zoo.y), shuffle=shuffle))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_a_data_set_never_reaches_scikit_learn(zoo: Zoo, monkeypatch):
    class Endless(Rows):
        """Indexed as a list would be, it never ends."""

        def __getitem__(self, k):
            if k >= len(self):
                raise AssertionError("asked beyond the end")
            return super().__getitem__(k)

    soup = GreedySoup().fit(zoo.checkpoints, Endless(zoo.X, zoo.y))
    assert len(soup.predict(Endless(zoo.X, zoo.y))) == 60


def test_weights_of_rows(zoo: Zoo):
    weight = np.arange(60) % 3.0
    soup = MEHLSoup(max_epochs=1, random_state=0)
    plain = clone(soup).fit(zoo.checkpoints, zoo.X, zoo.y, sample_weight=weight)
    soup.fit(zoo.checkpoints, Rows(zoo.X, zoo.y), sample_weight=weight)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert soup.score(Rows(zoo.X, zoo.y), sample_weight=weight) == plain.score(
        zoo.X, zoo.y, sample_weight=weight
    )


def test_the_key_of_the_targets_may_be_named(zoo: Zoo):
    data = Named(zoo.X, zoo.y, "digit")
    soup = GreedySoup().fit(zoo.checkpoints, data, "digit")
    assert soup.score(data, "digit") == GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y).score(
        zoo.X, zoo.y
    )
    with pytest.raises(ValueError, match="have no 'number', but only 'x', 'digit'"):
        GreedySoup().fit(zoo.checkpoints, data, "number")
    with pytest.raises(ValueError, match="names a key, but batches are a list"):
        GreedySoup().fit(zoo.checkpoints, Rows(zoo.X, zoo.y), "digit")


def test_the_key_of_the_targets_named_in_fit_is_no_input(zoo: Zoo):
    data = datasets.Dataset.from_dict({"x": zoo.X.tolist(), "cls": zoo.y.tolist()})
    loader = DataLoader(data.with_format("torch"), batch_size=7)
    soup = GreedySoup().fit(zoo.checkpoints, data, y="cls")
    expected = soup.predict_proba({"x": zoo.X})
    for X in (data, loader, data.remove_columns("cls"), {"x": zoo.X, "cls": zoo.y}):
        assert (soup.predict_proba(X) == expected).all()
    assert soup.score(data, zoo.y) == soup.score(data, "cls")
    with pytest.raises(ValueError, match=r"got a mapping with 'x', 'class', expected .* 'x'"):
        soup.predict(data.rename_column("cls", "class"))
    again = clone(soup).fit(zoo.checkpoints, data.rename_column("cls", "label"))
    for other in (again, soup.fit(zoo.checkpoints, {"x": zoo.X}, zoo.y)):
        with pytest.raises(ValueError, match=r"got a mapping with 'x', 'cls', expected .* 'x'"):
            other.predict(data)


def test_batches_without_targets(zoo: Zoo):
    loader = DataLoader(TensorDataset(torch.as_tensor(zoo.X)), batch_size=7)
    with pytest.raises(ValueError, match="requires y"):
        GreedySoup().fit(zoo.checkpoints, loader)
    soup = GreedySoup().fit(zoo.checkpoints, loader, zoo.y)
    assert len(soup.predict(loader)) == 60
    with pytest.raises(ValueError, match="score needs y"):
        soup.score(loader)


def test_batches_that_differ(zoo: Zoo):
    batches = iter([(torch.ones(3, 4), torch.zeros(3)), (torch.ones(3, 5), torch.zeros(3))])
    with pytest.raises(
        ValueError, match=r"Batches differ: some have rows of shape \[\(4,\)\].*Pad"
    ):
        GreedySoup().fit(zoo.checkpoints, batches)


def test_batches_of_text(zoo: Zoo):
    batches = iter([(["some", "text"], torch.zeros(2))])
    with pytest.raises(TypeError, match="Tokenize texts"):
        GreedySoup().fit(zoo.checkpoints, batches)


def test_images_as_uint8_are_converted_on_the_device(zoo: Zoo):
    torch.manual_seed(0)
    X = torch.randint(0, 256, (60, 4), dtype=torch.uint8)
    checkpoints = CheckpointCollection(around(PlainNet(), 4, 0.3), module=PlainNet)
    soup = MEHLSoup(max_epochs=1, random_state=0)
    plain = clone(soup).fit(checkpoints, X / 255, zoo.y)
    soup.set_params(forward=lambda module, rows: module(rows / 255))
    soup.fit(checkpoints, TensorDataset(X, torch.as_tensor(zoo.y)))
    assert np.array_equal(soup.coef_, plain.coef_)
    assert (soup.predict(X) == plain.predict(X / 255)).all()


def test_two_inputs_and_targets(zoo: Zoo):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = PlainNet()

        def forward(self, a, b):
            return self.net(torch.cat([a, b], dim=1))

    torch.manual_seed(0)
    checkpoints = CheckpointCollection(around(Two(), 3, 0.2))
    X, y = torch.as_tensor(zoo.X), torch.as_tensor(zoo.y)
    soup = GreedySoup().fit(checkpoints, TensorDataset(X[:, :1], X[:, 1:], y))
    plain = GreedySoup().fit(checkpoints, (X[:, :1], X[:, 1:]), y)
    assert np.array_equal(soup.coef_, plain.coef_)
    expected = plain.predict((X[:, :1], X[:, 1:]))
    for data in (TensorDataset(X[:, :1], X[:, 1:], y), TensorDataset(X[:, :1], X[:, 1:])):
        assert (soup.predict(DataLoader(data, batch_size=8)) == expected).all()


def test_a_search_takes_a_data_set(zoo: Zoo):
    net = NeuralNetClassifier(
        PlainNet(), criterion=nn.CrossEntropyLoss, max_epochs=1, verbose=0, train_split=None
    )
    search = SoupSearchCV(net, {"lr": [0.01, 0.1]}, n_iter=2, random_state=0)
    assert search.fit(Rows(zoo.X, zoo.y)).predict(zoo.X).shape == (60,)


def test_targets_given_apart_need_rows_in_order(zoo: Zoo):
    loader = DataLoader(TensorDataset(torch.as_tensor(zoo.X)), batch_size=7, shuffle=True)
    with pytest.raises(ValueError, match="shuffles"):
        GreedySoup().fit(zoo.checkpoints, loader, zoo.y)
    soup = GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(ValueError, match="shuffles"):
        soup.score(loader, zoo.y)


@pytest.mark.parametrize("soup", [GreedySoup(batch_size=25), CheckpointEnsemble(batch_size=25)])
def test_to_predict_a_loader_is_walked_once_and_not_held(zoo: Zoo, soup):
    """Whatever its batches, the module is fed minibatches of batch_size rows, a few in memory."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def batches():
        nonlocal most
        for start in range(0, 60, 4):
            batch = torch.as_tensor(zoo.X[start : start + 4])
            alive.append(weakref.ref(batch))
            most = max(most, sum(ref() is not None for ref in alive))
            yield batch, torch.as_tensor(zoo.y[start : start + 4])

    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    assert (soup.predict_proba(batches()) == soup.predict_proba(zoo.X)).all()
    if isinstance(soup, GreedySoup):
        assert most <= 3
    alive.clear()
    assert soup.score(batches()) == soup.score(zoo.X, zoo.y)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_minibatches_cut_anew(sizes, size):
    """For any sizes of a loader's batches: all rows in order, all but the last of ``size`` rows."""
    if not sum(sizes):
        return
    rows = torch.arange(sum(sizes))
    given_ = ((part, -part) for part in rows.split(sizes))
    got = list(minibatches(given_, None, size, ordered=True, n_inputs=None))
    assert torch.equal(torch.cat([X for X, _ in got]), rows)
    assert torch.equal(torch.cat([y for _, y in got]), -rows)
    assert all(len(X) == len(y) == size for X, y in got[:-1])
    assert 1 <= len(got[-1][0]) <= size


def test_a_data_set_of_the_hub(tmp_path):
    """A real `datasets.Dataset` of text, tokenized with ``map``, its other columns dropped."""
    texts = ["a good soup", "a bad broth", "good bread", "bad wine", "very good", "so bad"] * 4
    labels = [1, 0, 1, 0, 1, 0] * 4
    words = {word: k for k, word in enumerate(sorted({w for t in texts for w in t.split()}), 1)}

    def tokenize(row):
        ids = [words[word] for word in row["text"].split()]
        return {"input_ids": (ids + [0] * 3)[:3], "attention_mask": ([1] * len(ids) + [0] * 3)[:3]}

    data = datasets.Dataset.from_dict({"text": texts, "label": labels})
    tokens = data.map(tokenize, remove_columns="text")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    for name, tuned in zip("abc", around(model, 3, 0.005), strict=True):
        tuned.save_pretrained(tmp_path / name)
    checkpoints = CheckpointCollection.from_path(tmp_path)
    arrays = {name: np.array(tokens[name]) for name in ("input_ids", "attention_mask")}
    soup = MEHLSoup(max_epochs=2, random_state=0)
    plain = clone(soup).fit(checkpoints, arrays, labels)
    soup.fit(checkpoints, tokens)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert (soup.predict_proba(tokens) == plain.predict_proba(arrays)).all()
    assert soup.score(tokens) == plain.score(arrays, labels)
    with pytest.raises(TypeError, match="Tokenize texts and remove other columns"):
        clone(soup).fit(checkpoints, data)
    shuffled = clone(soup).fit(checkpoints, tokens.shuffle(seed=0))  # an order of its own: fine
    assert shuffled.score(tokens.shuffle(seed=0)) == shuffled.score(tokens)


class Sum(nn.Module):
    """Takes two inputs, by name or by position."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, a, b):
        return self.a(a) - self.b(b)


def test_inputs_by_name_may_come_in_any_order(zoo: Zoo):
    torch.manual_seed(0)
    X = {"a": zoo.X, "b": zoo.X[:, ::-1].copy()}
    other = {name: X[name] for name in ("b", "a")}
    checkpoints = CheckpointCollection(around(Sum(), 3, 0.5))
    soup = GreedySoup().fit(checkpoints, X, zoo.y)
    hub = datasets.Dataset.from_dict({name: part.tolist() for name, part in other.items()})
    for rows in (other, hub, DataLoader(hub.with_format("torch"), batch_size=7)):
        assert (soup.predict_proba(rows) == soup.predict_proba(X)).all()
        assert soup.score(rows, zoo.y) == soup.score(X, zoo.y)
    with pytest.raises(
        ValueError, match="different inputs than in fit: got a mapping with 'a', 'c"
    ):
        soup.predict({"a": zoo.X, "c": zoo.X})
    with pytest.raises(ValueError, match="different inputs than in fit"):
        soup.predict((X["a"], X["b"]))


class Ragged(Named):
    """Texts of several lengths that nobody padded."""

    def __getitem__(self, k):
        return {"x": torch.ones(3 + k % 2), "label": torch.tensor(0)}


@pytest.mark.parametrize("kind", ["lists", "tensors", "columns", "numpy", "torch", "plain"])
def test_a_data_set_of_the_hub_keeps_its_transform_and_its_columns(zoo: Zoo, kind):
    least, most = zoo.X.min(), zoo.X.max()
    stored = np.round(255 * (zoo.X - least) / (most - least)).astype(np.int64)
    X = (stored / 255 * (most - least) + least).astype(np.float32)

    def transform(batch):  # as the processor of a model does it
        rows = np.array(batch["pixels"]) / 255 * (most - least) + least
        rows = rows.astype(np.float32)
        return {"x": rows.tolist() if kind == "lists" else torch.tensor(rows), "label": batch["y"]}

    if kind in ("lists", "tensors"):
        rows = datasets.Dataset.from_dict({"pixels": stored.tolist(), "y": zoo.y.tolist()})
        rows.set_transform(transform)
    else:
        columns = {"x": X.tolist(), "label": zoo.y.tolist(), "path": ["a.png"] * len(X)}
        rows = datasets.Dataset.from_dict(columns)
        used = {} if kind == "plain" else {"columns": ["x", "label"]}
        rows = rows.with_format(None if kind in ("plain", "columns") else kind, **used)
        rows = rows.remove_columns("path") if kind == "plain" else rows
    checkpoints = zoo.checkpoints
    plain = GreedySoup().fit(checkpoints, {"x": X}, zoo.y)
    soup = GreedySoup().fit(checkpoints, rows)
    assert soup.individual_scores_ == plain.individual_scores_
    assert soup.score(rows) == plain.score({"x": X}, zoo.y)
    assert np.array_equal(soup.predict(rows), plain.predict({"x": X}))


def test_rows_of_several_lengths(zoo: Zoo):
    hub = datasets.Dataset.from_dict({"x": [[1.0, 2.0, 3.0], [1.0, 2.0]], "label": [0, 1]})
    for X in (Ragged(zoo.X, zoo.y), DataLoader(Ragged(zoo.X, zoo.y), batch_size=4), hub):
        with pytest.raises(ValueError, match=r"different shapes.*\[3\].*Pad texts.*collate_fn"):
            UniformSoup().fit(zoo.checkpoints, X)


def test_another_error_of_a_data_set_is_its_own(zoo: Zoo):
    class Broken(Named):
        def __getitem__(self, k):
            raise RuntimeError("no such row")

    with pytest.raises(RuntimeError, match="no such row"):
        UniformSoup().fit(zoo.checkpoints, Broken(zoo.X, zoo.y))


class Backwards(SequentialSampler):
    """A sampler of the user's."""

    def __iter__(self):
        return iter(range(len(self.data_source) - 1, -1, -1))


class Forwards(Backwards):
    def __iter__(self):
        return iter(range(len(self.data_source)))


class Endless(Backwards):
    def __iter__(self):
        return itertools.count()


OUT_OF_ORDER = [
    lambda rows: {"sampler": Backwards(rows)},
    lambda rows: {"sampler": Endless(rows)},
    lambda rows: {"sampler": [3, 1, 2]},
    lambda rows: {"sampler": torch.randperm(len(rows))},
    lambda rows: {"batch_sampler": [[5, 6], [0, 1]]},
    lambda rows: {"batch_sampler": BatchSampler(Backwards(rows), 7, drop_last=False)},
    lambda rows: {"batch_sampler": BatchSampler(RandomSampler(rows), 7, drop_last=False)},
    lambda rows: {"batch_size": None, "sampler": BatchSampler(Backwards(rows), 7, False)},
    lambda rows: {"sampler": DistributedSampler(rows, num_replicas=1, rank=0)},
    lambda rows: {"sampler": DistributedSampler(rows, num_replicas=2, rank=1, shuffle=False)},
]


@pytest.mark.parametrize("sampling", OUT_OF_ORDER)
def test_samplers_that_do_not_keep_the_order_need_labels_in_the_batches(zoo: Zoo, sampling):
    X, y = torch.as_tensor(zoo.X), torch.as_tensor(zoo.y)
    rows, both = TensorDataset(X), TensorDataset(X, y)
    loader = DataLoader(rows, **sampling(rows))
    refused = pytest.raises(ValueError, match=r"DataLoader .*order of the data set.*Pass a DataL")
    soup = UniformSoup(device="cpu").fit(zoo.checkpoints, zoo.X, zoo.y)
    with refused:
        UniformSoup(device="cpu").fit(zoo.checkpoints, loader, zoo.y)
    with refused:
        soup.score(loader, zoo.y)
    with refused:
        soup.predict(loader)
    if not isinstance(loader.sampler, Endless):
        soup.score(DataLoader(both, **sampling(both)))


@pytest.mark.parametrize(
    "sampling",
    [
        lambda rows: {"sampler": Forwards(rows)},
        lambda rows: {"sampler": range(len(rows))},
        lambda rows: {"batch_sampler": torch.arange(len(rows)).split(7)},
        lambda rows: {"batch_sampler": [list(range(50)), list(range(50, len(rows)))]},
        lambda rows: {"batch_size": None, "sampler": BatchSampler(Forwards(rows), 7, False)},
    ],
)
def test_samplers_that_keep_the_order_are_read(zoo: Zoo, sampling):
    rows = TensorDataset(torch.as_tensor(zoo.X))
    soup = UniformSoup(device="cpu").fit(zoo.checkpoints, zoo.X, zoo.y)
    loader = DataLoader(rows, **sampling(rows))
    np.testing.assert_array_equal(soup.predict(loader), soup.predict(zoo.X))
    assert soup.score(loader, zoo.y) == soup.score(zoo.X, zoo.y)


def test_a_list_of_some_rows_in_order_is_read(zoo: Zoo):
    soup = UniformSoup(device="cpu").fit(zoo.checkpoints, zoo.X, zoo.y)
    loader = DataLoader(TensorDataset(torch.as_tensor(zoo.X)), sampler=[1, 5, 9])
    np.testing.assert_array_equal(soup.predict(loader), soup.predict(zoo.X[[1, 5, 9]]))


def test_an_iterator_as_a_sampler_is_refused_and_not_consumed(zoo: Zoo):
    rows = TensorDataset(torch.as_tensor(zoo.X))
    sampler = iter(range(len(rows)))
    soup = UniformSoup(device="cpu").fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(ValueError, match="order of the data set"):
        soup.predict(DataLoader(rows, sampler=sampler))
    assert next(sampler) == 0


def test_rows_of_small_batches_are_copied_once(monkeypatch):
    copied = []
    inner = loaders._concatenate
    monkeypatch.setattr(
        loaders, "_concatenate", lambda parts: copied.append(sum(map(len, parts))) or inner(parts)
    )
    X = torch.arange(1000.0)[:, None]
    for size in (1, 7, 64, 1000, 5000):
        copied.clear()
        found = [
            rows
            for rows, _ in minibatches(
                DataLoader(X, batch_size=3), None, size, ordered=True, n_inputs=None
            )
        ]
        assert torch.equal(torch.cat(found), X)
        assert {len(rows) for rows in found[:-1]} <= {size}
        assert sum(copied) <= 2 * len(X) + 3


@pytest.mark.parametrize("named", [False, True])
def test_inputs_of_integers_of_several_widths_are_no_texts(zoo: Zoo, named):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ids, self.cat = nn.Embedding(5, 3), nn.Embedding(5, 3)

        def forward(self, input_ids: torch.Tensor, cat: torch.Tensor) -> torch.Tensor:
            return self.ids(input_ids).mean(1) + self.cat(cat).mean(1)

    ids, cat, y = torch.arange(80).view(10, 8) % 5, torch.arange(30).view(10, 3) % 5, zoo.y[:10] % 3
    X = {"input_ids": ids, "cat": cat} if named else (ids, cat)
    soup = UniformSoup(batch_size=4).fit(CheckpointCollection([Two()]), X, y)
    rows = [
        ({"input_ids": ids[k], "cat": cat[k]}, y[k]) if named else (ids[k], cat[k], y[k])
        for k in range(10)
    ]
    loader = DataLoader(rows, batch_size=3)
    expected = soup.mean_log_likelihood(X, y)
    assert soup.mean_log_likelihood(loader) == pytest.approx(expected, abs=1e-6)
    assert soup.score(loader) == soup.score(X, y)
