from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sksoup import CheckpointCollection
from sksoup.mixing.running_mean import RunningMean

from ..references import mean_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def mean_of(checkpoints, kept, candidate):
    mean = RunningMean(checkpoints.layout)
    mean.extend(checkpoints, kept)
    with checkpoints.open(checkpoints.names[candidate]) as read:
        return mean, mean.mean_with(candidate, read)


@given(dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=6), data=st.data())
def test_equals_the_mean_of_all(dtypes, data):
    """Stacked, in float64, cast once; in any order, with tensors and whole checkpoints repeated."""
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    frozen = torch.linspace(-1, 7.3, 50, dtype=torch.float64)
    frozen[:2] = torch.tensor([-torch.inf, -0.0])
    states = []
    for k, dtype in enumerate(dtypes):
        w = torch.as_tensor(rng.normal(size=(3, 4)))
        state = {
            "w": w.to(dtype), "running_var": (w - 0.5).to(dtype), "scalar": w[0, 0].to(dtype),
            "frozen": frozen, "n": torch.tensor(10 * k), "flags": torch.tensor([k > 2]),
        }  # fmt: skip
        states.append(data.draw(st.sampled_from([state, *states])))
    checkpoints = CheckpointCollection(states)
    *kept, candidate = data.draw(st.permutations(range(len(states))))
    n = data.draw(st.integers(0, len(kept)))
    _, found = mean_of(checkpoints, kept[:n], candidate)
    expected = mean_reference([states[k] for k in sorted([*kept[:n], candidate])])
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        if name in ("n", "flags", "frozen"):
            assert torch.equal(value, expected[name])
            continue
        largest = max(float(state[name].abs().max()) for state in states)  # sums may cancel
        within = 4 * torch.finfo(value.dtype).eps * largest
        if value.dtype.itemsize == 4:  # float64 sums: the same rounding
            within = 0
        torch.testing.assert_close(value, expected[name], rtol=0, atol=within)
        assert name != "running_var" or value.min() >= 0
    assert torch.equal(found["frozen"].view(torch.int64), frozen.view(torch.int64))


def test_constants_that_differ_in_the_sign_of_zero_stay_infinite():
    a = {"mask": torch.tensor([-torch.inf, torch.inf, 0.0])}
    b = {"mask": torch.tensor([-torch.inf, torch.inf, -0.0])}
    _, found = mean_of(CheckpointCollection([a, a, b]), [0, 1], 2)
    assert found["mask"].tolist() == [-torch.inf, torch.inf, 0.0]


def test_many_small_steps_are_not_lost():
    """Sums of float32 weights are exact here; in float32 they would stop growing."""
    states = [{"w": torch.tensor([2.0**20 + k % 2])} for k in range(400)]
    checkpoints = CheckpointCollection(states)
    _, found = mean_of(checkpoints, list(range(399)), 399)
    assert found["w"].item() == 2.0**20 + 1 / 2 == mean_reference(states)["w"].item()


@pytest.mark.parametrize(
    ("dtype", "large"),
    [(torch.bfloat16, 1e3), (torch.bfloat16, 1e8), (torch.bfloat16, 3e38), (torch.float16, 6e4),
     (torch.float32, 1e8), (torch.float32, 1e20), (torch.float64, 1e200)],
)  # fmt: skip
def test_what_is_left_of_a_sum_without_one_that_diverged_is_the_others(dtype, large):
    """Once it was the rounding of the sum."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 4) for _ in range(4)]
    weights[2] = weights[2].clamp(-1, 1).to(dtype) * large
    checkpoints = CheckpointCollection([{"w": w.to(dtype), "b": torch.ones(2)} for w in weights])

    def without(mean, dropped, k):
        mean.leave_out(checkpoints, dropped)
        with checkpoints.open(f"checkpoint{k}") as read:
            found = mean.mean_without(read)
        left = [i for i in range(4) if i not in (*dropped, k)]
        if found is not None:
            expected = mean_reference([checkpoints[f"checkpoint{i}"] for i in left])
            rtol = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(found["w"], expected["w"], rtol=rtol, atol=rtol)
        return found

    without(RunningMean(checkpoints.layout), [], 2)
    mean = RunningMean(checkpoints.layout)
    assert without(mean, [2], 0) is not None
    assert without(mean, [2, 0], 3) is not None


def test_nothing_is_added_by_looking_and_nothing_read_twice():
    states = [{"w": torch.tensor([float(k)]), "n": torch.tensor(k)} for k in range(4)]
    checkpoints = CheckpointCollection(states)
    mean, _ = mean_of(checkpoints, [2], 0)
    with checkpoints.open("checkpoint3") as read:
        assert mean.mean_with(3, read) == {"w": torch.tensor([2.5]), "n": torch.tensor(2)}
        mean.add(3, read)
    mean.extend(checkpoints, [2, 3])
    with checkpoints.open("checkpoint1") as read:
        assert mean.mean_with(1, read) == {"w": torch.tensor([2.0]), "n": torch.tensor(1)}
    assert states[2] == {"w": torch.tensor([2.0]), "n": torch.tensor(2)}


def test_a_sum_that_is_mapped_read_only_serves(tmp_path):
    """As joblib's workers have it."""
    states = [{"w": torch.randn(3, 2), "s": torch.tensor(float(k))} for k in range(3)]
    checkpoints = CheckpointCollection(states)
    mean, expected = mean_of(checkpoints, [0, 1], 2)
    for name, value in mean._values.items():
        np.save(tmp_path / f"{name}.npy", value)
        mean._values[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    with checkpoints.open("checkpoint2") as read:
        found = mean.mean_with(2, read)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
