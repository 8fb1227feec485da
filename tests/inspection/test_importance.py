"""What a soup loses without an ingredient is that of the mix with its share given to the others."""

from __future__ import annotations

import copy
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from sksoup import (
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    SoupWarning,
    UniformSoup,
    mix,
)
from sksoup.displays.axes import shortened
from sksoup.engine.objective import load_weights
from sksoup.inspection import (
    IngredientImportanceDisplay,
    importance,
    ingredient_importance,
)
from sksoup.inspection.importance import Without
from sksoup.model_selection import SoupSearchCV

from ..zoo import Net, PaperMEHL, Zoo, make_states, reads


class Masked(torch.nn.Linear):
    """A classifier of sequences with a causal mask among its weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(4, 4)
        self.register_buffer("mask", torch.full((5, 5), -torch.inf, dtype=dtype).triu(1))

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        hidden = super().forward(X)
        attention = hidden @ hidden.transpose(1, 2) + self.mask.float()
        return (attention.softmax(-1) @ hidden).mean(1)


def coef_without(coef: np.ndarray, k: int) -> np.ndarray:
    """The definition, layer by layer: (n_layers, K)."""
    used, found = coef.any(axis=0), coef.copy()
    for row in found:
        parts = np.abs(row)
        parts[k] = 0
        if not parts.any():
            parts = used.astype(float)
            parts[k] = 0
        share, row[k] = row[k], 0
        row += share * parts / parts.sum()
    return found


def assert_same_as_mix(soup, name, rtol):
    k = soup.checkpoints_.names.index(name)
    changed = coef_without(np.atleast_2d(soup.coef_), k)
    np.testing.assert_allclose(changed.sum(axis=1), 1)
    assert not changed[:, k].any()
    expected = mix(soup.checkpoints_, changed, layers=soup.layers_)
    found = Without(soup)(name)
    assert set(found) == {n for n, w in expected.items() if w.is_floating_point()}
    for tensor, value in found.items():
        assert value.dtype == expected[tensor].dtype
        close = expected[tensor].double()
        scale = np.abs(soup.coef_).max() * max(float(close.abs().max()), 1.0)
        torch.testing.assert_close(value.double(), close, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2**-6)],
)
@settings(max_examples=15)
@given(data=st.data())
def test_weights_are_those_of_mix_for_any_coefficients(dtype, rtol, data):
    states = make_states(4, 0, dtype)
    soup = PaperMEHL(layerwise=True, max_epochs=1, random_state=0)
    zoo = CheckpointCollection(states, module=Net)
    soup.fit(zoo, np.zeros((40, 4), np.float32), np.arange(40) % 3)
    number = st.sampled_from([0.0, 0.0, 0.25, 1.0, -0.5, 2.0])
    rows = data.draw(st.lists(st.lists(number, min_size=3, max_size=3), min_size=7, max_size=7))
    coef = np.array(rows)
    soup.coef_ = np.column_stack([coef, 1 - coef.sum(axis=1)])
    used = [n for n, c in zip(zoo, soup.coef_.T, strict=True) if c.any()]
    for name in used if len(used) > 1 else []:
        assert_same_as_mix(soup, name, rtol)


@pytest.mark.parametrize("scale", [1e8, 1e20])
def test_others_that_are_lost_in_a_diverged_run_are_mixed_again(zoo: Zoo, scale):
    states = make_states(4, 0)
    states[2] = {n: w * scale if w.is_floating_point() else w for n, w in states[2].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)
        soup = UniformSoup().fit(CheckpointCollection(states, module=Net), zoo.X, zoo.y)
    for name in soup.ingredients_:
        assert_same_as_mix(soup, name, 1e-4)


def test_scores_are_those_of_the_soup_without_each(zoo: Zoo, tmp_path):
    files = zoo.checkpoints.save(tmp_path / "zoo")
    soup = PaperMEHL(files, layerwise=True, max_epochs=2, random_state=0).fit(zoo.X, zoo.y)
    before = {name: w.clone() for name, w in soup.module_.state_dict().items()}
    found = ingredient_importance(soup, zoo.X, zoo.y)
    assert found.score == soup.score(zoo.X, zoo.y)
    assert tuple(found.scores) == soup.ingredients_
    other = copy.deepcopy(soup)
    for name, score in found.scores.items():
        k = files.names.index(name)
        load_weights(other.module_, mix(files, coef_without(soup.coef_, k), layers=soup.layers_))
        assert other.score(zoo.X, zoo.y) == pytest.approx(score, abs=1 / 60 + 1e-9)
        assert found.importances[name] == found.score - score
        assert found.coef[name] == soup.coef_[:, k].mean()
    losses = list(found.importances.values())
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) > 1
    after = soup.module_.state_dict()
    assert all(torch.equal(w, after[name]) for name, w in before.items())
    loader = DataLoader(TensorDataset(torch.as_tensor(zoo.X), torch.as_tensor(zoo.y)), 25)
    assert ingredient_importance(soup, loader) == found


def test_each_file_in_the_soup_is_read_twice(zoo: Zoo, tmp_path):
    files = zoo.checkpoints.save(tmp_path / "zoo")
    soup = UniformSoup(files).fit(zoo.X, zoo.y)
    soup.coef_ = np.array([0.5, 0, 0.75, 0, 0, 0, -0.25])
    used = [files.names[k] for k in (0, 2, 6)]
    with reads() as opened:
        found = ingredient_importance(soup, zoo.X, zoo.y)
    assert opened == dict.fromkeys(used, 2)
    assert list(found.scores) == used


def test_only_tensors_that_are_lost_are_read_again(zoo: Zoo):
    states = make_states(4, 0)
    states[2]["head.bias"] = torch.full_like(states[2]["head.bias"], 1e12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)
        soup = UniformSoup().fit(CheckpointCollection(states, module=Net), zoo.X, zoo.y)
    with patch.object(importance, "accumulate", wraps=importance.accumulate) as again:
        ingredient_importance(soup, zoo.X, zoo.y)
    assert [call.args[-1] for call in again.call_args_list] == [["head.bias"]]


def test_another_metric_and_regressions(zoo: Zoo):
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    found = ingredient_importance(soup, zoo.X, zoo.y, scoring="neg_log_loss")
    assert found.score < 0
    assert "(neg_log_loss)" in found.statement
    y = soup.module_(torch.as_tensor(zoo.X)).detach().numpy()
    regression = UniformSoup(task="regression").fit(zoo.checkpoints, zoo.X, y)
    found = ingredient_importance(regression, zoo.X, y)
    assert found.score == pytest.approx(1)
    assert min(found.importances.values()) > 0


def test_statistics_that_were_measured_stay(zoo: Zoo):
    soup = UniformSoup(batch_norm="recalibrate").fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.recalibrated_
    assert not set(Without(soup)("checkpoint0")) & set(soup.recalibrated_)


def test_the_table_and_the_display(zoo: Zoo):
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    found = ingredient_importance(soup, zoo.X, zoo.y)
    first, lost = next(iter(found.importances.items()))
    lines = str(found).splitlines()
    assert len(lines) == 2 + 7 + 1
    assert lines[2].split() == [first, "0.1429", f"{found.scores[first]:.4f}", f"{lost:+.4f}"]
    assert lines[-1] == f"The soup scores {found.score:.4f} on these 60 rows."
    assert found.to_markdown().count("\n") == 8
    display = IngredientImportanceDisplay.from_importance(found)
    assert [bar.get_width() for bar in display.ax_.patches] == list(found.importances.values())
    texts = [label.get_text() for label in display.ax_.get_yticklabels()]
    assert texts == shortened(list(found.importances))
    colors = {bar.get_facecolor() for bar in display.plot().ax_.patches}
    assert len(colors) == 1 + (min(found.importances.values()) < 0)


def test_what_has_no_ingredients_to_leave_out(zoo: Zoo):
    ensemble = CheckpointEnsemble().fit(zoo.checkpoints, zoo.X, zoo.y)
    for stray in (ensemble, SoupSearchCV(None, {})):
        with pytest.raises(TypeError, match=r"expected a fitted soup.*pass its soup_"):
            ingredient_importance(stray, zoo.X, zoo.y)
    one = GreedySoup(min_improvement=2.0).fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(ValueError, match=r"has only one ingredient, 'checkpoint\d'"):
        ingredient_importance(one, zoo.X, zoo.y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_constants_that_all_share_may_be_infinite(dtype):
    torch.manual_seed(0)
    X, nets = torch.randn(200, 5, 4), [Masked(torch.float32), Masked(torch.float32), Masked(dtype)]
    y = nets[0](X).argmax(1)
    checkpoints = CheckpointCollection(nets, module=Masked)
    importance = ingredient_importance(UniformSoup().fit(checkpoints, X, y), X, y)
    for name, score in importance.scores.items():
        others = checkpoints.select([other for other in checkpoints if other != name])
        assert score == UniformSoup().fit(others, X, y).score(X, y)
