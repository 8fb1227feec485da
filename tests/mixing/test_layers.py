from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sksoup import CheckpointError
from sksoup.checkpoints.protocol import TensorInfo
from sksoup.mixing.layers import group_layers

from ..zoo import Net


def rows_of(module, layerwise):
    return group_layers(module, list(module.state_dict()), layerwise)


def test_one_row_for_all_without_layerwise():
    layers = rows_of(Net(), False)
    assert layers.names == ("all",)
    assert set(layers.rows.values()) == {0}


def test_a_row_per_parameter_and_a_mean_for_buffers():
    layers = rows_of(Net(), True)
    assert layers.names[:6] == (
        "hidden.weight",
        "hidden.bias",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    )
    assert layers.names[6] == "norm (buffers: mean of 2 rows)"
    assert layers.rows["norm.running_var"] == layers.rows["norm.running_mean"] == 6
    searched = np.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(layers.expand(searched)[6], searched[2:4].mean(axis=0))
    np.testing.assert_array_equal(
        layers.expand_columns(torch.as_tensor(searched.T)).T.numpy(), layers.expand(searched)
    )


def test_a_callable_names_the_layers():
    layers = rows_of(Net(), lambda name: name.split(".")[0])
    assert layers.names == ("hidden", "norm", "head")
    assert layers.rows["norm.running_mean"] == 1  # one neighboring row: no mean is needed


def test_a_buffer_without_neighbors_takes_its_ancestors_rows():
    module = nn.Sequential(
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False)), nn.Linear(3, 1)
    )
    layers = rows_of(module, True)
    assert layers.averaged == ((0, 1),)  # the inner Linear's, not the outer one's
    module.register_buffer("top", torch.zeros(1))
    assert (0, 1, 2, 3) in rows_of(module, True).averaged


def test_tied_parameters_share_a_row():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    layers = rows_of(module, True)
    assert layers.rows["0.weight"] == layers.rows["1.weight"]


def test_a_module_without_parameters():
    with pytest.raises(CheckpointError, match="no parameters"):
        rows_of(nn.BatchNorm1d(2, affine=False), True)


class Name(str):
    """A name that counts how often its beginning is looked at."""

    looks = 0

    def startswith(self, *args):
        Name.looks += 1
        return super().startswith(*args)


def layout_of(names):
    return {name: TensorInfo((1,), torch.float32) for name in names}


modules = st.lists(st.sampled_from(["a", "b", "a0"]), max_size=3)


@given(
    parameters=st.sets(modules.map(lambda m: ".".join([*m, "w"])), min_size=1),
    statistics=st.sets(modules.map(lambda m: ".".join([*m, "running_mean"]))),
)
def test_rows_of_statistics_agree_with_a_look_at_all_parameters(parameters, statistics):
    parameters = sorted(parameters)
    layers = group_layers(layout_of([*parameters, *statistics]), [*statistics], True)
    for name in statistics:
        owner = name.rpartition(".")[0]
        near = [n for n in parameters if n.rpartition(".")[0] == owner]
        while not near:
            near = [n for n in parameters if not owner or n.startswith(f"{owner}.")]
            owner = owner.rpartition(".")[0]
        wanted = tuple(map(parameters.index, near))
        row = layers.rows[name]
        found = (row,) if row < len(parameters) else layers.averaged[row - len(parameters)]
        assert found == wanted


def test_parameters_are_not_gone_through_once_for_each_statistic():
    names = [Name(f"p{k}") for k in range(100)]
    Name.looks = 0
    statistics = [f"b{k}.running_mean" for k in range(100)]
    layers = group_layers(layout_of([*names, *statistics]), statistics, True)
    assert layers.averaged == (tuple(range(100)),)
    assert Name.looks <= 300
