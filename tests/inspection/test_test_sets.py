"""Several test sets in one comparison: which is which, and what is said of them."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch

from sksoup import BestCheckpoint, MEHLSoup, UniformSoup
from sksoup.inspection import ComparisonDisplay, compare_soups
from sksoup.inspection.test_sets import named_test_sets

from ..zoo import Zoo

RECIPES = {"best": BestCheckpoint(), "mean": UniformSoup()}


def compare(zoo: Zoo, X_test, y_test=None, recipes=RECIPES, X=None, **kwargs):
    X = zoo.X if X is None else X
    with patch("sksoup.inspection.comparison._extra_memory", lambda *args: 0.0):
        return compare_soups(zoo.checkpoints, X, zoo.y, X_test, y_test, recipes=recipes, **kwargs)


def sets_of(zoo: Zoo) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.as_tensor(zoo.X)
    noisy = X + 3 * torch.randn(X.shape, generator=generator)
    return {"clean": X, "noise": noisy, "upside down": -X}


def test_every_test_set_has_its_score(zoo: Zoo):
    sets = sets_of(zoo)
    found = compare(zoo, sets, zoo.y)
    for result in found.results:
        soup = found.soups[result.system]
        scores = {name: soup.score(X, zoo.y) for name, X in sets.items()}
        assert result.tests == scores
        assert result.test == scores["clean"]
        assert result.mean_shifted == pytest.approx((scores["noise"] + scores["upside down"]) / 2)
        assert result.worst == min(scores.values())
    assert any(result.worst < result.test for result in found.results)
    assert found.header[:7] == (
        "method", "validation %", "clean %", "noise %", "upside down %", "mean shifted %",
        "worst %",
    )  # fmt: skip
    cells = found.cells()[1]
    assert len(cells) == len(found.header)
    assert cells[5:7] == tuple(
        f"{100 * score:.2f}" for score in (found.results[1].mean_shifted, found.results[1].worst)
    )
    assert "clean (60 examples), noise (60 examples), upside down (60 examples)" in found.statement
    frame = found.to_frame()
    assert frame.loc["mean", "noise"] == found.results[1].tests["noise"]
    assert frame.loc["mean", "worst"] == found.results[1].worst


def test_pairs_have_labels_of_their_own(zoo: Zoo):
    sets = {"clean": (zoo.X, zoo.y), "few": (zoo.X[:20], zoo.y[:20])}
    found = compare(zoo, sets)
    soup = found.soups["mean"]
    assert found.results[1].tests == {
        "clean": soup.score(zoo.X, zoo.y), "few": soup.score(zoo.X[:20], zoo.y[:20]),
    }  # fmt: skip
    assert found.n_test == {"clean": 60, "few": 20}


def test_a_mapping_of_inputs_is_one_test_set(zoo: Zoo):
    """Tokenized texts are mappings themselves."""
    one = compare(zoo, {"x": zoo.X[:30]}, zoo.y[:30], X={"x": zoo.X})
    assert one.header[2] == "test %"
    assert one.results[0].mean_shifted is one.results[0].worst is None
    both = {"clean": {"x": zoo.X}, "few": ({"x": zoo.X[:30]}, zoo.y[:30])}
    with pytest.raises(ValueError, match=r"X_test\['clean'\] is a dict, expected a pair"):
        compare(zoo, both, X={"x": zoo.X})
    both["clean"] = both["clean"], zoo.y
    assert list(compare(zoo, both, X={"x": zoo.X}).results[0].tests) == ["clean", "few"]
    plain = compare(zoo, {"x": zoo.X[:30]}, zoo.y[:30])  # the validation rows are no mapping
    assert plain.results[0].tests.keys() == {"x"}


def test_inputs_by_position_are_no_pair_where_labels_are_shared():
    X, y = torch.zeros(4, 2), torch.zeros(4)
    found = named_test_sets((X, X), y, {"clean": (X, X), "other": (X, X)}, y)
    assert found["clean"] == ((X, X), y)
    pairs = named_test_sets((X, X), y, {"clean": ((X, X), y)}, None)
    assert pairs["clean"] == ((X, X), y)
    texts = named_test_sets(X, None, {"clean": X, "other": (X, None)}, None)  # of language models
    assert texts == {"clean": (X, None), "other": (X, None)}


@pytest.mark.parametrize(
    ("X_test", "y_test", "error"),
    [
        ({}, "y", "X_test is an empty mapping"),
        ({1: "X"}, "y", "a key 1, expected the name of a test set"),
        ({"clean": "X"}, None, "is a ndarray, expected a pair"),
        ({"clean": "X", "few": "few"}, "y", r"X_test\['few'\] has 30 rows, but 60 labels"),
        ({"clean": ("few", "y")}, None, r"X_test\['clean'\] has 30 rows, but 60 labels"),
        ("X", None, "Give both X_test and y_test"),
        (None, "y", "Give both X_test and y_test"),
    ],
)
def test_bad_test_sets_are_refused_before_any_fit(zoo: Zoo, X_test, y_test, error):
    values = {"X": zoo.X, "y": zoo.y, "few": zoo.X[:30], None: None}

    def filled(given):
        if isinstance(given, dict):
            return {name: filled(value) for name, value in given.items()}
        return tuple(map(filled, given)) if isinstance(given, tuple) else values[given]

    with (
        patch.object(UniformSoup, "fit", side_effect=AssertionError("fitted")),
        pytest.raises((ValueError, TypeError), match=error),
    ):
        compare(zoo, filled(X_test), filled(y_test), {"mean": UniformSoup()})


def test_repeats_of_several_sets(zoo: Zoo):
    soup = MEHLSoup(model_batch_size=2, max_epochs=1, batch_size=20, random_state=3, lr=0.5)
    found = compare(zoo, sets_of(zoo), zoo.y, {"mehl": soup}, n_repeats=2)
    (result,) = found.results
    assert result.tests_std.keys() == result.tests.keys()
    assert result.tests_std["clean"] == result.test_std
    assert found.to_frame().loc["mehl", "noise std"] == result.tests_std["noise"]
    assert found.cells()[0][3].endswith(f"± {100 * result.tests_std['noise']:.2f}")


def test_clean_is_drawn_against_shifted(zoo: Zoo):
    found = compare(zoo, sets_of(zoo), zoo.y)
    display = ComparisonDisplay.from_comparison(found)
    for line, result in zip(display.ax_.lines, found.results, strict=True):
        assert line.get_xdata().item() == result.test
        assert line.get_ydata().item() == result.mean_shifted
        assert line.get_label() == result.system
    one = ComparisonDisplay.from_comparison(compare(zoo, {"test": zoo.X}, zoo.y))
    assert one.shifted is None
    with pytest.raises(ValueError, match="shifted is drawn against test"):
        ComparisonDisplay(["a"], [0.5], shifted=[0.4])
    many = [f"soup {i}" for i in range(13)]
    scores = np.linspace(0.5, 0.6, 13)
    drawn = ComparisonDisplay(many, scores, scores, shifted=scores).plot().ax_.lines
    assert len({(line.get_marker(), line.get_color()) for line in drawn}) == 13
