"""The program on the documentation's page about distribution shift runs as it stands."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sksoup import Recipe

from .pages import run


@pytest.mark.filterwarnings("ignore::sksoup.SoupWarning")
def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = run("shift")
    said = capsys.readouterr().out
    assert "mean shifted %" in said
    assert "noise (2,000 examples)" in " ".join(said.split())
    results = {one.system: one for one in found["comparison"].results}
    assert all(list(one.tests) == ["clean", "noise", "dark"] for one in results.values())
    assert results["best"].worst < results["best"].test
    wise, t = found["wise"], found["path"].best_t
    assert wise.coef_[:, wise.checkpoints_.names.index("start")] == pytest.approx(1 - t)
    np.testing.assert_allclose(wise.coef_.sum(axis=1), 1)
    recipe = Recipe.load("wise.safetensors")
    assert recipe.verify("wise.safetensors", wise.checkpoints_).ok
