"""The coefficients that are drawn are those of the soup."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from sksoup import MEHLSoup
from sksoup.displays.axes import RED
from sksoup.inspection import CoefficientsDisplay

from ..zoo import Zoo


def test_coefficients_of_every_kind_of_soup(zoo: Zoo):
    soup = MEHLSoup(layerwise=True, max_epochs=1, lr=0.3, random_state=0)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    display = CoefficientsDisplay.from_estimator(soup)
    image = display.ax_.images[0]
    assert np.array_equal(image.get_array(), soup.coef_)
    low, high = image.get_clim()
    assert low == -high == -np.abs(soup.coef_).max()  # 0 is white
    outside = ((soup.coef_ < 0) | (soup.coef_ > 1)).mean()
    display = CoefficientsDisplay.from_estimator(soup, kind="histogram")
    assert f"{100 * outside:.1f} % of {soup.coef_.size} outside" in display.ax_.get_title()
    assert sum(patch.get_height() for patch in display.ax_.patches[1:]) == soup.coef_.size
    scalar = MEHLSoup(max_epochs=1, lr=0.3, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    figure, ax = plt.subplots()
    display = CoefficientsDisplay.from_estimator(scalar, ax=ax)
    assert display.ax_ is ax
    assert display.figure_ is figure
    bars = display.ax_.patches
    assert np.allclose([bar.get_height() for bar in bars], scalar.coef_)
    is_red = [to_hex(bar.get_facecolor()).upper() == RED for bar in bars]
    assert is_red == ((scalar.coef_ < 0) | (scalar.coef_ > 1)).tolist()


def test_coefficients_that_do_not_fit_their_names_are_refused():
    with pytest.raises(ValueError, match=r"coef has shape \(1, 2\), expected \(1, 3\)"):
        CoefficientsDisplay([1, 2], ["a", "b", "c"], ["all"])
    with pytest.raises(ValueError, match="kind must be 'map' or 'histogram', got 'pie'"):
        CoefficientsDisplay([1.0], ["a"], ["all"]).plot(kind="pie")
