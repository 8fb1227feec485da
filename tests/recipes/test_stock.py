"""Model Stock: the formula of its authors, in float64, and where its start comes from."""

from __future__ import annotations

import time
from functools import partial
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sksoup import CheckpointCollection, CheckpointError, ModelStockSoup, Recipe, mix
from sksoup.__main__ import main
from sksoup.checkpoints.protocol import TensorInfo
from sksoup.exceptions import SoupWarning
from sksoup.inspection import interpolation_path
from sksoup.mixing import stock
from sksoup.mixing.layers import group_layers
from sksoup.mixing.stock import stock_ratios

from ..zoo import Net, PlainNet, Zoo, make_states, same_tensors

NAMES = ["w0", "a", "b", "c", "d"]


def fine_tunings(n: int, seed: int, batch_norm: bool = False) -> CheckpointCollection:
    """A start, and n fine-tunings that share a part of their way."""
    start, way, *own = make_states(n + 2, seed, torch.float64, batch_norm)
    states = [start] + [
        {
            t: start[t] + way[t] * 0.3 + state[t] * 0.1 if w.is_floating_point() else w
            for t, w in start.items()
        }
        for state in own
    ]
    build = partial(Net, batch_norm, torch.float64)
    return CheckpointCollection(states, names=["w0", *"abcdefgh"[:n]], module=build)


def by_authors(ckpts: CheckpointCollection, tensor: str) -> tuple[float, torch.Tensor]:
    """Jang et al.: the mean of the pairs' cosines, t, and the weights, of one tensor."""
    w0, *tuned = (ckpts[name][tensor].double() for name in ckpts)
    cosines = [
        torch.cosine_similarity((a - w0).flatten(), (b - w0).flatten(), dim=0, eps=0)
        for a, b in combinations(tuned, 2)
    ]
    cos, n = float(torch.stack(cosines).mean()), len(tuned)
    t = n * cos / (1 + (n - 1) * cos)
    return t, t * torch.stack(tuned).mean(dim=0) + (1 - t) * w0


@given(n=st.integers(2, 8), seed=st.integers(0, 30))
def test_it_is_the_authors_formula(n, seed):
    ckpts = fine_tunings(n, seed)
    zoo = Zoo(ckpts, np.zeros((6, 4)), np.array([0, 1, 2, 0, 1, 2]))
    soup = ModelStockSoup(start="w0").fit(ckpts, zoo.X, zoo.y)
    for tensor, value in soup.state_dict().items():
        t, expected = by_authors(ckpts, tensor)
        if t >= 0:
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
            assert soup.ratios_[soup.layers_[tensor]] == pytest.approx(t, abs=1e-9)
        else:  # no common direction
            assert torch.equal(value, ckpts["w0"][tensor])
    np.testing.assert_allclose(soup.coef_.sum(axis=1), 1)
    assert (soup.ratios_ > 0).any()


def test_the_start_may_be_anywhere(zoo: Zoo, tmp_path):
    ckpts = fine_tunings(3, 0)
    tuned, w0 = ckpts.drop("w0"), ckpts["w0"]
    save_file(w0, tmp_path / "base.safetensors")
    module = Net(False, torch.float64)
    module.load_state_dict(w0)
    by_name = ModelStockSoup(start="w0").fit(ckpts, zoo.X, zoo.y)
    for start in (w0, module, tmp_path / "base.safetensors", str(tmp_path / "base.safetensors")):
        soup = ModelStockSoup(start=start).fit(tuned, zoo.X, zoo.y)
        found, expected = soup.state_dict(), by_name.state_dict()
        assert found.keys() == expected.keys()
        for name, w in found.items():  # which is the last to be summed
            torch.testing.assert_close(w, expected[name], rtol=1e-14, atol=1e-15)
        assert soup.checkpoints_.names == ("a", "b", "c", "start")
        assert soup.recipe_.ingredients[-1].name == "start"
        assert same_tensors(soup.recipe_.cook(soup.checkpoints_), soup.state_dict())


def test_the_start_may_be_beside_the_others_and_counts_once(zoo: Zoo, tmp_path, capsys):
    ckpts = fine_tunings(3, 0)
    ckpts.save(tmp_path / "runs")
    base = tmp_path / "runs" / "w0.safetensors"
    expected = ModelStockSoup(start="w0").fit(ckpts, zoo.X, zoo.y)
    files = CheckpointCollection.from_path(tmp_path / "runs", module=ckpts.module)
    for start in (base, str(base)):
        soup = ModelStockSoup(start=start).fit(files, zoo.X, zoo.y)
        np.testing.assert_allclose(soup.ratios_, expected.ratios_)
        assert soup.checkpoints_.names == files.names
        torch.testing.assert_close(soup.state_dict(), expected.state_dict())
        half = (soup.interpolate(start, 0.5), soup.interpolate("w0", 0.5))
        assert same_tensors(*(one.state_dict() for one in half))
    base.rename(renamed := tmp_path / "runs" / "start.safetensors")
    out = tmp_path / "out.safetensors"
    assert main(["stock", str(tmp_path / "runs"), "--start", str(renamed), "-o", str(out)]) == 0
    assert "4 checkpoints mixed" in capsys.readouterr().out
    torch.testing.assert_close(load_file(out), expected.state_dict())
    assert main(["verify", str(out), str(tmp_path / "runs")]) == 0


def test_a_copy_of_the_start_is_warned_of(zoo: Zoo):
    ckpts = fine_tunings(3, 0)
    soup = ModelStockSoup(start=ckpts["w0"])
    with pytest.warns(SoupWarning, match="'w0' has the same parameters as the start 'start'"):
        soup.fit(ckpts, zoo.X, zoo.y)
    assert any("leave it out" in said for said in soup.warnings_)
    ModelStockSoup(start="w0").fit(ckpts, zoo.X, zoo.y)  # no warning: they are errors here


def test_a_start_that_does_not_fit(zoo: Zoo):
    ckpts = fine_tunings(3, 0)
    with pytest.raises(CheckpointError, match="start' is not a checkpoint that sksoup can"):
        ModelStockSoup().fit(ckpts, zoo.X, zoo.y)
    with pytest.raises(CheckpointError, match="w0"):
        ModelStockSoup(start={"w0": torch.zeros(2)}).fit(ckpts, zoo.X, zoo.y)
    other = CheckpointCollection(
        {"start": ckpts["w0"], "a": ckpts["a"]}, module=lambda: Net(False, torch.float64)
    )
    with pytest.raises(ValueError, match="has a checkpoint named 'start', and other"):
        ModelStockSoup(start=ckpts["b"]).fit(other, zoo.X, zoo.y)


def test_one_fine_tuning_copies_and_opposites(zoo: Zoo):
    ckpts = fine_tunings(2, 1)
    one = ModelStockSoup(start="w0").fit(ckpts.select(["w0", "a"]), zoo.X, zoo.y)
    assert same_tensors(one.state_dict(), ckpts["a"])
    w0, a = ckpts["w0"], ckpts["a"]
    opposite = {t: 2 * w0[t] - a[t] for t in w0}
    states = CheckpointCollection({"w0": w0, "a": a, "o": opposite}, module=ckpts.module)
    back = ModelStockSoup(start="w0").fit(states, zoo.X, zoo.y)
    assert (back.cosines_ < -0.99).all()
    assert same_tensors(back.state_dict(), w0)
    copies = CheckpointCollection({"w0": w0, "a": a, "b": a, "c": a}, module=ckpts.module)
    same = ModelStockSoup(start="w0").fit(copies, zoo.X, zoo.y)
    np.testing.assert_allclose(same.ratios_, 1)
    frozen = {**w0, "head.weight": a["head.weight"]}
    others = CheckpointCollection({"w0": w0, "a": frozen, "b": frozen}, module=ckpts.module)
    part = ModelStockSoup(start="w0").fit(others, zoo.X, zoo.y)
    torch.testing.assert_close(part.state_dict(), frozen)


@pytest.mark.parametrize("layerwise", [True, False, lambda name: name.split(".")[0]])
def test_some_layers_at_a_time_are_summed(monkeypatch, layerwise):
    """Memory does not grow with the model, and the ratios are the same to the last bit."""
    ckpts = fine_tunings(4, seed=3)
    layers = group_layers(ckpts.layout, ckpts.layout, layerwise)
    start, names = ckpts.names[0], set(ckpts.layout)
    whole = stock_ratios(ckpts, start, layers, names, print)
    monkeypatch.setattr(stock, "MOST_ELEMENTS", 1)
    parts = [*stock._parts(ckpts, names, layers.rows)]
    found = stock_ratios(ckpts, start, layers, names, print)
    assert len(parts) == len({layers.rows[name] for name in names})
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(map(np.array_equal, found, whole))


def test_names_are_looked_up_in_constant_time():
    names = [f"layer.{k}.weight" for k in range(60_000)]
    layout = SimpleNamespace(layout={name: TensorInfo((1,), torch.float32) for name in names})
    began = time.process_time()
    parts = [*stock._parts(layout, names, {name: k for k, name in enumerate(names)})]
    assert time.process_time() - began < 5  # more than a minute if each is compared with all
    assert [name for part in parts for name in part] == names


@pytest.mark.parametrize("factor", [1e-300, 1e-160, 1e160, 1e300])
def test_squares_that_float64_does_not_hold(factor):
    """Once the ratio was 0, which is the start."""
    drawn = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
    states = [{"w": w} for w in drawn]
    states = [{"w": states[0]["w"] + 0.3 * s["w"]} for s in states]
    layout = CheckpointCollection(states).layout
    layers = group_layers(layout, layout, False)
    expected, _ = stock_ratios(CheckpointCollection(states), "checkpoint0", layers, {"w"}, print)
    scaled = CheckpointCollection([{"w": s["w"] * factor} for s in states])
    assert expected > 0
    assert stock_ratios(scaled, "checkpoint0", layers, {"w"}, print)[0] == pytest.approx(expected)


def test_an_infinite_constant_does_not_move(tmp_path):
    mask = torch.full((4,), -torch.inf)
    for k in range(3):
        save_file({"w": torch.randn(9), "mask": mask}, tmp_path / f"{k}.safetensors")
    paths = [str(tmp_path / f"{k}.safetensors") for k in range(3)]
    out = tmp_path / "o.safetensors"
    assert main(["stock", *paths[1:], "--start", paths[0], "-o", str(out)]) == 0
    assert torch.equal(load_file(out)["mask"], mask)


@pytest.mark.parametrize("layerwise", [False, lambda name: name.split(".")[0]])
def test_an_angle_may_be_of_many_tensors(zoo: Zoo, layerwise):
    ckpts = fine_tunings(4, 2)
    soup = ModelStockSoup(start="w0", layerwise=layerwise).fit(ckpts, zoo.X, zoo.y)
    w0, *tuned = (ckpts[name] for name in ckpts)
    label = layerwise or (lambda name: "all")
    for row in {label(t) for t in w0}:
        inside = [t for t in w0 if label(t) == row]
        flat = [torch.cat([(s[t] - w0[t]).flatten() for t in inside]) for s in tuned]
        cos = np.mean([float(torch.cosine_similarity(a, b, 0)) for a, b in combinations(flat, 2)])
        assert soup.cosines_[soup.layers_[inside[0]]] == pytest.approx(cos, abs=1e-9)
    assert soup.coef_.ndim == (2 if layerwise else 1)


def test_statistics_follow_the_weights_beside_them(zoo: Zoo):
    ckpts = fine_tunings(3, 4, batch_norm=True)
    soup = ModelStockSoup(start="w0").fit(ckpts, zoo.X, zoo.y)
    mean = (soup.layers_["norm.weight"], soup.layers_["norm.bias"])
    row = soup.coef_[soup.layers_["norm.running_mean"]]
    np.testing.assert_allclose(row, soup.coef_[list(mean)].mean(axis=0))


@pytest.mark.parametrize("as_module", [False, True])
def test_the_start_may_be_given_again(zoo: Zoo, as_module):
    ckpts = fine_tunings(3, 4)
    start: Any = ckpts["w0"]
    if as_module:
        start = Net(False, torch.float64)
        start.load_state_dict(ckpts["w0"])
    soup = ModelStockSoup(start=start).fit(ckpts.drop("w0"), zoo.X, zoo.y)
    half, known = soup.interpolate(start, 0.5), soup.interpolate("start", 0.5)
    assert same_tensors(half.state_dict(), known.state_dict())
    path = interpolation_path(start, soup, zoo.X, zoo.y, t=3)
    assert path.scores[-1] == soup.score(zoo.X, zoo.y)
    assert soup.recipe_.params["start"] == "start"
    with pytest.raises(ValueError, match="other pretrained weights were passed"):
        soup.interpolate(ckpts["a"], 0.5)


def test_the_command_line_gives_the_same_without_python(zoo: Zoo, tmp_path, capsys):
    ckpts = fine_tunings(3, 4, batch_norm=True)
    ckpts.drop("w0").save(tmp_path / "runs")
    save_file(ckpts["w0"], tmp_path / "base.safetensors")
    start, runs, out = (str(tmp_path / n) for n in ("base.safetensors", "runs", "out.safetensors"))
    assert main(["stock", runs, "--start", start, "-o", out]) == 0
    assert "4 checkpoints mixed" in capsys.readouterr().out
    soup = ModelStockSoup(start=ckpts["w0"]).fit(ckpts.drop("w0"), zoo.X, zoo.y)
    torch.testing.assert_close(load_file(out), soup.state_dict(), rtol=0, atol=0)
    assert Recipe.load(out).method == "stock"
    assert main(["verify", out, runs, start]) == 0
    assert main(["stock", runs, "--start", str(tmp_path / "no"), "-o", out, "--force"]) == 2
    assert "can read: there is no such file or folder" in capsys.readouterr().err


def test_rows_change_nothing(zoo: Zoo):
    ckpts = CheckpointCollection(make_states(4, 0, batch_norm=False), module=PlainNet)
    soups = [
        ModelStockSoup(start="checkpoint0").fit(ckpts, X, y)
        for X, y in ((zoo.X, zoo.y), (zoo.X[:6], zoo.y[:6]))
    ]
    assert np.array_equal(*(soup.coef_ for soup in soups))
    assert soups[0].counts_.n_backward == 0
    weights = mix(ckpts, soups[0].coef_, layers=soups[0].layers_)
    assert same_tensors(weights, soups[0].state_dict())
