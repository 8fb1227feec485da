from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib import parallel_config
from sklearn.base import clone
from sklearn.metrics import accuracy_score, log_loss, make_scorer

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointError,
    GreedySoup,
    SoupWarning,
    UniformSoup,
    mix,
)
from sksoup.data.outputs import Outputs
from sksoup.data.rows import HeldOut
from sksoup.engine.objective import load_weights
from sksoup.engine.scores import Evaluation, Evaluator
from sksoup.recipes.candidates import hardest_first
from sksoup.recipes.greedy import greedy, uniform_coef
from sksoup.runtime.live_tensors import LiveTensors

from ..references import greedy_reference, mean_reference
from ..zoo import Net, Zoo, around, make_states, make_zoo, reads, same_tensors


def accuracy_of(checkpoints, X, y, subset):
    """Accuracy of the mean of a subset, by a module of its own."""
    module = checkpoints.build_module().eval()
    load_weights(module, mix(checkpoints, uniform_coef(subset, len(checkpoints))))
    with torch.no_grad():
        return accuracy_score(y, module(torch.as_tensor(X)).argmax(1).numpy())


def evaluation_of(score):
    return Evaluation(score, 1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 999))
def test_search_equals_recipe_1(scores, seed):
    """For any scores of single checkpoints and any scores of their means, ties included."""
    rng = np.random.default_rng(seed)
    table: dict[tuple[int, ...], float] = {}

    def score_of(subset):
        key = tuple(sorted(subset))
        if len(key) == 1:
            return scores[key[0]]
        return table.setdefault(key, float(rng.integers(0, 4)) / 4)

    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    ingredients, path = greedy(order, lambda subset, *_: evaluation_of(score_of(subset)), 0.0)
    assert ingredients == greedy_reference(scores, score_of)
    assert [candidate for candidate, _, _ in path] == order


class FromTable:
    """Stands for a module: row i of the held-out data is right or wrong as a table says."""

    def __init__(self, y):
        self.y = y
        self.right = torch.ones(len(y), dtype=torch.bool)
        self.outputs = Outputs("classification", 3, (3,), np.arange(3))

    def forward(self, rows):
        own = torch.nn.functional.one_hot(self.y[rows], 3).double()
        return own * torch.where(self.right[rows], 1.0, -1.0)[:, None]

    def outputs_of(self, data, batch_size):
        return self.forward(data.X)


@settings(max_examples=200)
@given(
    n_rows=st.integers(1, 40), n=st.integers(1, 6), size=st.integers(1, 45),
    seed=st.integers(0, 9999), easy=st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]),
    weighted=st.booleans(), min_improvement=st.sampled_from([0.0, 0.1, -0.05]),
)  # fmt: skip
def test_early_rejection_accepts_what_full_evaluation_accepts(
    n_rows, n, size, seed, easy, weighted, min_improvement
):
    """For any table of right and wrong, any order of the rows and any chunk size."""
    rng = np.random.default_rng(seed)
    y = torch.as_tensor(rng.integers(0, 3, n_rows))
    weight = rng.integers(0, 4, n_rows) + 0.25 if weighted else None
    module = FromTable(y)
    rows = HeldOut(torch.arange(n_rows), y, None)
    evaluate = Evaluator(module, rows, None, y.numpy(), weight)
    table: dict[tuple[int, ...], torch.Tensor] = {}
    bounds = []

    def load(subset):
        key = tuple(sorted(subset))
        module.right = table.setdefault(key, torch.as_tensor(rng.random(n_rows) < easy))

    def full(subset, *_):
        load(subset)
        return evaluate()

    def early(subset, needed, soup):
        load(subset)
        if soup is None:
            return evaluate()
        found = evaluate.until(needed, torch.as_tensor(rng.permutation(n_rows)), size)
        bounds.append((found, full(subset).score))
        return found

    order = list(range(n))
    kept, path = greedy(order, early, min_improvement)
    assert (kept, [k for _, _, k in path]) == (
        (expected := greedy(order, full, min_improvement))[0],
        [k for _, _, k in expected[1]],
    )
    for found, score in bounds:
        assert found.score >= score - 1e-12 if found.is_bound else found.score == score
        assert found.n_rows == n_rows or found.is_bound


@settings(max_examples=15)
@given(n=st.integers(1, 7), seed=st.integers(0, 999))
def test_estimator_equals_the_obvious_implementation(n, seed):
    zoo = make_zoo(n, seed)
    soup = GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y)

    def score_of(subset):
        return accuracy_of(zoo.checkpoints, zoo.X, zoo.y, subset)

    scores = [score_of([k]) for k in range(n)]
    kept = greedy_reference(scores, score_of)
    assert soup.ingredients_ == tuple(zoo.checkpoints.names[k] for k in kept)
    assert list(soup.individual_scores_.values()) == scores
    assert soup.score(zoo.X, zoo.y) == score_of(kept) >= max(scores)
    assert soup.path_[-1]["candidate"] in zoo.checkpoints.names
    tried = soup.path_[1:]
    assert soup.n_rows_evaluated_ == sum(found["n_rows"] for found in tried)
    chunks = sum(-(-found["n_rows"] // 32) for found in tried)  # the last is filled up
    mixed = len(zoo.X) if len(kept) > 1 else 0  # the last mix is scored, too
    assert soup.counts_.rows_forward == n * len(zoo.X) + 32 * chunks + mixed
    full = GreedySoup(early_rejection=False).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert full.ingredients_ == soup.ingredients_
    assert full.n_rows_evaluated_ == (n - 1) * len(zoo.X)
    for early, whole in zip(soup.path_, full.path_, strict=True):
        assert early["score"] >= whole["score"] - 1e-12  # a sum of many
        assert early["is_bound"] or early == whole


@settings(max_examples=25)
@given(
    task=st.sampled_from(["classification", "multilabel", "regression"]),
    seed=st.integers(0, 999), weighted=st.booleans(), batch_size=st.sampled_from([None, 7, 128]),
)  # fmt: skip
def test_the_same_soup_in_float64_for_every_default_score(task, seed, weighted, batch_size):
    rng = np.random.default_rng(seed)
    zoo = make_zoo(6, seed, torch.float64, batch_norm=False)
    X = rng.normal(size=(300, 4))
    y = rng.integers(0, 3, 300)
    if task != "classification":
        with torch.no_grad():
            outputs = zoo.checkpoints.build_module().eval()(torch.as_tensor(X)).numpy()
        y = outputs + rng.normal(size=outputs.shape)
        y = (y > 0).astype(int) if task == "multilabel" else y
    weight = rng.random(300) if weighted else None
    soup = GreedySoup(task=task, batch_size=batch_size)
    early = clone(soup).fit(zoo.checkpoints, X, y, sample_weight=weight)
    full = clone(soup).set_params(early_rejection=False)
    full.fit(zoo.checkpoints, X, y, sample_weight=weight)
    assert early.ingredients_ == full.ingredients_
    assert [found["kept"] for found in early.path_] == [found["kept"] for found in full.path_]
    assert early.n_rows_evaluated_ <= full.n_rows_evaluated_ == 5 * 300
    last = [found["score"] for found in early.path_ if found["kept"]][-1]
    # the mix is rounded in another way than the mean that was scored
    assert last == pytest.approx(early.score(X, y, weight), abs=1e-9)
    assert last == pytest.approx(full.score(X, y, weight), abs=1e-9)


def test_most_rows_are_spared():
    zoo = make_zoo(12, seed=3)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2000, 4)).astype(np.float32)
    y = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y).predict(X)
    soup = GreedySoup().fit(zoo.checkpoints, X, y)
    assert soup.n_rows_evaluated_ < 0.5 * 11 * 2000
    rejected = [found for found in soup.path_ if not found["kept"]]
    assert rejected
    assert all(found["is_bound"] and found["n_rows"] % 125 == 0 for found in rejected)
    # without a ranking only the soup's margins are known: the same soup, after more rows
    known = CheckpointCollection(
        {name: zoo.checkpoints[name] for name in zoo.checkpoints}, module=Net,
        scores=soup.individual_scores_,
    )  # fmt: skip
    unranked = GreedySoup().fit(known, X, y)
    assert unranked.ingredients_ == soup.ingredients_
    assert unranked.n_rows_evaluated_ > soup.n_rows_evaluated_


def test_expected_margins_are_those_of_the_mean_of_outputs():
    soup = Evaluation(1.0, 3, margins=torch.tensor([3.0, 1.0, 2.0]))
    assert hardest_first(None, torch.ones(3), 2) is None
    assert hardest_first(Evaluation(1.0, 3), torch.ones(3), 2) is None
    assert hardest_first(soup, None, 2).tolist() == [1, 2, 0]
    own = torch.tensor([-1.0, 4.0, 0.9])  # the mean has (2 * soup + own) / 3 = 1.67, 2, 1.63
    assert hardest_first(soup, own, 3).tolist() == [2, 0, 1]


def test_r2_of_constant_targets_has_no_bound(zoo64: Zoo):
    y = np.ones((60, 3))
    soup = GreedySoup(task="regression").fit(zoo64.checkpoints, zoo64.X, y)
    assert not any(found["is_bound"] for found in soup.path_)
    assert soup.path_[0]["standard_error"] is None


def test_path_tells_gains_and_their_noise(zoo: Zoo):
    soup = GreedySoup(early_rejection=False).fit(zoo.checkpoints, zoo.X, zoo.y)
    path, score, kept = soup.path_, soup.path_[0]["score"], [soup.path_[0]["candidate"]]
    assert path[0]["gain"] is None is path[0]["gain_standard_error"]

    def right(names):
        subset = [zoo.checkpoints.names.index(name) for name in names]
        mixed = mix(zoo.checkpoints, uniform_coef(subset, len(zoo.checkpoints)))
        module = zoo.checkpoints.build_module().eval()
        load_weights(module, mixed)
        with torch.no_grad():
            return module(torch.as_tensor(zoo.X)).argmax(1).numpy() == zoo.y

    for found in path[1:]:
        assert found["gain"] == pytest.approx(found["score"] - score)
        with_it, without = right([*kept, found["candidate"]]), right(kept)
        p = with_it.mean()
        assert found["standard_error"] == pytest.approx(np.sqrt(p * (1 - p) / 60))
        difference = with_it.astype(float) - without
        assert found["gain_standard_error"] == pytest.approx(difference.std() / np.sqrt(60))
        if found["kept"]:
            score, kept = found["score"], [*kept, found["candidate"]]


def test_keeping_only_the_best_says_why(zoo: Zoo):
    with pytest.warns(SoupWarning, match=r"Only 'checkpoint\d'.*path_ lists all") as caught:
        GreedySoup(min_improvement=2.0).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert caught[0].filename == __file__
    two = zoo.checkpoints.select(["checkpoint0", "checkpoint1"])
    with pytest.warns(SoupWarning, match=r"soup: adding 'checkpoint\d' changed .* by -?") as e:
        GreedySoup(min_improvement=2.0).fit(two, zoo.X, zoo.y)
    assert not re.search(r"by [-+][\d.]+ .*to [-+]", str(e[0].message))
    strangers = CheckpointCollection([torch.nn.Linear(99, 9) for _ in range(4)])
    with pytest.warns(SoupWarning, match="were not fine-tuned from the same"):
        GreedySoup(min_improvement=2.0).fit(strangers, torch.randn(60, 99), zoo.y)


def test_one_checkpoint(zoo: Zoo):
    one = zoo.checkpoints.select(["checkpoint0"])
    soup = GreedySoup().fit(one, zoo.X, zoo.y)
    assert [said[:23] for said in soup.warnings_] == ["There is one checkpoint"]
    assert soup.ingredients_ == ("checkpoint0",)
    assert soup.n_rows_evaluated_ == 0
    assert soup.counts_.rows_forward == 60


def test_a_single_row(zoo: Zoo):
    soup = GreedySoup(classes=[0, 1, 2]).fit(zoo.checkpoints, zoo.X[:1], zoo.y[:1])
    assert soup.n_rows_evaluated_ == 6
    assert soup.path_[0]["standard_error"] == 0


def test_an_error_of_a_metric_names_the_checkpoint(zoo: Zoo):
    calls = []

    def metric(soup, X, y):
        calls.append(soup)
        if len(calls) == 9:
            raise ZeroDivisionError("no luck")
        return 0.5

    with pytest.raises(ZeroDivisionError, match="no luck") as caught:
        GreedySoup(scoring=metric).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert "'checkpoint2' was scored" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", [GreedySoup, BestCheckpoint])
def test_a_score_that_is_not_a_number(zoo: Zoo, kind):
    with pytest.raises(ValueError, match="score of 'checkpoint0' is not a number"):
        kind(scoring=lambda soup, X, y: float("nan")).fit(zoo.checkpoints, zoo.X, zoo.y)


@pytest.mark.parametrize("backend", ["loky", "threading"])
@pytest.mark.parametrize("scoring", [None, "neg_log_loss"])
@pytest.mark.parametrize("kind", [GreedySoup, BestCheckpoint])
def test_workers_change_nothing(tmp_path, zoo: Zoo, backend, scoring, kind):
    files = zoo.checkpoints.save(tmp_path / "zoo")
    plain = kind(scoring=scoring).fit(files, zoo.X, zoo.y)
    with parallel_config(backend=backend):
        soup = kind(scoring=scoring, n_jobs=2).fit(files, zoo.X, zoo.y)
    assert soup.individual_scores_ == plain.individual_scores_
    assert list(soup.individual_scores_) == list(plain.individual_scores_)
    assert soup.ingredients_ == plain.ingredients_
    assert vars(soup.counts_) == vars(plain.counts_)
    assert getattr(soup, "path_", None) == getattr(plain, "path_", None)
    assert torch.get_num_threads() == 1


def test_ranking_on_rows_of_its_own(zoo: Zoo):
    soup = GreedySoup(ranking_fraction=0.5, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.path_[0]["n_rows"] == 30
    assert {round(60 * score) % 2 for score in soup.individual_scores_.values()} == {0}
    again = GreedySoup(ranking_fraction=0.5, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert again.path_ == soup.path_
    other = GreedySoup(ranking_fraction=0.5, random_state=1).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert other.individual_scores_ != soup.individual_scores_
    ranked = rows_of(GreedySoup(ranking_fraction=0.3, random_state=0), zoo)
    seen = {name: set(rows) for name, rows in ranked.items()}
    assert len(seen["ranking"]) == 18
    assert seen["ranking"] | seen["acceptance"] == set(range(60))
    assert not seen["ranking"] & seen["acceptance"]


def rows_of(soup, zoo):
    """Which rows a metric is shown while ranking, and afterwards."""
    shown = []

    def metric(candidate, X, y):
        shown.append([int(np.flatnonzero((row == zoo.X).all(axis=1))[0]) for row in X])
        return 0.5

    soup.set_params(scoring=metric).fit(zoo.checkpoints, zoo.X, zoo.y)
    return {"ranking": shown[0], "acceptance": shown[-1]}


def test_a_rare_label_can_not_be_stratified(zoo: Zoo):
    y = zoo.y.copy()
    y[:] = 0
    y[0], y[1] = 1, 2
    GreedySoup(ranking_fraction=0.5, random_state=0).fit(zoo.checkpoints, zoo.X, y)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.5, "half"])
def test_bad_ranking_fraction(zoo: Zoo, value):
    with pytest.raises((ValueError, TypeError), match="ranking_fraction"):
        GreedySoup(ranking_fraction=value).fit(zoo.checkpoints, zoo.X, zoo.y)


def deep():
    return torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(12)))


@pytest.mark.parametrize(("dtype", "models"), [(torch.float32, 4), (torch.float64, 3)])
def test_memory_is_the_module_a_sum_in_float64_and_a_mean(tmp_path, dtype, models):
    modules = around(deep(), 6)
    files = CheckpointCollection(
        [net.to(dtype) for net in modules], module=lambda: deep().to(dtype)
    ).save(tmp_path / "deep")
    X, y = torch.randn(40, 100), torch.arange(40) % 10
    with LiveTensors() as live:
        soup = GreedySoup(min_improvement=-1.0).fit(files, X, y)
    assert len(soup.ingredients_) == 6
    largest, outputs = 100 * 100 * 8, 40 * 100 * 8
    assert live.peak <= models * files.nbytes + 3 * largest + 4 * outputs


@pytest.mark.parametrize("min_improvement", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("given", ["nothing", "scores", "ranking_fraction"])
@pytest.mark.filterwarnings("ignore:Only")
def test_a_file_is_opened_to_rank_it_to_try_it_and_to_mix_it(tmp_path, zoo, given, min_improvement):
    files = zoo.checkpoints.save(tmp_path / "zoo")
    known = BestCheckpoint().fit(files, zoo.X, zoo.y).individual_scores_
    files = CheckpointCollection(
        [files.path(name) for name in files],
        module=Net,
        scores=known if given == "scores" else None,
    )
    soup = GreedySoup(min_improvement=min_improvement, random_state=0)
    if given == "ranking_fraction":
        soup.set_params(ranking_fraction=0.5)
    with reads() as opened:
        soup.fit(files, zoo.X, zoo.y)
    # the ranking reads a file, or the search for NaN where scores are known
    assert opened == {name: 2 + (name in soup.ingredients_) for name in files}
    if min_improvement == -1:
        assert opened == dict.fromkeys(files, 3)


@pytest.mark.parametrize("n_jobs", [2, 3])
def test_workers_read_their_candidates_only(tmp_path, n_jobs):
    zoo = make_zoo(12, seed=0)
    files = zoo.checkpoints.save(tmp_path / "zoo")
    with reads() as opened, parallel_config(backend="threading"):
        GreedySoup(min_improvement=-1.0, n_jobs=n_jobs).fit(files, zoo.X, zoo.y)
    assert max(opened.values()) <= 4 + n_jobs


def test_sums_that_workers_map_change_nothing(tmp_path):
    zoo = make_zoo(8, seed=2)
    files = zoo.checkpoints.save(tmp_path / "zoo")
    soup = GreedySoup(min_improvement=-0.05, scoring="neg_log_loss")  # any bit shows
    plain = clone(soup).fit(files, zoo.X, zoo.y)
    assert len(plain.ingredients_) > 3
    with parallel_config(backend="loky", max_nbytes=1):
        mapped = clone(soup).set_params(n_jobs=2).fit(files, zoo.X, zoo.y)
    assert mapped.path_ == plain.path_
    assert same_tensors(mapped.state_dict(), plain.state_dict())


@settings(max_examples=30)
@given(
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        min_size=2, max_size=6,
    ),
    is_mixed=st.booleans(), seed=st.integers(0, 999), min_improvement=st.sampled_from([0.0, -0.05]),
    data=st.data(),
)  # fmt: skip
def test_decides_as_a_mean_of_all_that_were_kept(dtypes, is_mixed, seed, min_improvement, data):
    """For stored dtypes of any width, equal tensors and copies of whole checkpoints."""
    zoo = make_zoo(len(dtypes), seed)
    states: list[dict[str, torch.Tensor]] = []
    for k, made in enumerate(make_states(len(dtypes), seed)):
        dtype = dtypes[k if is_mixed else 0]
        state = {n: w.to(dtype) if w.is_floating_point() else w for n, w in made.items()}
        if states and data.draw(st.booleans()):
            state["head.weight"] = states[0]["head.weight"]
        states.append(data.draw(st.sampled_from([state, state, *states])))
    checkpoints = CheckpointCollection(states, module=Net)
    soup = GreedySoup(min_improvement=min_improvement, early_rejection=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)
        soup.fit(checkpoints, zoo.X, zoo.y)
    module = soup.module_

    def score_of(subset):
        load_weights(module, mean_reference([states[k] for k in sorted(subset)]))
        with torch.no_grad():
            outputs = module(torch.as_tensor(zoo.X, dtype=module.head.weight.dtype))
        return accuracy_score(zoo.y, outputs.argmax(1).numpy())

    weights = soup.state_dict()
    scores = [score_of([k]) for k in range(len(states))]
    order = sorted(range(len(states)), key=lambda k: -scores[k])
    kept, path = greedy(order, lambda subset, *_: evaluation_of(score_of(subset)), min_improvement)
    assert soup.ingredients_ == tuple(checkpoints.names[k] for k in kept)
    assert [found["score"] for found in soup.path_] == [found.score for _, found, _ in path]
    assert same_tensors(weights, mix(checkpoints, uniform_coef(kept, len(states))))


def test_masks_stay_infinite_in_every_candidate(zoo: Zoo):
    class Masked(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))

        def forward(self, x):
            assert not self.mask.isnan().any()
            return super().forward(x) + self.mask

    states = [{**state, "mask": Masked().mask} for state in make_states(7, seed=0)]
    y = np.where(zoo.y == 1, 0, zoo.y)
    checkpoints = CheckpointCollection(states, module=Masked)
    soup = GreedySoup(min_improvement=-1.0, classes=[0, 1, 2]).fit(checkpoints, zoo.X, y)
    assert soup.module_.mask.tolist() == [0.0, -torch.inf, 0.0]
    assert len(soup.ingredients_) == 7


def test_infinite_weights_are_named_though_they_ruin_a_score(zoo: Zoo):
    states = make_states(3, seed=0)
    states[0]["head.weight"] = torch.full_like(states[0]["head.weight"], torch.inf)
    checkpoints = CheckpointCollection(states, module=Net)
    with pytest.raises(CheckpointError, match=r"checkpoint 0 .*can't be used: 'head.weight'"):
        GreedySoup(scoring="neg_log_loss").fit(checkpoints, zoo.X, zoo.y)


def scores_in_turn(*scores):
    """A metric that gives these scores, one after the other."""
    remaining = iter(scores)
    return lambda soup, X, y: next(remaining)


@pytest.mark.parametrize(("last", "is_warned"), [(0.5, True), (0.9, False), (0.9 - 1e-8, False)])
def test_a_mix_that_scores_less_than_what_was_decided_on_is_warned_of(zoo: Zoo, last, is_warned):
    three = zoo.checkpoints.select(zoo.checkpoints.names[:3])
    soup = GreedySoup(scoring=scores_in_turn(0.7, 0.7, 0.7, 0.8, 0.9, last))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        soup.fit(three, zoo.X, zoo.y)
    said = [str(warning.message) for warning in caught]
    assert len(said) == is_warned == len(soup.warnings_)
    assert not said or "scores 0.5 on the rows that it was selected on, less than the" in said[0]
    assert soup.path_[-1]["score"] == 0.9


def test_one_ingredient_is_not_scored_again(zoo: Zoo):
    two = zoo.checkpoints.select(zoo.checkpoints.names[:2])
    soup = GreedySoup(scoring=scores_in_turn(0.7, 0.6, 0.5))
    with pytest.warns(SoupWarning, match="Only"):
        soup.fit(two, zoo.X, zoo.y)
    assert soup.counts_.rows_forward == 3 * 60


def test_known_scores_save_the_ranking(zoo: Zoo):
    ranked = BestCheckpoint().fit(zoo.checkpoints, zoo.X, zoo.y).individual_scores_
    known = CheckpointCollection(
        {name: zoo.checkpoints[name] for name in zoo.checkpoints}, module=Net, scores=ranked
    )
    soup = GreedySoup(early_rejection=False).fit(known, zoo.X, zoo.y)
    plain = GreedySoup(early_rejection=False).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.ingredients_ == plain.ingredients_
    ranked = len(zoo.checkpoints) * len(zoo.X)
    assert soup.counts_.rows_forward == plain.counts_.rows_forward - ranked + len(zoo.X)
    best = BestCheckpoint().fit(known, zoo.X, zoo.y)
    assert best.counts_.rows_forward == 0
    assert best.ingredients_ == soup.ingredients_[:1]


@pytest.mark.parametrize(
    "scoring",
    [
        "neg_log_loss",
        "balanced_accuracy",
        make_scorer(log_loss, greater_is_better=False, response_method="predict_proba"),
        lambda soup, X, y: -log_loss(y, soup.predict_proba(X)),
    ],
)
def test_any_scoring_with_lower_is_better_handled_by_the_scorer(zoo: Zoo, scoring):
    soup = GreedySoup(scoring=scoring).fit(zoo.checkpoints, zoo.X, zoo.y)
    best = BestCheckpoint(scoring=scoring).fit(zoo.checkpoints, zoo.X, zoo.y)
    kept = [tried["score"] for tried in soup.path_ if tried["kept"]]
    assert kept == sorted(kept)
    assert kept[0] == max(best.individual_scores_.values())


@pytest.mark.parametrize(("min_improvement", "kept"), [(0.0, 4), (0.001, 1)])
def test_ties_are_kept_unless_an_improvement_is_asked_for(min_improvement, kept):
    zoo = make_zoo(1, seed=0)
    same = CheckpointCollection(make_states(1, seed=0) * 4, module=Net)
    soup = GreedySoup(min_improvement=min_improvement).fit(same, zoo.X, zoo.y)
    assert len(soup.ingredients_) == kept


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), ("much", TypeError)])
def test_bad_min_improvement(zoo: Zoo, value, error):
    with pytest.raises(error, match="min_improvement"):
        GreedySoup(min_improvement=value).fit(zoo.checkpoints, zoo.X, zoo.y)
