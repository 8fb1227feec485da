"""Collections of which some rows of every tensor are read."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints import read as reading
from sksoup.mixing.mix import accumulate


def states(n: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "a.weight": torch.randn(7, 3, generator=generator),
            "a.bias": torch.randn(7, generator=generator),
            "scale": torch.tensor(float(k)),
            "steps": torch.arange(4) + k,
        }
        for k in range(n)
    ]


def written(folder, kind: str) -> CheckpointCollection:
    paths = []
    for k, state in enumerate(states()):
        path = folder / f"ft{k}{kind}"
        if kind == ".safetensors":
            save_file(state, path)
        elif kind == ".pt":
            torch.save(state, path)
        elif kind == ".bin":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        else:  # two shards and an index
            path = folder / f"run{k}"
            path.mkdir()
            parts = {"1.safetensors": ["a.weight", "steps"], "2.safetensors": ["a.bias", "scale"]}
            for file, names in parts.items():
                save_file({n: state[n] for n in names}, path / file)
            weights = {n: file for file, names in parts.items() for n in names}
            path = path / "model.safetensors.index.json"
            path.write_text(json.dumps({"weight_map": weights}))
        paths.append(path)
    return CheckpointCollection(paths)


KINDS = [".safetensors", ".pt", ".bin", "index", "memory"]


@pytest.fixture
def collection(tmp_path, request):
    return (
        CheckpointCollection(states()) if request.param == "memory"
        else written(tmp_path, request.param)
    )  # fmt: skip


@pytest.mark.parametrize("collection", KINDS, indirect=True)
@pytest.mark.parametrize("where", [slice(0, 3), slice(3, 7), slice(2, 2), slice(7, 7)])
def test_rows_are_those_of_the_whole_tensors(collection, where):
    part = collection.slice_rows({"a.weight": where, "a.bias": where})
    n = len(range(7)[where])
    assert part.layout["a.weight"].shape == (n, 3)
    assert part.layout["scale"].shape == ()
    for k, name in enumerate(part):
        expected = states()[k]
        found = part[name]
        assert torch.equal(found["a.weight"], expected["a.weight"][where])
        assert torch.equal(found["a.bias"], expected["a.bias"][where])
        assert torch.equal(found["scale"], expected["scale"])
        assert torch.equal(found["steps"], expected["steps"])
        assert part.identity(name) == collection.identity(name)
        assert part.sha256(name) == collection.sha256(name)
        assert part.path(name) == collection.path(name)


@pytest.mark.parametrize("collection", [".safetensors", "index"], indirect=True)
def test_no_other_rows_of_a_file_are_read(collection, monkeypatch):
    asked = []

    class Spy:
        def __init__(self, *args, **kwargs):
            self._file = safe_open(*args, **kwargs)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *args):
            return self._file.__exit__(*args)

        def get_tensor(self, name):
            asked.append((name, None))
            return self._file.get_tensor(name)

        def get_slice(self, name):
            part = self._file.get_slice(name)

            class Slice:
                def __getitem__(self, where):
                    asked.append((name, where))
                    return part[where]

            return Slice()

    part = collection.slice_rows({"a.weight": slice(2, 4), "a.bias": slice(2, 4)})
    monkeypatch.setattr(reading, "safe_open", Spy)
    part[part.names[0]]
    assert sorted(asked, key=str) == sorted(
        [("a.weight", slice(2, 4)), ("a.bias", slice(2, 4)), ("scale", None), ("steps", None)],
        key=str,
    )


@given(st.lists(st.integers(0, 7), min_size=1, max_size=4).map(sorted))
def test_sums_of_the_parts_are_rows_of_the_sum(cuts):
    collection = CheckpointCollection(states())
    coef = torch.tensor([[0.5, 0.75, -0.25]]).double().numpy()
    rows = dict.fromkeys(collection.layout, 0)
    whole, _ = accumulate(collection, coef, rows, collection.layout)
    edges = [0, *cuts, 7]
    parts = []
    for low, high in pairwise(edges):
        part = collection.slice_rows({"a.weight": slice(low, high), "a.bias": slice(low, high)})
        parts.append(accumulate(part, coef, rows, part.layout)[0])
    for name in ("a.weight", "a.bias"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


@pytest.mark.parametrize("collection", [".safetensors"], indirect=True)
def test_a_file_that_changed_or_holds_nan_is_an_error_of_the_rows_too(collection):
    path = collection.path("ft1")
    state = states()[1]
    state["a.weight"][6, 0] = torch.nan
    save_file(state, path)
    again = CheckpointCollection([collection.path(name) for name in collection])
    low, high = (again.slice_rows({"a.weight": where}) for where in (slice(0, 6), slice(6, 7)))
    low["ft1"]
    with pytest.raises(CheckpointError, match=r"ft1\.safetensors' can't be used: 'a\.weight'"):
        high["ft1"]
    with pytest.raises(CheckpointError, match="changed on disk"):
        collection.slice_rows({})["ft1"]


def test_rows_of_two_networks_of_one_file_are_not_confused(tmp_path):
    """Stored results of `memory=` go by the identity."""
    save_file({"a.w": torch.zeros(4), "b.w": torch.ones(4)}, tmp_path / "0.safetensors")
    parts = [
        CheckpointCollection([tmp_path / "0.safetensors"], prefix=prefix).slice_rows({"w": one})
        for prefix in ("a.", "b.")
        for one in (slice(0, 2), slice(2, 4))
    ]
    a, also_a, b, _ = (part.identity("0") for part in parts)
    assert a == also_a  # what is computed from all ranks is that of all rows
    assert a != b
