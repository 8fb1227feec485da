from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss

from sksoup import CheckpointCollection, DivergenceError, SoupWarning

from ..references import descent_reference
from ..zoo import PaperLearned, Zoo
from .test_mehl import ONE_TENSOR_AND_DATA, peak_models


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("temperature", [False, True])
@pytest.mark.parametrize("max_epochs", [1, 4])
def test_equals_the_naive_softmax_graph_step_for_step(
    zoo64: Zoo, layerwise, temperature, max_epochs
):
    K = len(zoo64.checkpoints)
    n_rows = len(zoo64.checkpoints.layout) if layerwise else 1
    a = torch.zeros(n_rows, K, dtype=torch.float64, requires_grad=True)
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    reference = descent_reference(
        zoo64.checkpoints,
        torch.as_tensor(zoo64.X).double(),
        torch.as_tensor(zoo64.y),
        lambda: a.softmax(dim=1),
        [a, beta] if temperature else [a],
        layerwise=layerwise,
        lr=0.05,
        max_epochs=max_epochs,
        batch_size=32,
        scale=beta if temperature else None,
    )
    soup = PaperLearned(
        layerwise=layerwise,
        temperature=temperature,
        max_epochs=max_epochs,
        batch_size=32,
        shuffle=False,
    ).fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    np.testing.assert_allclose(np.atleast_2d(soup.coef_), reference, rtol=0, atol=1e-8)
    np.testing.assert_allclose(soup.temperature_, float(beta.detach()), rtol=1e-8)
    assert (soup.temperature_ == 1.0) == (not temperature)


@pytest.mark.filterwarnings("ignore:lr=2")
def test_coefficients_stay_on_the_simplex(zoo: Zoo):
    soup = PaperLearned(layerwise=True, lr=2.0, max_epochs=20, random_state=0)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.coef_.min() >= 0
    assert soup.coef_.max() > 0.5


def test_temperature_scales_probabilities_and_is_never_folded_into_the_weights(zoo: Zoo):
    soup = PaperLearned(lr=0.3, max_epochs=10, random_state=0)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    assert abs(soup.temperature_ - 1) > 0.01
    with torch.no_grad():
        logits = soup.module_(torch.as_tensor(zoo.X)).numpy()
    np.testing.assert_allclose(
        soup.predict_proba(zoo.X), softmax(soup.temperature_ * logits, axis=1), atol=1e-5
    )
    assert soup.recipe_.temperature == soup.temperature_


def test_the_temperature_of_overconfident_networks_stays_positive(tmp_path: Path):
    generator = np.random.default_rng(0)
    X, W = (generator.normal(size=shape).astype("float32") for shape in [(600, 10), (10, 3)])
    y = (X @ W + 8 * generator.normal(size=(600, 3))).argmax(axis=1)
    nets = []
    for _ in range(4):
        nets.append(torch.nn.Linear(10, 3, bias=False))
        nets[-1].weight.data = torch.tensor(4 * (W + generator.normal(size=W.shape) / 2).T).float()
    soup = PaperLearned(random_state=0).fit(CheckpointCollection(nets), X, y)
    assert 0 < soup.temperature_ < 0.1  # plain steps of 0.05 lead past 0
    proba = soup.predict_proba(X)
    np.testing.assert_array_equal(proba.argmax(axis=1), soup.predict(X))
    with torch.no_grad():
        logits = soup.module_(torch.as_tensor(X)).numpy()
    assert log_loss(y, proba) < 0.25 * log_loss(y, softmax(logits.astype(float), axis=1))
    soup.save(tmp_path / "soup.safetensors")


def test_divergence_is_an_error_with_the_last_good_coefficients(zoo: Zoo):
    def broken(output, y):
        return torch.nn.functional.cross_entropy(output, y) * float("inf")

    with pytest.raises(DivergenceError, match=r"at step 1\. Lower lr") as caught:
        PaperLearned(criterion=broken).fit(zoo.checkpoints, zoo.X, zoo.y)
    np.testing.assert_allclose(caught.value.coef.sum(axis=1), 1)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("capacity", [1, 3])
def test_models_that_do_not_fit_are_streamed(tmp_path, zoo64: Zoo, layerwise, capacity):
    files = zoo64.checkpoints.save(tmp_path / "zoo")
    settings = {"layerwise": layerwise, "max_epochs": 2, "batch_size": 30, "shuffle": False}
    resident = PaperLearned(**settings).fit(files, zoo64.X, zoo64.y)
    soup = PaperLearned(memory_limit=files.nbytes * (2 + capacity), **settings)
    reads = []
    original = CheckpointCollection.open

    def counting(self, name):
        reads.append(name)
        return original(self, name)

    with (
        patch.object(CheckpointCollection, "open", counting),
        pytest.warns(SoupWarning, match=rf"Only {capacity} of 5 models fit .* so each step reads"),
    ):
        soup.fit(files, zoo64.X, zoo64.y)
    np.testing.assert_allclose(soup.coef_, resident.coef_, rtol=0, atol=1e-10)
    steps = 4
    # mean and last mix once each, two operations a step
    assert len(reads) == 5 * (2 + 2 * steps)


def test_memory_is_that_of_all_models_and_two(tmp_path):
    peak, _ = peak_models(tmp_path, PaperLearned(layerwise=True, max_epochs=1, random_state=0))
    assert 10.9 < peak <= 9 + 2 + ONE_TENSOR_AND_DATA
    half = PaperLearned(layerwise=True, max_epochs=1, delta_dtype="bfloat16", random_state=0)
    peak, _ = peak_models(tmp_path / "half", half)
    assert peak <= 4.5 + 2 + ONE_TENSOR_AND_DATA


def test_a_regression_learns_no_factor_that_no_prediction_applies():
    X = torch.linspace(-1, 1, 40)[:, None]
    nets = []
    for slope in (1.0, 3.0):
        net = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(net.weight, slope)
        torch.nn.init.zeros_(net.bias)
        nets.append(net)
    soup = PaperLearned(task="regression", max_epochs=300, random_state=0)
    soup.fit(CheckpointCollection(nets), X.numpy(), 2.6 * X[:, 0].numpy())
    assert soup.temperature_ == 1
    assert soup.coef_ == pytest.approx([0.2, 0.8], abs=0.01)
    assert soup.score(X.numpy(), 2.6 * X[:, 0].numpy()) > 0.999
