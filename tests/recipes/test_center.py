"""Searches from a good point: its coefficients, bounded deltas, and the comparison at the end."""

from __future__ import annotations

import warnings
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    DivergenceError,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    SoupWarning,
    mix,
)
from sksoup.engine.center import Anchor, clip_factors
from sksoup.mixing.layers import group_layers
from sksoup.recipes.center import Chosen

from ..references import descent_reference, stacked
from ..zoo import Net64, PaperMEHL, Zoo, make_states, reads, same_tensors

STANDING = {"lr": 1e-12, "max_epochs": 1, "random_state": 0}  # does not leave the center
CENTERS = ("top", "best", "greedy")


def ruined(zoo: Zoo, scale: float = 20.0, place: int = 2) -> CheckpointCollection:
    """One checkpoint of the zoo with noise of ``scale`` times each tensor's root mean square."""
    generator = torch.Generator().manual_seed(0)
    states = [dict(zoo.checkpoints[name]) for name in zoo.checkpoints]
    states[place] = {
        name: w + scale * w.square().mean().sqrt() * torch.randn(w.shape, generator=generator).abs()
        if w.is_floating_point()
        else w
        for name, w in states[place].items()
    }
    return CheckpointCollection(states, module=zoo.checkpoints.build_module)


def quietly(soup, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)
        return soup.fit(*args, **kwargs)


# ------------------------------------------------------------------------- the arithmetic


coefficients = st.lists(st.floats(-2, 2), min_size=1, max_size=6).filter(
    lambda q: abs(sum(q)) > 0.1
)


@given(q=coefficients, seed=st.integers(0, 999), n_layers=st.integers(1, 4))
def test_rows_sum_to_one_for_any_center_and_bound(q, seed, n_layers):
    rng = np.random.default_rng(seed)
    lengths = rng.exponential(size=(len(q), n_layers)) * rng.integers(0, 2, (len(q), n_layers))
    alpha = clip_factors(lengths) * rng.normal(size=(len(q), n_layers))
    anchor = Anchor(np.array(q), clips=True)
    coef = anchor.affine_coef(alpha.T)
    np.testing.assert_allclose(coef.sum(axis=1), 1, rtol=0, atol=1e-9)
    np.testing.assert_allclose(anchor.affine_coef(0 * alpha.T), np.tile(anchor.q, (n_layers, 1)))


@given(n=st.integers(1, 100), seed=st.integers(0, 99))
def test_the_center_of_the_paper_has_exactly_one_over_k(n, seed):
    alpha = np.random.default_rng(seed).normal(size=(2, n))
    expected = alpha + (1 - alpha.sum(axis=1, keepdims=True)) / n
    assert np.array_equal(Anchor.mean(n).affine_coef(alpha), expected)
    assert np.array_equal(Anchor.mean(n).q, np.full(n, 1 / n))


# a length is the root of a square, so it is 0 or no smaller than that of the least number
measured_lengths = st.just(0.0) | st.floats(1e-150, 1e6)


@given(st.lists(st.lists(measured_lengths, min_size=3, max_size=3), min_size=1, max_size=7))
def test_factors_leave_no_delta_longer_than_the_median(lengths):
    lengths = np.array(lengths)
    factors = clip_factors(lengths)
    assert ((factors > 0) & (factors <= 1)).all()
    for length, factor in zip(lengths.T, factors.T, strict=True):
        moves = length > 0
        assert (factor[~moves] == 1).all()
        if moves.any():
            usual = np.median(length[moves])
            np.testing.assert_allclose((length * factor)[moves], np.minimum(length[moves], usual))


# -------------------------------------------------------------- against the slow version


def lengths_reference(checkpoints: CheckpointCollection, layers, q) -> np.ndarray:
    """(K, n_searched), tensor by tensor from the stacked weights."""
    squares = np.zeros((len(checkpoints), len(layers.names)))
    for name, w in stacked(checkpoints).items():
        if w.is_floating_point():
            w = w.double()
            delta = w - torch.tensordot(torch.as_tensor(q), w, dims=1)
            squares[:, layers.rows[name]] += delta.flatten(1).square().sum(1).numpy()
    for row, averaged in enumerate(layers.averaged, start=layers.n_searched):
        for one in averaged:
            squares[:, one] += squares[:, row]
    return np.sqrt(squares[:, : layers.n_searched])


@settings(max_examples=15)
@given(
    layerwise=st.booleans(),
    seed=st.integers(0, 99),
    clips=st.booleans(),
    weight_decay=st.sampled_from([0.0, 1.0]),
    n_mixed=st.integers(1, 3),
)
def test_the_slow_script_of_the_formula_agrees(
    zoo64, layerwise, seed, clips, weight_decay, n_mixed
):
    checkpoints, K = zoo64.checkpoints, len(zoo64.checkpoints)
    rng = np.random.default_rng(seed)
    q = np.zeros(K)
    q[rng.permutation(K)[:n_mixed]] = 1 / n_mixed
    layers = group_layers(checkpoints.build_module(), checkpoints.layout, layerwise)
    s = np.ones((K, layers.n_searched))
    if clips:
        s = clip_factors(lengths_reference(checkpoints, layers, q))
    alpha = torch.zeros(layers.n_searched, K, dtype=torch.float64, requires_grad=True)
    S, Q = torch.as_tensor(s.T), torch.as_tensor(q)

    def coef():
        moved = alpha * S
        return moved + (1 - moved.sum(1, keepdim=True)) * Q

    reference = descent_reference(
        checkpoints, torch.as_tensor(zoo64.X).double(), torch.as_tensor(zoo64.y), coef, [alpha],
        layerwise=layerwise, lr=0.1, max_epochs=3, batch_size=32, schedule="cosine",
        weight_decay=weight_decay,
    )  # fmt: skip
    soup = MEHLSoup(
        center=q, clip_deltas="median" if clips else None, weight_decay=weight_decay,
        model_batch_size=None, layerwise=layerwise, lr=0.1, max_epochs=3, batch_size=32,
        shuffle=False, random_state=0,
    )  # fmt: skip
    with patch.object(Chosen, "checked", lambda self, found, problem: found):  # the search alone
        soup.fit(checkpoints, zoo64.X, zoo64.y)
    np.testing.assert_allclose(np.atleast_2d(soup.coef_), reference, rtol=0, atol=1e-8)


@pytest.mark.parametrize("b", [1, 2, None])
def test_a_center_of_equal_coefficients_is_searched_as_the_mean(zoo: Zoo, b):
    K = len(zoo.checkpoints)
    how = {"model_batch_size": b, "layerwise": True, "random_state": 0, "max_epochs": 2}
    paper = PaperMEHL(**how).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert not hasattr(paper, "held_out_scores_")
    given_mean = MEHLSoup(center=np.full(K, 1 / K), clip_deltas=None, weight_decay=0, **how)
    with patch.object(Chosen, "checked", lambda self, found, problem: found):  # the search alone
        given_mean.fit(zoo.checkpoints, zoo.X, zoo.y)
    np.testing.assert_allclose(given_mean.coef_, paper.coef_, rtol=0, atol=1e-6)
    assert np.array_equal(paper.center_, np.full(K, 1 / K))


# --------------------------------------------------------------------- where it begins


@pytest.mark.parametrize("b", [1, 2, None])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_it_begins_at_the_center(zoo: Zoo, tmp_path, b, layerwise, center, on_disk):
    checkpoints = zoo.checkpoints.save(tmp_path) if on_disk else zoo.checkpoints
    soup = MEHLSoup(center=center, ranking_rows=None, model_batch_size=b, layerwise=layerwise,
                    **STANDING)  # fmt: skip
    quietly(soup, checkpoints, zoo.X, zoo.y)
    scores = BestCheckpoint().fit(checkpoints, zoo.X, zoo.y).individual_scores_
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    n_top = -(-len(ranked) // 4)
    kept = {
        "best": ranked[:1],
        "top": ranked[:n_top],
        "greedy": quietly(GreedySoup(), checkpoints, zoo.X, zoo.y).ingredients_,
    }[center]
    q = np.array([name in kept for name in checkpoints]) / len(kept)
    np.testing.assert_allclose(soup.center_, q, rtol=0, atol=1e-15)
    assert soup.score(zoo.X, zoo.y) == max(soup.held_out_scores_.values())
    # the weights that were searched from are those of the center, not only the coefficients
    module = checkpoints.build_module().eval()
    module.load_state_dict(mix(checkpoints, q), strict=False)
    outputs = module(torch.as_tensor(zoo.X, dtype=torch.float32))
    expected = float(nn.functional.cross_entropy(outputs, torch.as_tensor(zoo.y)).detach())
    assert soup.history_[0]["loss"][0] == pytest.approx(expected, rel=1e-5)
    mixed = mix(checkpoints, soup.coef_, layers=soup.layers_)
    assert same_tensors(soup.state_dict(), mixed)


def test_a_center_may_be_given(zoo: Zoo):
    q = np.array([0.5, 0.75, -0.25, *[0.0] * (len(zoo.checkpoints) - 3)])
    soup = quietly(MEHLSoup(center=q, **STANDING), zoo.checkpoints, zoo.X, zoo.y)
    np.testing.assert_allclose(soup.center_, q, atol=1e-15)
    np.testing.assert_allclose(soup.coef_, q, atol=1e-9)
    soup = quietly(MEHLSoup(center=list(q), **STANDING), zoo.checkpoints, zoo.X, zoo.y)
    np.testing.assert_allclose(soup.center_, q, atol=1e-15)


def test_the_rows_that_rank_are_few_and_drawn_by_the_seed(zoo: Zoo):
    n, K = len(zoo.y), len(zoo.checkpoints)
    counts = [
        quietly(MEHLSoup(ranking_rows=rows, **STANDING), zoo.checkpoints, zoo.X, zoo.y).counts_
        for rows in (30, None)
    ]
    n_searched = n  # one epoch
    for rows, count in zip((30, n), counts, strict=True):
        assert count.rows_forward == K * rows + n_searched + 3 * n  # soup, center, best
        assert count.rows_backward == n_searched


def test_known_scores_spare_the_ranking(zoo: Zoo):
    n = len(zoo.checkpoints)
    known = CheckpointCollection(
        dict(zoo.checkpoints), module=zoo.checkpoints.build_module,
        scores={name: float(k) for k, name in enumerate(zoo.checkpoints.names)},
    )  # fmt: skip
    soup = MEHLSoup(center="best", model_batch_size=2, **STANDING)
    quietly(soup, known, zoo.X, zoo.y)
    assert soup.center_.argmax() == n - 1
    passes = -(-n // 2)  # of one epoch each; nothing was ranked; soup and center were compared
    assert soup.counts_.rows_forward == (passes + 2) * len(zoo.y)


def test_rows_set_aside_take_no_part_in_choosing_the_center(zoo: Zoo):
    """Every checkpoint is ranked on the other rows alone."""
    how = {"validation_fraction": 0.5, "ranking_rows": None, "center": "best", **STANDING}
    seen = []

    def forward(module, X):
        seen.append(len(X))
        return module(X)

    quietly(MEHLSoup(forward=forward, **how), zoo.checkpoints, zoo.X, zoo.y)
    K, half = len(zoo.checkpoints), len(zoo.y) // 2
    assert seen[1 : 1 + K] == [half] * K  # the first is one row that shows the outputs' shape


@pytest.mark.parametrize("soup", [MEHLSoup, LearnedSoup])
@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"center": "worst"}, "center must be one of 'top', 'best', 'greedy', 'mean', got 'worst'"),
        ({"center": [0.5, 0.6]}, "that sum to 1"),
        ({"center": [[0.5], [0.5]]}, "that sum to 1"),
        ({"center": [np.nan, 1.0]}, "that sum to 1"),
        ({"center": None}, "that sum to 1"),
        ({"center": [0.5, 0.5]}, "center has 2 coefficients, expected 7"),
        ({"clip_deltas": "mean"}, "clip_deltas must be one of 'median', None"),
        ({"ranking_rows": 0}, "ranking_rows"),
    ],
)
def test_bad_options(zoo: Zoo, soup, kwargs, match):
    with pytest.raises((ValueError, TypeError), match=match):
        soup(**kwargs).fit(zoo.checkpoints, zoo.X, zoo.y)


def test_a_softmax_has_no_negative_center(zoo: Zoo):
    with pytest.raises(ValueError, match="restricted to the simplex"):
        LearnedSoup(center=[1.5, -0.5, 0, 0, 0, 0, 0]).fit(zoo.checkpoints, zoo.X, zoo.y)


# ------------------------------------------------------------------- it does not lose


@pytest.mark.parametrize("recipe", [MEHLSoup, LearnedSoup])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e6])
def test_a_ruined_checkpoint_does_not_ruin_the_soup(zoo: Zoo, recipe, layerwise, scale):
    checkpoints = ruined(zoo, scale)
    best = BestCheckpoint().fit(checkpoints, zoo.X, zoo.y).score(zoo.X, zoo.y)
    soup = quietly(recipe(layerwise=layerwise, random_state=0), checkpoints, zoo.X, zoo.y)
    assert soup.score(zoo.X, zoo.y) >= best - 1e-12
    if recipe is MEHLSoup:  # not only by the comparison at the end
        assert soup.held_out_scores_["soup"] >= best - 0.1


def test_a_ruined_statistic_does_not_pass(zoo: Zoo):
    """A running variance that has grown beyond measure, under weights as they should be."""
    states = [dict(zoo.checkpoints[name]) for name in zoo.checkpoints]
    states[2]["norm.running_var"] = states[2]["norm.running_var"] * 1e6
    checkpoints = CheckpointCollection(states, module=zoo.checkpoints.build_module)
    for layerwise in (False, True):
        soup = MEHLSoup(layerwise=layerwise, random_state=0)
        quietly(soup, checkpoints, zoo.X, zoo.y)
        rows = {soup.layers_["norm.running_var"]}
        assert all(abs(np.atleast_2d(soup.coef_)[row, 2]) < 1e-3 for row in rows)


def test_what_scores_lower_than_its_center_is_replaced_and_that_is_said(zoo: Zoo):
    soup = MEHLSoup(center="greedy", optimizer="sgd", lr=1e3, schedule="constant", max_epochs=1,
                    weight_decay=0, random_state=0)  # fmt: skip
    with pytest.warns(SoupWarning, match="The soup is the center from which"):
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    greedy = quietly(GreedySoup(), zoo.checkpoints, zoo.X, zoo.y)
    scores = soup.held_out_scores_
    assert scores["soup"] < scores["center"] == soup.score(zoo.X, zoo.y)
    np.testing.assert_array_equal(soup.coef_, greedy.coef_)
    assert soup.recipe_.coef.tolist() == [soup.coef_.tolist()]
    assert soup.ingredients_ == tuple(n for n in zoo.checkpoints if n in greedy.ingredients_)


@pytest.mark.parametrize("recipe", [MEHLSoup, LearnedSoup])
def test_a_search_that_diverges_gives_its_center(zoo: Zoo, tmp_path, recipe):
    how = {"optimizer": "sgd", "lr": 1e300, "schedule": "constant", "max_epochs": 3,
           "random_state": 0}  # fmt: skip
    how |= {"weight_decay": 0.0} if recipe is MEHLSoup else {}
    soup = recipe(memory=tmp_path, **how)
    with pytest.warns(SoupWarning, match="became NaN or infinite.*The soup is the center"):
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    best = max(soup.held_out_scores_.values())
    assert soup.score(zoo.X, zoo.y) == best
    assert same_tensors(soup.state_dict(), mix(zoo.checkpoints, soup.coef_, layers=soup.layers_))
    again = quietly(recipe(memory=tmp_path, **how), zoo.checkpoints, zoo.X, zoo.y)
    assert np.array_equal(again.coef_, soup.coef_)
    with pytest.raises(DivergenceError):
        recipe(center="mean", clip_deltas=None, **how).fit(zoo.checkpoints, zoo.X, zoo.y)


# --------------------------------------------------------------------------- corner cases


@pytest.mark.parametrize("recipe", [MEHLSoup, LearnedSoup])
@pytest.mark.parametrize("center", CENTERS)
def test_one_checkpoint_and_equal_checkpoints(zoo: Zoo, recipe, center):
    state = zoo.checkpoints[zoo.checkpoints.names[0]]
    for n in (1, 3):
        equal = CheckpointCollection([state] * n, module=zoo.checkpoints.build_module)
        soup = quietly(recipe(center=center, random_state=0), equal, zoo.X, zoo.y)
        assert soup.coef_.sum() == pytest.approx(1)
        assert same_tensors(soup.state_dict(), state)


def test_a_layer_that_only_one_ingredient_moves(zoo: Zoo):
    states = [dict(zoo.checkpoints[name]) for name in zoo.checkpoints]
    for state in states[1:]:
        state["head.bias"] = states[1]["head.bias"]
    checkpoints = CheckpointCollection(states, module=zoo.checkpoints.build_module)
    soup = quietly(MEHLSoup(layerwise=True, random_state=0), checkpoints, zoo.X, zoo.y)
    np.testing.assert_allclose(soup.coef_.sum(axis=1), 1, atol=1e-9)
    assert same_tensors(soup.state_dict(), mix(checkpoints, soup.coef_, layers=soup.layers_))


def test_a_tensor_that_differs_outside_the_center_is_searched(zoo64: Zoo):
    """The center alone does not show which tensors differ."""
    states = make_states(4, 0, torch.float64, batch_norm=False)
    for state in states[1:3]:
        state["head.weight"] = states[0]["head.weight"]
    checkpoints = CheckpointCollection(states, module=Net64)
    q = [1.0, 0.0, 0.0, 0.0]
    soup = MEHLSoup(center=q, clip_deltas=None, layerwise=True, random_state=0, lr=1e-3)
    quietly(soup, checkpoints, zoo64.X, zoo64.y)
    row = soup.layer_names_.index("head.weight")
    assert soup.held_out_scores_["soup"] >= soup.held_out_scores_["center"]
    assert soup.coef_[row, 3] != 0


def test_files_are_read_once_per_stage(zoo: Zoo, tmp_path):
    files = zoo.checkpoints.save(tmp_path)
    with reads() as opened:
        soup = quietly(
            MEHLSoup(model_batch_size=2, prefetch=0, random_state=0), files, zoo.X, zoo.y
        )
    # checked, ranked, measured, loaded, mixed; the center and the best checkpoint are mixed, too,
    # before the search, for the comparison, and once more where they win it
    in_center = {name for name, q in zip(files, soup.center_, strict=True) if q}
    assert {n for name, n in opened.items() if name not in in_center} == {5}
    assert max(opened.values()) <= 9
    known = CheckpointCollection(files, scores=dict.fromkeys(files, 1.0))
    with reads() as opened:
        paper = PaperMEHL(model_batch_size=2, prefetch=0, random_state=0)
        paper.fit(known, zoo.X, zoo.y)
    assert set(opened.values()) == {3}


@pytest.mark.parametrize("recipe", [MEHLSoup(model_batch_size=2), LearnedSoup(layerwise=True)])
def test_a_fit_that_is_replayed_makes_no_pass(zoo: Zoo, tmp_path, recipe):
    files = zoo.checkpoints.save(tmp_path / "zoo")
    recipe.set_params(random_state=0, memory=tmp_path / "memory")
    first = quietly(recipe, files, zoo.X, zoo.y)
    coef, scores = first.coef_, first.held_out_scores_
    again = quietly(recipe, files, zoo.X, zoo.y)
    assert np.array_equal(again.coef_, coef)
    assert again.held_out_scores_ == scores
    assert again.counts_.rows_forward == again.counts_.rows_backward == 0


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, X):
        return self.net(X)


def test_other_tasks_have_a_center_too():
    torch.manual_seed(0)
    nets = [Regression() for _ in range(5)]
    X = torch.randn(40, 3)
    y = (X.sum(dim=1) + 0.1 * torch.randn(40)).numpy()
    for recipe in (MEHLSoup, LearnedSoup):
        soup = quietly(recipe(task="regression", random_state=0), nets, X, y)
        assert set(soup.held_out_scores_) >= {"soup", "center"}
        assert soup.score(X, y) == max(soup.held_out_scores_.values())


def test_weights_of_zero_rank_nothing(zoo: Zoo):
    weight = np.ones(len(zoo.y))
    weight[::2] = 0
    soup = MEHLSoup(ranking_rows=10, **STANDING)
    quietly(soup, zoo.checkpoints, zoo.X, zoo.y, sample_weight=weight)
    assert soup.counts_.rows_forward == len(zoo.checkpoints) * 10 + 4 * len(zoo.y)
    few = np.zeros(len(zoo.y))
    few[:5] = 1
    quietly(soup, zoo.checkpoints, zoo.X, zoo.y, sample_weight=few)  # fewer rows than asked for


def test_the_decay_is_that_of_a_prior():
    from sksoup.recipes.validation import weight_decay_of

    def problem(n, amounts=None):
        data = type("Rows", (), {"__len__": lambda self: n, "amounts": amounts})()
        return type("Problem", (), {"data": data})()

    assert weight_decay_of(MEHLSoup(), problem(1000)) == 1.0
    assert weight_decay_of(MEHLSoup(), problem(100)) == 10.0
    assert weight_decay_of(MEHLSoup(lr=0.05), problem(10)) == 20.0  # lr * decay is at most 1
    assert weight_decay_of(MEHLSoup(weight_decay=0.5), problem(10)) == 0.5
    amounts = torch.tensor([0.0, 2.0, 1.0])
    assert weight_decay_of(MEHLSoup(lr=1e-4), problem(3, amounts)) == 500.0


def test_a_good_network_from_another_start_does_not_spoil_the_center():
    """It ranks first, but its mean with the others is noise."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 30, generator=generator)
    y = (X[:, :1].sum(dim=1) > 0).long()

    def net(start: int, k: int) -> nn.Module:
        torch.manual_seed(start)
        module = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 2))
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(10 + k):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(X), y).backward()
            optimizer.step()
        return module

    nets = {f"ft{k}": net(0, k) for k in range(7)} | {"other": net(1, 30)}
    checkpoints = CheckpointCollection(nets)
    for known in (None, {name: float(name == "other") for name in nets}):
        some = checkpoints if known is None else CheckpointCollection(checkpoints, scores=known)
        soup = quietly(MEHLSoup(ranking_rows=None, **STANDING), some, X, y)
        assert soup.center_[checkpoints.names.index("other")] == 0
        assert np.count_nonzero(soup.center_) == 2
    best = quietly(MEHLSoup(center="best", **STANDING), some, X, y)  # what is asked for
    assert best.center_[checkpoints.names.index("other")] == 1


def test_known_scores_rank_in_any_order_of_the_collection(zoo: Zoo):
    """A selection keeps the scores of its checkpoints, whatever order it is in."""
    names = zoo.checkpoints.names
    scores = {name: float(k) for k, name in enumerate(names)}
    known = CheckpointCollection(zoo.checkpoints, scores=scores).select(names[::-1])
    soup = quietly(MEHLSoup(center="best", **STANDING), known, zoo.X, zoo.y)
    assert soup.checkpoints_.names[soup.center_.argmax()] == names[-1]
    assert quietly(GreedySoup(), known, zoo.X, zoo.y).path_[0]["candidate"] == names[-1]


def test_a_series_of_coefficients_is_matched_by_its_names(zoo: Zoo):
    names = [*zoo.checkpoints.names]
    center = pd.Series({names[-1]: 0.75, names[0]: 0.25}).reindex(names[::-1], fill_value=0.0)
    soup = MEHLSoup(center=center, max_epochs=1).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.center_[0] == 0.25
    assert soup.center_[-1] == 0.75
    with pytest.raises(ValueError, match="coef has the index"):
        MEHLSoup(center=center.rename({names[0]: "other"})).fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(ValueError, match="weight_decay must be finite"):
        MEHLSoup(weight_decay=np.inf).fit(zoo.checkpoints, zoo.X, zoo.y)
