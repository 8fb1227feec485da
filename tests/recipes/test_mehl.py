from __future__ import annotations

import math
import pickle
import threading
from itertools import chain
from shutil import which
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.callback import ProgressBar
from torch import nn

from sksoup import (
    CheckpointCollection,
    DivergenceError,
    LearnedSoup,
    MEHLSoup,
    SoupWarning,
    mix,
)
from sksoup.engine.center import Anchor
from sksoup.engine.deltas import ModelBatch
from sksoup.recipes.mehl import draw_model_batches
from sksoup.runtime.live_tensors import LiveTensors
from sksoup.runtime.memory import Budget

from ..references import descent_reference
from ..zoo import Net, PaperLearned, PaperMEHL, Zoo, around, same_tensors

# ---------------------------------------------------------------- against the slow version


@pytest.mark.parametrize("layerwise", [False, True])
def test_all_models_at_once_equals_hl_reference(zoo64: Zoo, layerwise):
    K = len(zoo64.checkpoints)
    n_rows = len(zoo64.checkpoints.layout) if layerwise else 1
    alpha = torch.zeros(n_rows, K, dtype=torch.float64, requires_grad=True)
    reference = descent_reference(
        zoo64.checkpoints,
        torch.as_tensor(zoo64.X).double(),
        torch.as_tensor(zoo64.y),
        lambda: alpha + (1 - alpha.sum(1, keepdim=True)) / K,
        [alpha],
        layerwise=layerwise,
        lr=0.1,
        max_epochs=4,
        batch_size=32,
        schedule="cosine",
    )
    soup = PaperMEHL(
        model_batch_size=None,
        layerwise=layerwise,
        lr=0.1,
        max_epochs=4,
        batch_size=32,
        shuffle=False,
        random_state=0,
    ).fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    np.testing.assert_allclose(np.atleast_2d(soup.coef_), reference, rtol=0, atol=1e-8)
    assert np.abs(soup.coef_ - 1 / K).max() > 0.01  # it went somewhere


def test_mehl_equals_a_reference_that_moves_one_block_at_a_time(zoo64: Zoo):
    """Every block of alpha by the slow graph, in the order the seed gives."""
    K, b = len(zoo64.checkpoints), 2
    alpha = torch.zeros(1, K, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for members in list(draw_model_batches(K, b, 2, generator)):
        leaf = alpha[:, members].clone().requires_grad_()

        def coef(leaf=leaf, members=members):
            full = alpha.clone()
            full[:, members] = leaf
            return full + (1 - full.sum(1, keepdim=True)) / K

        descent_reference(
            zoo64.checkpoints,
            torch.as_tensor(zoo64.X).double(),
            torch.as_tensor(zoo64.y),
            coef,
            [leaf],
            layerwise=False,
            lr=0.1,
            max_epochs=3,
            batch_size=32,
            schedule="cosine",
        )
        alpha[:, members] = leaf.detach()
    soup = PaperMEHL(
        model_batch_size=b,
        model_epochs=2,
        lr=0.1,
        max_epochs=3,
        batch_size=32,
        shuffle=False,
        random_state=3,
    ).fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    np.testing.assert_allclose(
        soup.coef_, Anchor.mean(alpha.shape[1]).affine_coef(alpha.numpy())[0], rtol=0, atol=1e-8
    )


def test_normalize_is_a_change_of_units(zoo64: Zoo):
    """One SGD step on unit-length deltas: alpha moves by -lr * gradient / norm^2."""
    settings = {
        "model_batch_size": None,
        "optimizer": "sgd",
        "schedule": "constant",
        "max_epochs": 1,
        "batch_size": None,
        "lr": 0.1,
    }
    raw = PaperMEHL(**settings).fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    unit = PaperMEHL(**settings, normalize=True).fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    K = len(zoo64.checkpoints)
    states = [torch.cat([v.flatten() for v in s.values()]) for s in zoo64.checkpoints.values()]
    norms = torch.stack([s - sum(states) / K for s in states]).norm(dim=1).numpy()
    # the deltas sum to 0, and with them the gradient: coef - 1/K is the raw step itself
    step = (raw.coef_ - 1 / K) / norms**2
    np.testing.assert_allclose(unit.coef_ - 1 / K, step - step.mean(), rtol=0, atol=1e-10)


# -------------------------------------------------------------------------- convergence


def quadratic_zoo(K: int, condition: float, seed: int):
    """Linear checkpoints and rows whose loss has Hessian eigenvalues in [1, condition] on the hull.

    Returns the collection, X, y, L, the loss of any weights, its minimum over the affine hull, W.
    """
    rng = np.random.default_rng(seed)
    d = K + 2
    W = rng.normal(size=(K, d))
    delta = W - W.mean(axis=0)
    _, s, Vt = np.linalg.svd(delta, full_matrices=False)
    s, V = s[: K - 1], Vt[: K - 1].T  # the hull has K - 1 dimensions
    Q, _ = np.linalg.qr(rng.normal(size=(K - 1, K - 1)))
    mu = np.concatenate([[1.0, condition], rng.uniform(1, condition, size=K)])[: K - 1]
    # H = 2 X'X / N, with delta H delta' = U Q diag(mu) Q' U'
    H = (V / s) @ Q @ np.diag(mu) @ Q.T @ (V / s).T + (np.eye(d) - V @ V.T)
    values, vectors = np.linalg.eigh(H)
    X = np.sqrt(d / 2) * (vectors * np.sqrt(values)) @ vectors.T  # (d, d), symmetric root
    y = rng.normal(size=d)
    checkpoints = CheckpointCollection(
        [{"weight": torch.as_tensor(w[None])} for w in W],
        module=lambda: nn.Linear(d, 1, bias=False).double(),
    )

    def loss(w: np.ndarray) -> float:
        return float(np.mean((X @ w - y) ** 2))

    coordinates, *_ = np.linalg.lstsq(X @ V, y - X @ W.mean(axis=0), rcond=None)
    L = float(np.linalg.eigvalsh(delta @ H @ delta.T).max())
    return checkpoints, X, y, L, loss, loss(W.mean(axis=0) + V @ coordinates), W


quadratics = given(
    K=st.integers(2, 5),
    b=st.integers(1, 5),
    condition=st.floats(1, 20),
    seed=st.integers(0, 10**6),
)


def fit_quadratic(checkpoints, X, y, *, b, L, model_epochs, max_epochs, seed):
    return PaperMEHL(
        model_batch_size=b,
        optimizer="sgd",
        schedule="constant",
        lr=1 / L,
        model_epochs=model_epochs,
        max_epochs=max_epochs,
        batch_size=None,
        task="regression",
        random_state=seed,
    ).fit(checkpoints, X, y)


@settings(max_examples=25)
@quadratics
def test_the_loss_never_rises_and_gradients_are_summable(K, b, condition, seed):
    checkpoints, X, y, L, loss, best, W = quadratic_zoo(K, condition, seed)
    soup = fit_quadratic(checkpoints, X, y, b=b, L=L, model_epochs=4, max_epochs=3, seed=seed)
    losses = np.concatenate([record["loss"] for record in soup.history_])
    norms = np.concatenate([record["grad_norm"] for record in soup.history_])
    start, end = loss(W.mean(axis=0)), loss(soup.coef_ @ W)
    np.testing.assert_allclose(losses[0], start, rtol=1e-9)
    assert (np.diff([*losses, end]) <= 1e-10 * start).all()
    # sum_t ||grad_B f||^2 <= 2 (f_0 - f*) / eta with eta = 1 / L
    assert (norms**2).sum() <= 2 * (start - best) * L * (1 + 1e-8) + 1e-12
    assert end >= best - 1e-10 * start


@settings(max_examples=6)
@example(K=5, b=2, condition=20.0, seed=0)
@quadratics
def test_it_reaches_the_optimum_over_the_affine_hull(K, b, condition, seed):
    """Block descent on p blocks with step 1/L contracts by 1 - 1 / (2 kappa (1 + p)) a pass.

    Beck & Tetruashvili, SIAM J. Optim. 23 (2013), Lemma 3.3 with all block constants set to L, and
    strong convexity on the hull; the same holds for any order of the blocks.
    """
    checkpoints, X, y, L, loss, best, W = quadratic_zoo(K, condition, seed)
    blocks = math.ceil(K / min(b, K))
    passes = math.ceil(2 * condition * (1 + blocks) * math.log(1e3))
    soup = fit_quadratic(checkpoints, X, y, b=b, L=L, model_epochs=passes, max_epochs=1, seed=seed)
    start = loss(W.mean(axis=0))
    assert loss(soup.coef_ @ W) - best <= 1e-3 * (start - best) + 1e-12 * start


# ------------------------------------------------------------------------------- promises


def deep() -> nn.Module:
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)], nn.Linear(64, 3))


def peak_models(tmp_path, soup) -> tuple[float, float]:
    """Peak and rest of all tensors alive, in models, without the module's weights and gradients."""
    torch.manual_seed(0)
    checkpoints = CheckpointCollection(around(deep(), 9), module=deep).save(tmp_path / "zoo")
    X, y = np.ones((8, 64), dtype=np.float32), np.arange(8) % 3
    with patch.dict("sksoup.engine.deltas.BLOCK", {"cpu": 512}), LiveTensors() as live:
        soup.fit(checkpoints, X, y)
    return live.peak / checkpoints.nbytes - 2, live.now / checkpoints.nbytes


ONE_TENSOR_AND_DATA = 0.15  # the tensor being read, the rows, the coefficients


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize(("delta_dtype", "width"), [(None, 1), ("bfloat16", 0.5)])
def test_never_more_memory_than_promised(tmp_path, b, layerwise, prefetch, delta_dtype, width):
    """Counted: b + 2 models, b/2 + 2 with bfloat16 deltas, and those read ahead."""
    peak, rest = peak_models(
        tmp_path,
        PaperMEHL(model_batch_size=b, layerwise=layerwise, prefetch=prefetch, max_epochs=1,
                 delta_dtype=delta_dtype, random_state=0),
    )  # fmt: skip
    promised = b * width + 2 + prefetch
    assert peak <= promised + ONE_TENSOR_AND_DATA
    assert peak > promised - 0.6  # the count is not blind
    assert rest < 1.1  # only the soup is left


def test_model_batches_cover_all_models_in_new_orders():
    generator = torch.Generator().manual_seed(0)
    drawn = list(draw_model_batches(7, 3, 2, generator))
    assert [len(members) for members in drawn] == [3, 3, 1, 3, 3, 1]
    assert sorted(chain(*drawn[:3])) == sorted(chain(*drawn[3:])) == list(range(7))
    assert drawn[:3] != drawn[3:]


def test_history_tells_the_story(zoo: Zoo):
    soup = PaperMEHL(model_batch_size=3, max_epochs=2, batch_size=25, random_state=0)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    assert [(r["outer"], r["epoch"]) for r in soup.history_] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert {name for r in soup.history_ for name in r["models"]} == set(zoo.checkpoints.names)
    assert all(len(r["loss"]) == len(r["grad_norm"]) == 3 for r in soup.history_)
    assert soup.counts_.n_backward == 18
    assert soup.model_batch_size_ == 3


def test_extrapolates(zoo: Zoo):
    soup = PaperMEHL(layerwise=True, lr=0.5, max_epochs=20, random_state=0)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    assert soup.coef_.min() < 0
    assert soup.coef_.max() > 1


def test_the_same_seed_gives_the_same_bits(zoo: Zoo):
    def fit(seed):
        soup = PaperMEHL(model_batch_size=2, layerwise=True, random_state=seed)
        return soup.fit(zoo.checkpoints, zoo.X, zoo.y)

    first, again, other = fit(0), fit(0), fit(1)
    assert np.array_equal(first.coef_, again.coef_)
    assert same_tensors(first.state_dict(), again.state_dict())
    assert not np.array_equal(first.coef_, other.coef_)


def test_frozen_layers_keep_equal_coefficients():
    from ..zoo import Net, make_states, make_zoo

    states = make_states(4, seed=0)
    for state in states:
        state["hidden.weight"] = states[0]["hidden.weight"].clone()
    zoo = make_zoo(4, seed=0)
    checkpoints = CheckpointCollection(states, module=Net)
    soup = PaperMEHL(layerwise=True, model_batch_size=2, random_state=0)
    soup.fit(checkpoints, zoo.X, zoo.y)
    assert soup.coef_[soup.layers_["hidden.weight"]].tolist() == [0.25] * 4
    assert torch.equal(soup.state_dict()["hidden.weight"], states[0]["hidden.weight"])


def test_divergence_names_the_outer_iteration_and_keeps_the_last_good_coefficients(zoo: Zoo):
    def breaks_late(output, y):
        calls.append(1)
        loss = torch.nn.functional.cross_entropy(output, y)
        return loss * (float("nan") if len(calls) == 8 else 1.0)

    calls: list[int] = []
    soup = PaperMEHL(
        model_batch_size=2, max_epochs=1, batch_size=20, criterion=breaks_late, random_state=0
    )
    with pytest.raises(
        DivergenceError, match=r"outer iteration 3 of 4, step 2\. Lower lr"
    ) as caught:
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    np.testing.assert_allclose(caught.value.coef.sum(axis=1), 1)
    assert np.isfinite(caught.value.coef).all()
    mix(zoo.checkpoints, caught.value.coef)
    assert not hasattr(soup, "coef_")


def test_a_learning_rate_that_is_too_high_is_named():
    checkpoints, X, y, L, *_ = quadratic_zoo(4, 5.0, seed=0)
    soup = PaperMEHL(
        optimizer="sgd",
        schedule="constant",
        lr=1e40 / L,
        max_epochs=40,
        batch_size=None,
        task="regression",
        random_state=0,
    )
    with pytest.raises(DivergenceError, match="outer iteration 1 of 1"):
        soup.fit(checkpoints, X, y)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"model_batch_size": 0}, "model_batch_size must be an int >= 1, None or 'auto', got 0"),
        ({"model_batch_size": True}, "got True"),
        ({"model_batch_size": "all"}, "got 'all'"),
        ({"memory_limit": "big"}, "memory_limit='big' is not a size"),
        ({"lr": 0}, "lr must be a finite number > 0, got 0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"max_epochs": 0}, "max_epochs must be an integer >= 1"),
        ({"model_epochs": 0}, "model_epochs must be an integer >= 1"),
        ({"optimizer": "lbfgs"}, "optimizer must be one of 'adamw', 'sgd', got 'lbfgs'"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"batch_size": 0}, "batch_size"),
        ({"task": "ranking"}, "task must be one of"),
    ],
)
def test_bad_parameters(zoo: Zoo, kwargs, match):
    with pytest.raises(ValueError, match=match):
        PaperMEHL(**kwargs).fit(zoo.checkpoints, zoo.X, zoo.y)


def test_bad_random_state(zoo: Zoo):
    with pytest.raises(TypeError, match="random_state must be"):
        PaperMEHL(random_state="seed").fit(zoo.checkpoints, zoo.X, zoo.y)


# -------------------------------------------------------------------------------- options

PLAIN = {"model_batch_size": 2, "max_epochs": 3, "lr": 0.1, "shuffle": False, "random_state": 3}


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_minibatches_are_one(zoo64: Zoo, layerwise, weighted):
    weight = np.linspace(0, 1, len(zoo64.y)) if weighted else None

    def fit(**settings):
        soup = PaperMEHL(layerwise=layerwise, **PLAIN, **settings)
        return soup.fit(zoo64.checkpoints, zoo64.X, zoo64.y, sample_weight=weight)

    whole, parts = fit(batch_size=28), fit(batch_size=7, accumulate=4)  # 60 rows: 28, 28, 4
    np.testing.assert_allclose(parts.coef_, whole.coef_, rtol=0, atol=1e-10)
    assert [len(record["loss"]) for record in parts.history_] == [3] * 9
    np.testing.assert_allclose(parts.history_[0]["loss"], whole.history_[0]["loss"])
    uneven = fit(batch_size=7, accumulate=1)
    assert np.abs(uneven.coef_ - whole.coef_).max() > 1e-6


def test_bfloat16_deltas_are_close(zoo: Zoo):
    settings = {"layerwise": True, **PLAIN}
    full = PaperMEHL(**settings).fit(zoo.checkpoints, zoo.X, zoo.y)
    half = PaperMEHL(delta_dtype=torch.bfloat16, **settings).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert 0 < np.abs(half.coef_ - full.coef_).max() < 0.05
    rebuilt = mix(zoo.checkpoints, half.coef_, layers=half.layers_)
    assert same_tensors(half.state_dict(), rebuilt)  # the deltas alone are rounded


@pytest.mark.parametrize("soup", [PaperMEHL, PaperLearned])
def test_bf16_runs_the_forward_pass_under_autocast(zoo: Zoo, soup):
    seen = set()

    class Spying(Net):
        def forward(self, x):
            out = super().forward(x)
            seen.add(out.dtype)
            return out

    checkpoints = CheckpointCollection(list(zoo.checkpoints.values()), module=Spying)
    half = soup(layerwise=True, precision="bf16", random_state=0).fit(checkpoints, zoo.X, zoo.y)
    assert seen == {torch.float32, torch.bfloat16}  # float32: the probe
    seen.clear()
    assert half.predict_proba(zoo.X).dtype == np.float32
    assert seen == {torch.float32}
    full = soup(layerwise=True, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert 0 < np.abs(half.coef_ - full.coef_).max() < 0.1


def test_autocast_leaves_float64_alone(zoo64: Zoo):
    full = PaperMEHL(**PLAIN).fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    half = PaperMEHL(precision="bf16", **PLAIN)
    # autocast gives float32 back, so the loss alone is rounded
    assert np.abs(half.fit(zoo64.checkpoints, zoo64.X, zoo64.y).coef_ - full.coef_).max() < 1e-4


@pytest.mark.skipif(which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_search_finds_the_same(zoo64: Zoo):
    plain = PaperMEHL(layerwise=True, batch_size=30, **PLAIN)
    plain.fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    compiled = clone(plain).set_params(compile=True).fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    np.testing.assert_allclose(compiled.coef_, plain.coef_, rtol=0, atol=1e-6)
    assert type(compiled.module_) is type(plain.module_)
    pickle.dumps(compiled.module_.state_dict())


def test_out_of_memory_halves_the_model_batch(zoo: Zoo, monkeypatch):
    """It starts again, and ends as if the smaller size had been given."""
    expected = PaperMEHL(layerwise=True, model_batch_size=2, random_state=0)
    expected.fit(zoo.checkpoints, zoo.X, zoo.y)
    steps = []
    original = ModelBatch.combine

    def combine(self, coef):
        steps.append(self.capacity)
        if self.capacity > 2 and len(steps) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, coef)

    monkeypatch.setattr(ModelBatch, "combine", combine)
    bar = ProgressBar()
    soup = PaperMEHL(layerwise=True, model_batch_size=None, random_state=0).set_callbacks(bar)
    with pytest.warns(SoupWarning, match="Memory ran out: starting again") as caught:
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    assert [str(w.message).split("=")[1][0] for w in caught] == ["4", "2"]
    assert caught[0].filename == __file__
    assert soup.model_batch_size_ == 2
    assert np.array_equal(soup.coef_, expected.coef_)
    # an open progress bar would keep the process from ending
    assert "RichProgressMonitor" not in {type(one).__name__ for one in threading.enumerate()}


@pytest.mark.parametrize("soup", [PaperMEHL(), PaperLearned()])
@pytest.mark.filterwarnings("ignore::sksoup.SoupWarning")  # Learned-Soup streams one model
def test_out_of_memory_with_one_model_is_an_error(zoo: Zoo, monkeypatch, soup):
    def combine(self, coef):
        raise MemoryError("not enough memory")

    monkeypatch.setattr(ModelBatch, "combine", combine)
    monkeypatch.setattr(Budget, "resolve", lambda self, wanted, n: 1)
    with pytest.raises(MemoryError):
        soup.fit(zoo.checkpoints, zoo.X, zoo.y)


def test_another_error_is_not_mistaken_for_lack_of_memory(zoo: Zoo, monkeypatch):
    def combine(self, coef):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(ModelBatch, "combine", combine)
    for soup in (PaperMEHL(), PaperLearned()):
        with pytest.raises(RuntimeError, match="shapes do not match"):
            soup.fit(zoo.checkpoints, zoo.X, zoo.y)


def test_the_limit_decides_the_model_batch(tmp_path, zoo: Zoo):
    files = zoo.checkpoints.save(tmp_path / "zoo")
    model = 4 * sum(v.size for v in files.layout.values() if v.is_floating)
    for options, expected in (
        ({}, 3),
        ({"prefetch": 0}, 4),
        ({"delta_dtype": "bfloat16"}, 6),
        ({"model_batch_size": 2}, 2),
    ):
        soup = PaperMEHL(memory_limit=6 * model, random_state=0, **options)
        assert soup.fit(files, zoo.X, zoo.y).model_batch_size_ == expected
    with pytest.raises(ValueError, match="is too small for a model batch of 7"):
        PaperMEHL(memory_limit=6 * model, model_batch_size=None).fit(files, zoo.X, zoo.y)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"precision": "fp16"}, "precision must be one of 'fp32', 'bf16', got 'fp16'"),
        ({"delta_dtype": "int8"}, "delta_dtype must be None"),
        ({"accumulate": 0}, "accumulate must be an integer >= 1, got 0"),
    ],
)
@pytest.mark.parametrize("soup", [MEHLSoup, LearnedSoup])
def test_options_that_are_none(zoo: Zoo, soup, settings, match):
    with pytest.raises(ValueError, match=match):
        soup(**settings).fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(ValueError, match="prefetch == -1, must be >= 0"):
        PaperMEHL(prefetch=-1).fit(zoo.checkpoints, zoo.X, zoo.y)


def test_held_out_rows_that_stay_on_the_host_give_the_same_bits(zoo: Zoo, monkeypatch):
    resident = PaperMEHL(batch_size=16, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    monkeypatch.setattr("sksoup.recipes.validation.fits", lambda rows, device: False)
    streamed = PaperMEHL(batch_size=16, random_state=0).fit(zoo.checkpoints, zoo.X, zoo.y)
    assert np.array_equal(streamed.coef_, resident.coef_)
    assert not [t for t in threading.enumerate() if t.name.startswith("sksoup-batches")]


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_weights_are_those_of_a_plain_script(zoo64: Zoo, layerwise):
    """Algorithm 1 as `benchmarks.reference` writes it: loops over the models and parameters."""
    from benchmarks import reference

    soup = PaperMEHL(layerwise=layerwise, schedule="constant", batch_size=25, **PLAIN)
    soup.fit(zoo64.checkpoints, zoo64.X, zoo64.y)
    names = zoo64.checkpoints.names
    order = [names.index(n) for r in soup.history_ if r["epoch"] == 0 for n in r["models"]]
    expected = reference.mehl(
        zoo64.checkpoints.build_module().eval(),
        lambda k: zoo64.checkpoints[names[k]],
        len(names),
        torch.as_tensor(zoo64.X).double(),
        torch.as_tensor(zoo64.y),
        25,
        b=PLAIN["model_batch_size"],
        layerwise=layerwise,
        lr=PLAIN["lr"],
        max_epochs=PLAIN["max_epochs"],
        order=order,
        shuffle=False,
    )
    torch.testing.assert_close(soup.state_dict(), expected, rtol=0, atol=1e-8)
    assert np.abs(soup.coef_ - 1 / len(names)).max() > 0.01  # it went somewhere


@pytest.mark.parametrize("kind", [MEHLSoup, LearnedSoup])
def test_runs_of_several_dtypes_may_share_an_infinite_constant(kind):
    class Masked(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

        def forward(self, X: torch.Tensor) -> torch.Tensor:
            return super().forward(X) * self.mask.exp().sum()

    torch.manual_seed(0)
    X, nets = torch.randn(60, 4), [Masked() for _ in range(3)]
    y = torch.arange(60) % 3
    states = [net.state_dict() for net in nets]
    states[1] = {name: w.half() for name, w in states[1].items()}
    soup = kind(max_epochs=3).fit(CheckpointCollection(states, module=Masked), X, y)
    assert not any("NaN" in message for message in soup.warnings_)
    assert soup.module_.mask.tolist() == [0.0, -torch.inf]
