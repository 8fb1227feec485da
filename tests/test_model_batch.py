from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from sksoup import CheckpointCollection
from sksoup._layout import group_layers
from sksoup._model_batch import model_batches, parse_bytes, resolve_model_batch_size
from sksoup._objective import load_weights

from .references import stacked
from .zoo import Net, Net64, make_states


def problem_of(checkpoints, layerwise):
    module = checkpoints.build_module().eval()
    layers = group_layers(module, checkpoints.layout, layerwise)
    return SimpleNamespace(checkpoints=checkpoints, module=module, layers=layers)


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

    with model_batches(problem, None) as batch:
        if n == 1:
            assert batch is None  # one checkpoint is equal to itself: nothing to search
            return
        batch.load(checkpoints, checkpoints.names)
        batch.combine(alpha)
        for name, value in problem.module.state_dict().items():
            torch.testing.assert_close(value, mixed[name].detach(), rtol=0, atol=1e-12)
        torch.nn.functional.cross_entropy(problem.module(X), y).backward()
        fast = batch.project(n_rows)
    torch.testing.assert_close(fast, naive.grad, rtol=1e-8, atol=1e-10)


def test_frozen_tensors_take_no_part_and_no_gradient():
    states = make_states(4, seed=0)
    for state in states:
        state["hidden.weight"] = states[0]["hidden.weight"].clone()
    problem = problem_of(CheckpointCollection(states, module=Net), True)
    with model_batches(problem, 2) as batch:
        assert "hidden.weight" not in {s.name for s in batch.layout.segments}
        assert not problem.module.hidden.weight.requires_grad
        assert problem.module.head.weight.requires_grad
        batch.load(problem.checkpoints, problem.checkpoints.names[:2])
        assert batch.norms(problem.layers.n_searched)[:, 0].tolist() == [1, 1]  # zero, not divided
    assert problem.module.hidden.weight.requires_grad


def test_buffers_follow_their_neighbours_and_variances_stay_positive():
    checkpoints = CheckpointCollection(make_states(3, seed=0), module=Net)
    problem = problem_of(checkpoints, False)
    weights = stacked(checkpoints)
    with model_batches(problem, None) as batch:
        batch.load(checkpoints, checkpoints.names)
        batch.combine(torch.tensor([[30.0], [-30.0], [0.0]]))
        var, mean = problem.module.norm.running_var, problem.module.norm.running_mean
        w = weights["norm.running_mean"]
        torch.testing.assert_close(mean, w.mean(0) + 30 * (w[0] - w[1]), rtol=1e-4, atol=1e-4)
        assert (var >= 0).all()
        assert (var == 0).any()


def test_the_module_is_an_ordinary_one_again_afterwards():
    checkpoints = CheckpointCollection(make_states(3, seed=0), module=Net)
    problem = problem_of(checkpoints, True)
    with model_batches(problem, None):
        pass
    parameters = list(problem.module.parameters())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.grad is None and p.requires_grad for p in parameters)
    load_weights(problem.module, checkpoints["checkpoint1"])
    problem.module(torch.ones(2, 4)).sum().backward()


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, 1), ("8GB", 8 * 10**9), ("1.5 mb", 1_500_000), (2**40, 2**40)]
)
def test_memory_limits(limit, expected):
    assert parse_bytes(limit) == expected


@pytest.mark.parametrize("limit", ["8", "many GB", "GB"])
def test_memory_limits_that_are_none(limit):
    with pytest.raises(ValueError, match=r"is not a size"):
        parse_bytes(limit)
    with pytest.raises(ValueError, match="must be positive"):
        parse_bytes(0)


def test_auto_takes_what_the_limit_holds():
    cpu = torch.device("cpu")
    assert resolve_model_batch_size("auto", 72, 100, 2000, cpu) == 18  # 20 models, 2 of them fixed
    assert resolve_model_batch_size("auto", 72, 100, 150, cpu) == 1
    assert resolve_model_batch_size("auto", 5, 100, None, cpu) == 5
    assert resolve_model_batch_size(None, 5, 100, 1, cpu) == 5
    assert resolve_model_batch_size(9, 5, 100, 1, cpu) == 5
