from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from sksoup import CheckpointCollection
from sksoup.engine.center import Anchor, FlatLayout, centered
from sksoup.engine.deltas import ModelBatch, resolve_delta_dtype
from sksoup.engine.objective import load_weights
from sksoup.engine.streamed import StreamedBatch
from sksoup.mixing.layers import group_layers

from ..references import stacked
from ..zoo import Net, Net64, make_states


class Net64BatchNorm(Net):
    def __init__(self):
        super().__init__(dtype=torch.float64)


@contextmanager
def model_batch(problem, b, delta_dtype=None, kind=ModelBatch):
    with centered(problem, Anchor.mean(len(problem.checkpoints))) as center:
        if center is None:
            yield None
            return
        dtype = delta_dtype or center.weights.dtype
        batch = kind(center, b or len(problem.checkpoints), dtype)
        try:
            yield batch
        finally:
            batch.release()


def problem_of(checkpoints, layerwise):
    module = checkpoints.build_module().eval()
    layers = group_layers(module, checkpoints.layout, layerwise)
    objective = SimpleNamespace(module=module)
    return SimpleNamespace(
        checkpoints=checkpoints, module=module, layers=layers, objective=objective
    )


def layers_of(module, layerwise):
    return group_layers(module, list(module.state_dict()), layerwise)


def test_tied_parameters_share_a_place():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    flat = FlatLayout.of(module, layers_of(module, True), set(module.state_dict()))
    assert [s.name for s in flat.segments] == ["0.weight", "0.bias", "1.bias"]


def test_flat_layout_is_contiguous_per_row_parameters_first():
    module = Net()
    labels = {"hidden.weight": "a", "head.weight": "a"}
    layers = layers_of(module, lambda name: labels.get(name, "b"))
    differing = {n for n, v in module.state_dict().items() if v.is_floating_point()}
    flat = FlatLayout.of(module, layers, differing)
    assert [s.row for s in flat.segments] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert flat.row_slices[0] == (0, 0, 42)
    assert flat.n_parameters == sum(p.numel() for p in module.parameters())
    assert flat.size == flat.n_parameters + 12
    ends = [(s.where.start, s.where.stop) for s in flat.segments]
    assert all(a[1] == b[0] for a, b in pairwise(ends))


@settings(max_examples=25)
@given(
    n=st.integers(1, 6),
    seed=st.integers(0, 999),
    layerwise=st.sampled_from([False, True, lambda name: name.split(".")[0]]),
)
def test_projection_equals_autograd_through_the_graph_over_all_models(n, seed, layerwise):
    """Eq. 6 in float64, at any point of the hyperplane, for any grouping into layers."""
    checkpoints = CheckpointCollection(
        make_states(n, seed, torch.float64, batch_norm=False), module=Net64
    )
    rng = np.random.default_rng(seed)
    X = torch.as_tensor(rng.normal(size=(9, 4)))
    y = torch.as_tensor(rng.integers(0, 3, size=9))
    problem = problem_of(checkpoints, layerwise)
    rows, n_rows = problem.layers.rows, problem.layers.n_searched
    alpha = torch.as_tensor(rng.normal(size=(n, n_rows)) * 0.5)

    naive = alpha.clone().requires_grad_()
    weights = stacked(checkpoints)
    mixed = {
        name: w.mean(0) + torch.tensordot(naive[:, rows[name]], w - w.mean(0), dims=1)
        for name, w in weights.items()
    }
    output = functional_call(checkpoints.build_module().eval(), mixed, (X,))
    torch.nn.functional.cross_entropy(output, y).backward()

    with model_batch(problem, None) as batch:
        if n == 1:
            assert batch is None  # one checkpoint is equal to itself: nothing to search
            return
        batch.load(checkpoints.names)
        batch.combine(alpha)
        for name, value in problem.module.state_dict().items():
            torch.testing.assert_close(value, mixed[name].detach(), rtol=0, atol=1e-12)
        torch.nn.functional.cross_entropy(problem.module(X), y).backward()
        fast = batch.project()
    torch.testing.assert_close(fast, naive.grad, rtol=1e-8, atol=1e-10)


def test_frozen_tensors_take_no_part_and_no_gradient():
    states = make_states(4, seed=0)
    for state in states:
        state["hidden.weight"] = states[0]["hidden.weight"].clone()
    problem = problem_of(CheckpointCollection(states, module=Net), True)
    with model_batch(problem, 2) as batch:
        assert "hidden.weight" not in {s.name for s in batch.layout.segments}
        assert not problem.module.hidden.weight.requires_grad
        assert problem.module.head.weight.requires_grad
        batch.load(problem.checkpoints.names[:2])
        assert batch.norms()[:, 0].tolist() == [1, 1]  # zero, not divided
    assert problem.module.hidden.weight.requires_grad


def test_buffers_follow_their_neighbors_and_variances_stay_positive():
    checkpoints = CheckpointCollection(make_states(3, seed=0), module=Net)
    problem = problem_of(checkpoints, False)
    weights = stacked(checkpoints)
    with model_batch(problem, None) as batch:
        batch.load(checkpoints.names)
        batch.combine(torch.tensor([[30.0], [-30.0], [0.0]]))
        var, mean = problem.module.norm.running_var, problem.module.norm.running_mean
        w = weights["norm.running_mean"]
        torch.testing.assert_close(mean, w.mean(0) + 30 * (w[0] - w[1]), rtol=1e-4, atol=1e-4)
        assert (var >= 0).all()
        assert (var == 0).any()


def test_the_module_is_an_ordinary_one_again_afterwards():
    checkpoints = CheckpointCollection(make_states(3, seed=0), module=Net)
    problem = problem_of(checkpoints, True)
    with model_batch(problem, None):
        pass
    parameters = list(problem.module.parameters())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.grad is None and p.requires_grad for p in parameters)
    load_weights(problem.module, checkpoints["checkpoint1"])
    problem.module(torch.ones(2, 4)).sum().backward()


@settings(max_examples=25)
@given(n=st.integers(2, 5), seed=st.integers(0, 99), block=st.integers(1, 40))
def test_narrow_deltas_are_rounded_once_and_summed_in_full_width(n, seed, block):
    """bfloat16 deltas, widened a block at a time, against plain algebra on the rounded deltas."""
    checkpoints = CheckpointCollection(
        make_states(n, seed, torch.float64, batch_norm=False), module=Net64
    )
    problem = problem_of(checkpoints, True)
    rng = np.random.default_rng(seed)
    rows, n_rows = problem.layers.rows, problem.layers.n_searched
    alpha = torch.as_tensor(rng.normal(size=(n, n_rows)))
    with (
        patch.dict("sksoup.engine.deltas.BLOCK", {"cpu": block}),
        model_batch(problem, None, torch.bfloat16) as batch,
    ):
        batch.load(checkpoints.names)
        assert batch.deltas.dtype == torch.bfloat16
        batch.combine(alpha)
        expected = torch.zeros(n, n_rows, dtype=torch.float64)
        for name, w in stacked(checkpoints).items():
            delta = (w - w.mean(0)).bfloat16().double()
            mixed = w.mean(0) + torch.tensordot(alpha[:, rows[name]], delta, dims=1)
            torch.testing.assert_close(problem.module.state_dict()[name], mixed, rtol=0, atol=1e-12)
            gradient = torch.as_tensor(rng.normal(size=w.shape[1:]))
            problem.module.get_parameter(name).grad.copy_(gradient)
            expected[:, rows[name]] += torch.tensordot(delta, gradient, dims=gradient.ndim)
        torch.testing.assert_close(batch.project(), expected, rtol=0, atol=1e-10)
        norms = batch.norms()
        weight = (stacked(checkpoints)["head.weight"]).flatten(1)
        delta = (weight - weight.mean(0)).bfloat16().double()
        torch.testing.assert_close(norms[:, rows["head.weight"]], delta.norm(dim=1))


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_streamed_models_are_the_same_two_operations(capacity):
    checkpoints = CheckpointCollection(make_states(5, 0, torch.float64), module=Net64BatchNorm)
    problem = problem_of(checkpoints, True)
    coef = torch.rand(5, problem.layers.n_searched, dtype=torch.float64)
    with model_batch(problem, None) as batch:
        batch.load(checkpoints.names)
        batch.combine(coef)
        weights = batch.flat.weights.clone()
        batch.flat.grad.copy_(weights[: len(batch.flat.grad)])
        gradient, norms = batch.project(), batch.norms()
        batch.commit(coef)
        batch.combine(coef)
        twice = batch.flat.weights.clone()
    with model_batch(problem, capacity, kind=StreamedBatch) as streamed:
        streamed.load(checkpoints.names)
        streamed.combine(coef)
        torch.testing.assert_close(streamed.flat.weights, weights)
        streamed.flat.grad.copy_(weights[: len(streamed.flat.grad)])
        torch.testing.assert_close(streamed.project(), gradient)
        torch.testing.assert_close(streamed.norms(), norms)
        streamed.commit(coef)
        streamed.combine(coef)
        torch.testing.assert_close(streamed.flat.weights, twice)


def test_dtypes_of_deltas():
    for given_, expected in (
        (None, torch.float64),
        ("bfloat16", torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        assert resolve_delta_dtype(given_, torch.float64) == expected
    for wrong in ("half", torch.float16, 16):
        with pytest.raises(ValueError, match="delta_dtype must be None"):
            resolve_delta_dtype(wrong, torch.float32)
