"""Every estimator meets every invariant."""

from __future__ import annotations

import pickle
import random
import re
from inspect import signature

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from sksoup import (
    CheckpointCollection,
    CheckpointEnsemble,
    CheckpointError,
    ModelStockSoup,
    PrunedSoup,
    Recipe,
    SoupWarning,
    mix,
)
from sksoup.inspection import interpolation_path, paper_systems
from sksoup.model_selection import SoupSearchCV

from ..zoo import Net, Zoo, make_states, make_zoo, same_tensors

SYSTEMS = {
    name: soup.set_params(batch_size=25, **({"max_epochs": 2} if hasattr(soup, "lr") else {}))
    for name, soup in paper_systems(7, random_state=0).items()
} | {
    "Pruned-Soup": PrunedSoup(batch_size=25),
    "Model-Stock": ModelStockSoup(start="checkpoint0", batch_size=25),
}
SOUPS = {name: soup for name, soup in SYSTEMS.items() if name != "Ensemble"}
ORDER_FREE = [
    "Uniform-Soup",
    "Best checkpoint",
    "Learned-Soup",
    "Learned-Soup+",
    "HL-Soup",
    "HL-Soup+",
]

SWITCHES = [
    (kind, name)
    for kind in (*dict.fromkeys(map(type, SYSTEMS.values())), SoupSearchCV)
    for name, parameter in signature(kind).parameters.items()
    if isinstance(parameter.default, bool)
]

every_system = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
every_soup = pytest.mark.parametrize("system", SOUPS.values(), ids=SOUPS)


def by_module(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize(("kind", "name"), SWITCHES)
@pytest.mark.parametrize("value", ["no", "False", ["a"], 0, 1, None])
def test_switches_are_true_or_false(kind, name, value, zoo: Zoo):
    message = rf"^{name} must be True(,| or) False.*, got {re.escape(repr(value))}\.$"
    with pytest.raises(TypeError, match=message):
        kind(**{name: value}).fit(zoo.checkpoints, zoo.X, zoo.y)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (*switch, value)
        for switch in SWITCHES
        for value in (False, True)
        if (switch[1], value) != ("compile", True)  # which takes a compiler, and a minute
    ],
)
def test_switches_may_be_those_of_numpy(kind, name, value, zoo: Zoo, tmp_path):
    given = {"max_epochs": 1, "random_state": 0, "memory": tmp_path, "start": "checkpoint0"}
    settings = {key: given[key] for key in given if key in signature(kind).parameters}
    soups = [
        kind(**{name: switch}, **settings).fit(zoo.checkpoints, zoo.X, zoo.y)
        for switch in (value, np.bool_(value))
    ]
    assert np.array_equal(*(soup.coef_ for soup in soups))
    assert soups[1].counts_.n_backward == 0  # replayed: the same to the cache


@every_system
@settings(max_examples=12)
@given(
    n=st.integers(1, 6),
    layerwise=st.sampled_from([False, True, by_module]),
    b=st.sampled_from([1, 2, 4, None, "auto"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_coefficients_sum_to_one_and_give_the_weights(system, n, layerwise, b, seed):
    zoo = make_zoo(n, seed % 50)
    soup = clone(system)
    given_ = {"layerwise": layerwise, "model_batch_size": b, "random_state": seed}
    soup.set_params(**{k: v for k, v in given_.items() if k in soup.get_params()})
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    np.testing.assert_allclose(soup.coef_.sum(axis=-1), 1, rtol=0, atol=1e-9)
    assert soup.coef_.dtype == np.float64
    is_layerwise = bool(getattr(soup, "layerwise", False))
    assert soup.coef_.shape == ((len(soup.layer_names_), n) if is_layerwise else (n,))
    assert set(soup.layers_) == set(zoo.checkpoints.layout)
    if not isinstance(soup, CheckpointEnsemble):
        mixed = mix(zoo.checkpoints, soup.coef_, layers=soup.layers_)
        assert same_tensors(soup.state_dict(), mixed)
        assert same_tensors(soup.recipe_.cook(zoo.checkpoints), mixed)


@pytest.mark.filterwarnings("ignore:.*has the same parameters as the start")  # they do
@every_soup
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_copies_of_one_checkpoint_give_exactly_it(system, n, dtype):
    zoo = make_zoo(1, seed=0)
    state = make_states(1, seed=0, dtype=dtype)[0]
    copies = CheckpointCollection([state] * n, module=Net)
    soup = clone(system).fit(copies, zoo.X, zoo.y)
    assert same_tensors(soup.state_dict(), state)


@every_soup
def test_half_precision_checkpoints_come_back_in_their_dtype(system):
    zoo = make_zoo(1, seed=0)
    checkpoints = CheckpointCollection(make_states(4, 0, torch.bfloat16), module=Net)
    soup = clone(system).fit(checkpoints, zoo.X, zoo.y)
    assert soup.state_dict()["head.weight"].dtype == torch.bfloat16
    assert same_tensors(soup.state_dict(), mix(checkpoints, soup.coef_, layers=soup.layers_))


@pytest.mark.parametrize("name", ORDER_FREE)
@settings(max_examples=8)
@given(order=st.permutations(range(5)))
def test_permuting_checkpoints_permutes_coefficients(name, order):
    states = make_states(5, seed=1, dtype=torch.float64, batch_norm=False)
    zoo = make_zoo(5, seed=1, dtype=torch.float64, batch_norm=False)
    names = [f"ft{k}" for k in range(5)]
    module = zoo.checkpoints.module
    system = clone(SYSTEMS[name])
    plain = system.fit(CheckpointCollection(states, names=names, module=module), zoo.X, zoo.y).coef_
    if name == "Best checkpoint":  # of several best ones the first is kept
        scores = sorted(system.individual_scores_.values())
        assume(scores[-1] > scores[-2])
    permuted = clone(system).fit(
        CheckpointCollection(
            [states[k] for k in order], names=[names[k] for k in order], module=module
        ),
        zoo.X,
        zoo.y,
    )
    np.testing.assert_allclose(permuted.coef_, plain[..., list(order)], rtol=0, atol=1e-9)


@every_soup
def test_saved_loaded_cooked_and_pickled(system, zoo: Zoo, tmp_path):
    checkpoints = zoo.checkpoints.save(tmp_path / "zoo")
    soup = clone(system).fit(checkpoints, zoo.X, zoo.y)
    path = tmp_path / "soup.safetensors"
    soup.save(path)
    saved = CheckpointCollection([path])["soup"]
    assert same_tensors({name: saved[name] for name in soup.state_dict()}, soup.state_dict())
    cooked = Recipe.load(path).cook(CheckpointCollection.from_path(tmp_path / "zoo"))
    assert same_tensors(cooked, soup.state_dict())
    again = pickle.loads(pickle.dumps(soup))
    assert (again.predict(zoo.X) == soup.predict(zoo.X)).all()
    fresh = Net().eval()
    fresh.load_state_dict(soup.state_dict())
    with torch.no_grad():
        logits = fresh(torch.as_tensor(zoo.X))
    assert (soup.classes_[logits.argmax(1).numpy()] == soup.predict(zoo.X)).all()


@every_system
def test_predictions(system, zoo: Zoo):
    soup = clone(system).fit(zoo.checkpoints, zoo.X, zoo.y)
    p = soup.predict_proba(zoo.X)
    assert p.dtype == np.float32
    assert p.shape == (60, 3)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
    assert (soup.classes_[p.argmax(axis=1)] == soup.predict(zoo.X)).all()
    assert soup.score(zoo.X, zoo.y) == np.mean(soup.predict(zoo.X) == zoo.y)
    assert (soup.predict(torch.as_tensor(zoo.X)) == soup.predict(zoo.X)).all()


@every_system
@pytest.mark.parametrize("seed", [None, 0])
def test_global_random_state_stays_as_it_was(system, seed, zoo: Zoo, tmp_path):
    def state():
        numpy = np.random.get_state()
        return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2], random.getstate()

    soup = clone(system)
    if "random_state" in soup.get_params():
        soup.set_params(random_state=seed)
    before = state()
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    soup.predict_proba(zoo.X)
    soup.score(zoo.X, zoo.y)
    if hasattr(soup, "save"):
        soup.save(tmp_path / "soup.safetensors")
        soup.recipe_.cook(zoo.checkpoints)
    assert state() == before


@every_system
def test_parameters_are_kept_and_fitting_twice_is_fitting_once(system, zoo: Zoo):
    soup = clone(system).set_params(checkpoints=zoo.checkpoints)
    parameters = soup.get_params()
    first = soup.fit(zoo.X, zoo.y).coef_
    second = soup.fit(zoo.X, zoo.y).coef_
    assert soup.get_params() == parameters
    assert np.array_equal(first, second)


@every_system
def test_tied_parameters_stay_tied(system):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(4, 4)
            self.b = torch.nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.b(self.a(x).relu()).relu())

    torch.manual_seed(0)
    zoo = make_zoo(1, seed=0)
    checkpoints = CheckpointCollection([Tied() for _ in range(4)], module=Tied)
    soup = clone(system).fit(checkpoints, zoo.X, zoo.y)
    soup.predict(zoo.X)
    if hasattr(soup, "module_"):
        assert soup.module_.a.weight is soup.module_.b.weight
        state = soup.state_dict()
        assert torch.equal(state["a.weight"], state["b.weight"])
        assert same_tensors(state, mix(checkpoints, soup.coef_, layers=soup.layers_))


def test_numbers_as_texts_are_warned_of():
    """Once '10' was the third of eleven classes without a word."""
    X, y = np.zeros((22, 4), np.float32), np.array([str(k % 11) for k in range(22)])
    checkpoints = CheckpointCollection([torch.nn.Linear(4, 11) for _ in range(2)])
    system = SYSTEMS["Uniform-Soup"]
    with pytest.warns(SoupWarning, match=r"'0', '1', '10', \.\.\.\. If the outputs"):
        clone(system).fit(checkpoints, X, y)
    for labels, classes in ((y.astype(int), None), (y, [str(k) for k in range(11)])):
        soup = clone(system).set_params(classes=classes).fit(checkpoints, X, labels)
        assert not any("numbers as texts" in said for said in soup.warnings_)


def test_minus_100_is_no_class():
    X, y = np.zeros((20, 4), np.float32), np.array([0, -100] * 10)
    checkpoints = CheckpointCollection([torch.nn.Linear(4, 2) for _ in range(2)])
    with pytest.raises(ValueError, match=r"y holds -100, .*Remove these rows, or pass classes="):
        clone(SYSTEMS["Uniform-Soup"]).fit(checkpoints, X, y)
    clone(SYSTEMS["Uniform-Soup"]).set_params(classes=[-100, 0]).fit(checkpoints, X, y)


class TiedNet(torch.nn.Module):
    """Three names of one weight."""

    def __init__(self):
        super().__init__()
        self.z = torch.nn.Linear(4, 3, bias=False)
        self.a = torch.nn.Linear(4, 3, bias=False)
        self.m = torch.nn.Linear(4, 3, bias=False)
        self.a.weight = self.m.weight = self.z.weight

    def forward(self, x):
        return self.a(x) + self.m(x) + self.z(x)


@every_system
def test_tied_names_with_different_values_are_refused_before_a_search(system):
    """Once, the last name won: what was scored and saved was no mix of the checkpoints."""

    torch.manual_seed(0)
    zoo, same = make_zoo(1, seed=0), TiedNet().state_dict()
    for name in ("z.weight", "a.weight", "m.weight"):
        checkpoints = CheckpointCollection([same, {**same, name: same[name] * 3}], module=TiedNet)
        with pytest.raises(
            CheckpointError, match=r"'checkpoint1' .*'a.weight' and '[mz].weight' a"
        ):
            clone(system).fit(checkpoints, zoo.X, zoo.y)


def test_a_start_whose_tied_names_differ_is_refused():
    zoo = make_zoo(1, seed=0)
    checkpoints = CheckpointCollection([TiedNet(), TiedNet()], module=TiedNet)
    soup = clone(SYSTEMS["Uniform-Soup"]).fit(checkpoints, zoo.X, zoo.y)
    start = {**TiedNet().state_dict(), "m.weight": torch.ones(3, 4)}
    with pytest.raises(CheckpointError, match=r"'start' does not fit .*'a.weight' and 'm.weight'"):
        soup.interpolate(start, 0.5)
    with pytest.raises(CheckpointError, match=r"'start' does not fit .*'a.weight' and 'm.weight'"):
        interpolation_path(start, soup, zoo.X, zoo.y)


def test_a_tied_name_may_be_missing_from_the_files():
    states = [{"a.weight": TiedNet().a.weight.detach()} for _ in range(3)]
    zoo = make_zoo(1, seed=0)
    soup = clone(SYSTEMS["MEHL-Soup+"]).fit(
        CheckpointCollection(states, module=TiedNet), zoo.X, zoo.y
    )
    assert list(soup.state_dict()) == ["a.weight"]
    assert torch.equal(soup.module_.m.weight, soup.state_dict()["a.weight"])


@every_system
def test_sample_weight_zero_is_leaving_the_row_out_of_the_score(system, zoo: Zoo):
    weight = np.r_[np.ones(40), np.zeros(20)]
    soup = clone(system).fit(zoo.checkpoints, zoo.X, zoo.y, sample_weight=weight)
    if "individual_scores_" in vars(soup):
        plain = clone(system).fit(zoo.checkpoints, zoo.X[:40], zoo.y[:40])
        assert soup.individual_scores_ == plain.individual_scores_
        assert np.array_equal(soup.coef_, plain.coef_)
