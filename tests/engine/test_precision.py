"""A processor that is slow at bfloat16 is warned of before the search."""

from __future__ import annotations

import warnings

import pytest
import torch

from sksoup import SoupWarning
from sksoup.engine import precision

from ..zoo import PaperLearned, PaperMEHL, Zoo


@pytest.fixture
def processor(monkeypatch):
    """Let bfloat16 take so many times as long as float32."""

    def pretend(slower: float) -> None:
        times = {torch.float32: 0.5, torch.bfloat16: 0.5 * slower}
        monkeypatch.setattr(precision, "seconds", times.__getitem__)

    return pretend


@pytest.mark.parametrize("kind", [PaperMEHL, PaperLearned])
def test_slow_bfloat16_is_warned_of_before_the_search(zoo: Zoo, processor, kind):
    processor(20.0)
    soup = kind(precision="bf16", max_epochs=1, random_state=0, device="cpu")
    message = r"is slow on this processor: .* takes 20 times .*instructions.*Use precision='fp32'"
    with warnings.catch_warnings():
        warnings.simplefilter("error", SoupWarning)  # raised, so no step can come before
        with pytest.raises(SoupWarning, match=message):
            soup.fit(zoo.checkpoints, zoo.X, zoo.y)
        soup.set_params(precision="fp32").fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.warns(SoupWarning, match=message) as caught:
        soup.set_params(precision="bf16").fit(zoo.checkpoints, zoo.X, zoo.y)
    assert caught[0].filename == __file__
    processor(1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SoupWarning)
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)


def test_accelerators_are_not_measured(processor):
    processor(20.0)
    assert precision.judge_bfloat16(torch.device("cuda")) is None


def test_it_is_measured():
    assert precision.seconds(torch.float32) > 0
    assert precision.seconds(torch.bfloat16) > 0
