from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from sksoup import CheckpointCollection, Recipe, SoupWarning, mix
from sksoup.checkpoints.health import Health
from sksoup.checkpoints.protocol import TensorInfo
from sksoup.checkpoints.write import write_shards

from ..references import mix_reference
from ..zoo import make_states, same_tensors

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@st.composite
def mixes(draw):
    """Checkpoints with frozen, integer and variance tensors; any coefficients that sum to 1."""
    n = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    frozen = torch.as_tensor(rng.normal(size=3)).to(dtype)
    states = [
        {
            "a": torch.as_tensor(rng.normal(size=(2, 3))).to(dtype),
            "frozen": frozen.clone(),
            "b.running_var": torch.as_tensor(rng.uniform(0, 1, size=4)).to(dtype),
            "count": torch.tensor(int(rng.integers(100))),
            "scalar": torch.as_tensor(rng.normal()).to(dtype),
        }
        for _ in range(n)
    ]
    n_rows = draw(st.integers(1, 3))
    values = st.sampled_from([0.0, 0.25, -1.5, 1 / 3, 2.0])
    coef = draw(hnp.arrays(np.float64, (n_rows, n), elements=values))
    coef[:, 0] += 1 - coef.sum(axis=1)
    rows = {name: draw(st.integers(0, n_rows - 1)) for name in states[0]}
    return states, coef, rows


@given(mixes())
def test_mix_equals_the_obvious_version_bit_for_bit(case):
    states, coef, rows = case
    assert same_tensors(mix(states, coef, layers=rows), mix_reference(states, coef, rows))


@given(st.integers(1, 6), st.sampled_from(DTYPES), st.integers(0, 99))
def test_copies_of_one_checkpoint_give_exactly_it(n, dtype, seed):
    state = make_states(1, seed, dtype)[0]
    rng = np.random.default_rng(seed)
    coef = rng.normal(size=n)
    coef[-1] += 1 - coef.sum()
    assert same_tensors(mix([state] * n, coef), state)


@given(st.integers(1, 6), st.integers(0, 5))
def test_a_one_hot_mix_is_that_checkpoint(n, which):
    states = make_states(n, seed=0)
    which %= n
    assert same_tensors(mix(states, np.eye(n)[which]), states[which])


def test_half_precision_accumulates_in_float32():
    # each of the small terms is below half a unit in the last place of a float16 accumulator
    states = [{"w": torch.tensor([1.0]).half()}] + [{"w": torch.tensor([2e-4]).half()}] * 63
    mixed = mix(states, np.full(64, 1 / 64))["w"]
    expected = (1.0 + 63 * states[1]["w"].double().item()) / 64
    assert mixed.dtype == torch.float16
    assert abs(mixed.double().item() - expected) <= 2.0**-17  # half a unit of the result


def test_promotes_only_over_the_checkpoints_that_are_mixed():
    states = [
        {"w": torch.ones(2).bfloat16()},
        {"w": 2 * torch.ones(2).bfloat16()},
        {"w": torch.ones(2)},
    ]
    assert mix(states, [0.5, 0.5, 0.0])["w"].dtype == torch.bfloat16
    assert mix(states, [0.5, 0.0, 0.5])["w"].dtype == torch.float32


def test_integers_come_from_the_largest_mean_coefficient_the_first_on_ties():
    states = [{"w": torch.ones(1) * k, "n": torch.tensor(k)} for k in range(3)]
    assert mix(states, [0.2, 0.5, 0.3])["n"].item() == 1
    assert mix(states, [0.4, 0.4, 0.2])["n"].item() == 0


def test_tables_of_integers_that_differ_are_warned_of(tmp_path):
    """Weights quantized to int8, as in files without a config that says so."""
    states = [
        {"q": torch.full((2, 2), k, dtype=torch.int8), "scale": torch.ones(2) * k,
         "index": torch.arange(4).reshape(2, 2), "steps": torch.tensor([k])}
        for k in range(3)
    ]  # fmt: skip
    match = r"but 'q' differ between .*Dequantize the checkpoints"
    with pytest.warns(SoupWarning, match=match) as caught:
        mix(states, [0.0, 0.4, 0.6])
    assert caught[0].filename == __file__
    with pytest.warns(SoupWarning, match=match):
        mix(states, [0.0, 0.4, 0.6], out=tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mix(states, [0.0, 0.0, 1.0])
        mix([states[1], states[1]], [0.5, 0.5])


def test_a_series_or_a_frame_is_taken_by_its_names():
    states = CheckpointCollection({"a": {"w": torch.zeros(1)}, "b": {"w": torch.ones(1)}})
    coef = pd.Series({"b": 0.75, "a": 0.25})
    assert mix(states, coef)["w"].item() == 0.75
    assert mix(states, coef.reset_index(drop=True))["w"].item() == 0.25
    with pytest.raises(ValueError, match=r"index 'b', 'c', expected the names .* 'a', 'b'"):
        mix(states, coef.set_axis(["b", "c"]))
    rows = pd.DataFrame([coef])
    assert mix(states, rows)["w"].item() == 0.75
    with pytest.raises(ValueError, match=r"columns 'b', 'c', expected the names"):
        mix(states, rows.set_axis(["b", "c"], axis=1))
    for named in (coef, rows):
        recipe = Recipe.record("uniform", states, named, layers={"w": 0})
        assert recipe.cook(states)["w"].item() == 0.75


def test_complex_coefficients_and_rows_between_two_are_refused():
    states = [{"w": torch.zeros(1)}, {"w": torch.ones(1)}]
    with pytest.raises(ValueError, match="coef is complex"):
        mix(states, [0.5 + 1j, 0.5 - 1j])
    with pytest.raises(ValueError, match=r"layers\['w'\] is 0\.9, expected a row"):
        mix(states, [0.5, 0.5], layers={"w": 0.9})


def test_variances_never_become_negative():
    states = [
        {"bn.running_var": torch.tensor([1.0, 0.0])},
        {"bn.running_var": torch.tensor([0.0, 1.0])},
    ]
    assert mix(states, [2.0, -1.0])["bn.running_var"].tolist() == [2.0, 0.0]


def test_a_coefficient_of_zero_is_not_read(tmp_path):
    collection = CheckpointCollection(make_states(3, seed=0)).save(tmp_path / "zoo")
    (tmp_path / "zoo" / "checkpoint1.safetensors").unlink()
    mix(collection, [0.5, 0.0, 0.5])  # the missing file has coefficient 0


def test_unused_checkpoints_do_not_change_bits():
    used = make_states(2, seed=0)
    unused = {n: w.double() if w.is_floating_point() else w for n, w in used[0].items()}
    mixed = mix([*used, unused], [0.3, 0.7, 0.0])
    assert same_tensors(mixed, mix(used, [0.3, 0.7]))


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("n", [2, 3])
def test_an_infinite_constant_is_copied(other, n):
    mask = torch.tensor([0.0, -torch.inf])
    states = [{"w": torch.ones(1) * k, "mask": mask} for k in range(n - 1)]
    states.append({"w": torch.ones(1), "mask": mask.to(other)})
    mixed = mix(states, np.full(n, 1 / n))["mask"]
    assert mixed.dtype == torch.promote_types(torch.float32, other)
    assert torch.equal(mixed, mask.to(mixed.dtype))


@pytest.mark.parametrize(
    ("coef", "layers", "match"),
    [
        ([0.5, 0.5], None, r"shape \(2,\), expected \(3,\)"),
        ([0.5, 0.5, np.nan], None, "NaN or infinite"),
        ([0.5, 0.5, 0.5], None, "sum to 1"),
        (np.full((2, 3), 1 / 3), None, "2 rows but layers is None"),
        (np.full((2, 3), 1 / 3), {"a": 0}, "layers lacks 'b'"),
        (
            np.full((2, 3), 1 / 3),
            {"a": 0, "b": 2},
            r"'b'\] is 2, expected a row of coef in \[0, 2\)",
        ),
    ],
)
def test_bad_coefficients(coef, layers, match):
    states = [{"a": torch.ones(1), "b": torch.ones(1)}] * 3
    with pytest.raises(ValueError, match=match):
        mix(states, coef, layers=layers)


@settings(max_examples=20)
@given(st.permutations(range(4)))
def test_the_order_of_checkpoints_changes_nothing_but_rounding(order):
    states = make_states(4, seed=3, dtype=torch.float64)
    coef = np.array([0.7, -0.4, 0.5, 0.2])
    a, b = mix(states, coef), mix([states[k] for k in order], coef[list(order)])
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-14)


@given(mixes())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mix_on_disk_has_the_same_bits(tmp_path_factory, case):
    states, coef, rows = case
    folder = mix(states, coef, layers=rows, out=tmp_path_factory.mktemp("out") / "mixed")
    expected = mix(states, coef, layers=rows)
    (written,) = CheckpointCollection([folder]).values()
    assert same_tensors(written, {name: expected[name] for name in written})
    assert written.keys() == expected.keys()


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from sksoup import CheckpointCollection, CheckpointError, mix
from sksoup.checkpoints.protocol import TensorInfo
from sksoup.checkpoints.write import write_shards

root, limit = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
mix([{"w": torch.ones(9)}, {"w": torch.zeros(9)}], [0.5, 0.5], out=root / "warm")
collection = CheckpointCollection([root / f"run{k}" for k in range(6)])
total = len(collection) * collection.nbytes
used = 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if "VmSize" in line)
resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
assert total >= 8 * limit and collection.nbytes > limit
try:
    mix(collection, [1 / 6] * 6)
except (MemoryError, RuntimeError, CheckpointError):
    print("in memory it does not fit")
mix(collection, [1 / 6] * 6, out=root / "mixed")
"""


def test_checkpoints_of_many_times_the_memory_are_mixed(tmp_path):
    """Six sharded models of 96 MiB under a limit of 64 MiB of address space, maps included."""
    tensors = {f"t{i:02d}": torch.full((1 << 20,), float(i)) for i in range(24)}
    infos = {name: TensorInfo((1 << 20,), torch.float32) for name in tensors}
    for k in range(2):
        write_shards(
            tmp_path / f"run{k}",
            infos,
            lambda names, k=k: ((n, tensors[n] + k) for n in names),
            shard_bytes=12 << 20,
        )
    for k in range(2, 6):
        shutil.copytree(tmp_path / f"run{k % 2}", tmp_path / f"run{k}", copy_function=os.link)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path, str(64 << 20)],
        # glibc keeps what is freed, fragmented, once it has raised its threshold for maps
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "in memory it does not fit\n"
    mixed = CheckpointCollection([tmp_path / "mixed"])["mixed"]
    assert all(torch.allclose(mixed[n], tensors[n] + 0.5) for n in tensors)


def test_no_folder_is_overwritten(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        mix(make_states(2, seed=0), [0.5, 0.5], out=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_half_precision_averages_in_float32_and_comes_back(tmp_path, dtype, suffix):
    # 2048 + 1 is not a float16 and 256 + 1 no bfloat16: sums in half precision would lose the ones
    big = 2048.0 if dtype == torch.float16 else 256.0
    values = [big, 1.0, 1.0, big + 2 * 2 ** (dtype == torch.bfloat16)]
    for k, value in enumerate(values):
        state = {"w": torch.full((3,), value, dtype=dtype)}
        path = tmp_path / f"{k}{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    mixed = mix(CheckpointCollection.from_path(tmp_path), [0.25] * 4)["w"]
    assert mixed.dtype == dtype
    assert torch.equal(mixed, torch.full((3,), sum(values) / 4).to(dtype))


def test_the_average_reads_every_byte_once(tmp_path, monkeypatch):
    states = make_states(5, seed=0)
    for k, state in enumerate(states):
        save_file(state, tmp_path / f"{k}.safetensors")
    collection = CheckpointCollection.from_path(tmp_path)
    seen = []
    original = Health.see
    monkeypatch.setattr(
        Health,
        "see",
        lambda self, name, tensor, value: (
            seen.append((name, tensor)) or original(self, name, tensor, value)
        ),
    )
    for read_by in (
        lambda: mix(collection, [0.2] * 5),
        lambda: mix(collection, [0.2] * 5, out=tmp_path / "mixed"),
    ):
        seen.clear()
        read_by()
        floating = [n for n, info in collection.layout.items() if info.is_floating]
        assert len(seen) == len(set(seen))
        assert {(k, n) for k, n in seen if n in floating} == {
            (k, n) for k in collection for n in floating
        }


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int64])
def test_integers_named_as_variances_are_copied(dtype):
    states = [{"w": torch.ones(1) * k, "bn.running_var": torch.ones(1).to(dtype)} for k in range(2)]
    assert mix(states, [0.5, 0.5])["bn.running_var"].dtype == dtype
