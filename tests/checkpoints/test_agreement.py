"""Checkpoints of a collection fit each other, and so do names and scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError

from ..zoo import Net, make_states


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("head.bias"), r"lacks 'head\.bias', compared with"),
        (lambda s: s.update(extra=torch.ones(1)), "adds 'extra', compared with"),
        (
            lambda s: s.update({"head.weight": torch.ones(9, 6)}),
            r"'head\.weight' has shape \(9, 6\), expected \(3, 6\) as in",
        ),
        (
            lambda s: s.update({"head.bias": torch.ones(3, dtype=torch.int64)}),
            "expected a floating one",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_each_other(tmp_path, change, match):
    states = make_states(2, seed=0)
    change(states[1])
    for k, state in enumerate(states):
        save_file(state, tmp_path / f"ft{k}.safetensors")
    with pytest.raises(CheckpointError, match=match) as caught:
        CheckpointCollection.from_path(tmp_path)
    assert "ft1.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "dtypes", [(torch.float8_e4m3fn, torch.float32), (torch.uint16, torch.int64)]
)
def test_dtypes_that_do_not_mix_are_named(dtypes):
    states = [{"w": torch.zeros(2).to(dtype)} for dtype in dtypes]
    with pytest.raises(CheckpointError, match=f"'w' has dtype {dtypes[1]}, which torch can't"):
        CheckpointCollection(states)


@pytest.mark.parametrize(
    ("checkpoints", "match"),
    [
        ("runs/*.pt", "from_path"),
        (Net(), "Put them in a list"),
        (make_states(1, seed=0)[0], "is one state dict"),
        (3, "must be paths, modules or state dicts"),
        ([3], r"checkpoints\[0\] is a int"),
    ],
)
def test_what_is_not_a_collection(checkpoints, match):
    with pytest.raises(TypeError, match=match):
        CheckpointCollection(checkpoints)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"names": ["a"]}, ValueError, "names has 1 entries, expected 2"),
        ({"names": ["a", "a"]}, ValueError, "'a' more than once"),
        ({"names": ["a", ""]}, TypeError, "non-empty strings"),
        ({"scores": {"checkpoint0": 1.0}}, ValueError, "scores has no entry for 'checkpoint1'"),
        (
            {"scores": {"checkpoint0": 1.0, "checkpoint1": np.nan}},
            ValueError,
            "expected a finite number",
        ),
        ({"module": 3}, TypeError, "factory without arguments, an nn.Module"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        CheckpointCollection(make_states(2, seed=0), **kwargs)


def test_complex_numbers_are_refused():
    with pytest.raises(CheckpointError, match="complex"):
        CheckpointCollection([{"w": torch.ones(1, dtype=torch.complex64)}])
