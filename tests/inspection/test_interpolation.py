"""From the pretrained start to a soup: the formula of WiSE-FT, its scores, its soup."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointEnsemble, MEHLSoup, Recipe, UniformSoup, mix
from sksoup.inspection import InterpolationDisplay, InterpolationPath, interpolation_path

from ..zoo import Net, Net64, Zoo, make_states, same_tensors

TUNED = CheckpointCollection(make_states(4, 5, torch.float64, batch_norm=False), module=Net64)
START = make_states(1, 9, torch.float64, batch_norm=False)[0]
SOUPS = {
    "uniform": UniformSoup(),
    "layer-wise": MEHLSoup(layerwise=True, max_epochs=1, random_state=0, center="mean"),
}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.mark.parametrize("soup", SOUPS.values(), ids=SOUPS)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5])
def test_it_is_the_authors_formula(zoo: Zoo, soup, t):
    soup.fit(TUNED, zoo.X, zoo.y)
    before = {name: value.clone() for name, value in soup.state_dict().items()}
    near = soup.interpolate(START, t)
    for name, value in near.state_dict().items():
        expected = (1 - t) * START[name] + t * before[name]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(near.coef_.sum(axis=-1), 1)
    assert same_tensors(soup.state_dict(), before)  # which is left as it was
    mixed = mix(near.checkpoints_, near.coef_, layers=near.layers_)
    assert same_tensors(near.state_dict(), mixed)
    assert same_tensors(near.recipe_.cook(near.checkpoints_), mixed)
    assert near.recipe_.params["t"] == t
    if t == 0:
        assert near.ingredients_ == ("start",)


def test_the_start_may_be_an_ingredient_or_a_file(zoo: Zoo, tmp_path):
    both = TUNED.add("w0", START)
    soup = UniformSoup().fit(both, zoo.X, zoo.y)
    near = soup.interpolate("w0", 0.5)
    assert near.checkpoints_ is both
    np.testing.assert_allclose(near.coef_, [0.1, 0.1, 0.1, 0.1, 0.6])
    save_file(START, tmp_path / "base.safetensors")
    files = TUNED.save(tmp_path / "runs")
    soup = UniformSoup().fit(files, zoo.X, zoo.y).interpolate(tmp_path / "base.safetensors", 0.5)
    soup.save(tmp_path / "soup.safetensors")
    recipe = Recipe.load(tmp_path / "soup.safetensors")
    assert recipe.verify(tmp_path / "soup.safetensors", soup.checkpoints_).ok


def test_scores_along_the_way(zoo: Zoo):
    soup = UniformSoup().fit(TUNED, zoo.X, zoo.y)
    other = torch.as_tensor(zoo.X).flip(-1), zoo.y
    path = interpolation_path(
        START, soup, zoo.X, zoo.y, X_shifted={"flipped": other, "few": (zoo.X[:9], zoo.y[:9])}, t=5
    )
    for i, t in enumerate([0, 0.25, 0.5, 0.75, 1]):
        near = soup.interpolate(START, t)
        assert path.scores[i] == near.score(zoo.X, zoo.y)
        assert path.shifted["flipped"][i] == near.score(*other)
    assert path.best_t == path.t[len(path.t) - 1 - path.scores[::-1].argmax()]
    np.testing.assert_allclose(
        path.mean_shifted, (path.shifted["flipped"] + path.shifted["few"]) / 2
    )
    assert len(set(path.scores)) > 1
    assert str(path).splitlines()[0].split() == [
        "t", "score", "flipped", "few", "mean", "shifted",
    ]  # fmt: skip
    losses = interpolation_path(START, soup, zoo.X, zoo.y, t=[0, 1], scoring="neg_log_loss")
    assert losses.scores[0] < 0


def test_statistics_that_were_re_estimated_are_mixed_with_those_of_the_start(zoo: Zoo, tmp_path):
    soup = UniformSoup(batch_norm="recalibrate").fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.recalibrated_
    start = zoo.checkpoints["checkpoint0"]
    assert same_tensors(soup.interpolate("checkpoint0", 1.0).state_dict(), soup.state_dict())
    assert same_tensors(soup.interpolate("checkpoint0", 0.0).state_dict(), start)
    near = soup.interpolate("checkpoint0", 0.25)
    between = mix([start, soup.state_dict()], [0.75, 0.25])
    for name, value in near.state_dict().items():
        torch.testing.assert_close(value, between[name], rtol=0, atol=1e-6)
        assert name not in soup.recalibrated_ or torch.equal(value, between[name])
    path = interpolation_path("checkpoint0", soup, zoo.X, zoo.y, t=[0.25, 1])
    assert path.scores.tolist() == [near.score(zoo.X, zoo.y), soup.score(zoo.X, zoo.y)]
    near.save(tmp_path / "near.safetensors")
    found = near.recipe_.verify(tmp_path / "near.safetensors", zoo.checkpoints)
    assert found.ok
    assert set(found.unchecked) == set(soup.recalibrated_)


def test_displays(zoo: Zoo):
    soup = UniformSoup().fit(TUNED, zoo.X, zoo.y)
    plain = InterpolationDisplay.from_estimator(soup, zoo.X, zoo.y, start=START, t=3)
    assert plain.ax_.lines[0].get_ydata().tolist() == plain.path.scores.tolist()
    shifted = InterpolationDisplay.from_estimator(
        soup, zoo.X, zoo.y, start=START, X_shifted={"back": -zoo.X}, y_shifted=zoo.y
    )
    curve, start, end = shifted.ax_.lines
    assert curve.get_xdata().tolist() == shifted.path.scores.tolist()
    assert curve.get_ydata().tolist() == shifted.path.shifted["back"].tolist()
    assert start.get_label() == "start (t = 0)"
    assert end.get_xdata().item() == shifted.path.scores[-1]


def test_bad_input(zoo: Zoo):
    soup = UniformSoup().fit(TUNED, zoo.X, zoo.y)
    with pytest.raises(ValueError, match="t must be finite"):
        soup.interpolate(START, float("nan"))
    for t in ([0.5], [0, np.inf], [[0, 1]]):
        with pytest.raises(ValueError, match="t must be a number of positions"):
            interpolation_path(START, soup, zoo.X, zoo.y, t=t)
    with pytest.raises(ValueError, match="t == 1, must be >= 2"):
        interpolation_path(START, soup, zoo.X, zoo.y, t=1)
    with pytest.raises(TypeError, match="X_shifted is a ndarray, expected a mapping"):
        interpolation_path(START, soup, zoo.X, zoo.y, X_shifted=zoo.X)
    ensemble = CheckpointEnsemble().fit(TUNED, zoo.X, zoo.y)
    with pytest.raises(TypeError, match="ensemble"):
        ensemble.interpolate(START, 0.5)
    with pytest.raises(TypeError, match="ensemble"):
        interpolation_path(START, ensemble, zoo.X, zoo.y)
    named = CheckpointCollection({"start": START, "a": START}, module=lambda: Net(False))
    taken = UniformSoup().fit(named, zoo.X, zoo.y)
    with pytest.raises(ValueError, match="has a checkpoint named 'start', and other"):
        taken.interpolate({name: w + 1 for name, w in START.items()}, 0.5)
    taken.interpolate(dict(START), 0.5)  # the same weights


def test_ties_go_to_the_soup():
    path = InterpolationPath(np.array([0, 0.5, 1.0]), np.array([0.9, 0.9, 0.8]))
    assert path.best_t == 0.5
