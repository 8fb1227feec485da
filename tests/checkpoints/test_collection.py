from __future__ import annotations

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, ParameterGrid

from sksoup import CheckpointCollection, CheckpointError, UniformSoup

from ..zoo import Net, make_states, same_tensors


@pytest.fixture
def folder(tmp_path):
    """Eleven files whose natural order is not their alphabetical order."""
    for k, state in enumerate(make_states(11, seed=0)):
        save_file(state, tmp_path / f"ft{k}.safetensors")
    return tmp_path


def write(path, state, legacy=False):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize(("suffix", "legacy"), [(".safetensors", 0), (".pt", 0), (".pth", 1)])
def test_every_format_gives_back_the_same_tensors(tmp_path, suffix, legacy):
    states = make_states(2, seed=0)
    paths = [tmp_path / f"{k}{suffix}" for k in range(2)]
    for path, state in zip(paths, states, strict=True):
        write(path, state, bool(legacy))
    collection = CheckpointCollection(paths)
    for name, state in zip(collection, states, strict=True):
        loaded = collection[name]
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_is_a_mapping_in_natural_order(folder):
    collection = CheckpointCollection.from_path(folder)
    assert collection.names == tuple(f"ft{k}" for k in range(11))
    assert list(collection) == list(collection.names)
    assert len(collection) == 11
    assert "ft3" in collection
    assert "ft99" not in collection
    assert set(collection["ft10"]) == set(collection.layout)


@pytest.mark.parametrize("pattern", ["*.safetensors", "ft?.safetensors"])
def test_from_a_pattern(folder, pattern):
    found = CheckpointCollection.from_path(f"{folder}/{pattern}")
    assert len(found) == (11 if pattern.startswith("*") else 10)


def test_from_one_file(folder):
    assert CheckpointCollection.from_path(folder / "ft3.safetensors").names == ("ft3",)


def test_names_are_unique_across_folders(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        save_file(make_states(1, seed=0)[0], tmp_path / run / "last.safetensors")
    found = CheckpointCollection.from_path(f"{tmp_path}/*/last.safetensors")
    assert found.names == ("a/last", "b/last")


def test_the_same_stem_in_one_folder_still_gets_two_names(tmp_path):
    state = make_states(1, seed=0)[0]
    write(tmp_path / "a.pt", state)
    write(tmp_path / "a.safetensors", state)
    assert len(set(CheckpointCollection.from_path(tmp_path).names)) == 2


def test_nothing_is_loaded_until_asked(folder, monkeypatch):
    opened = []
    original = CheckpointCollection.open
    monkeypatch.setattr(
        CheckpointCollection, "open", lambda self, name: opened.append(name) or original(self, name)
    )
    collection = CheckpointCollection.from_path(folder, module=Net)
    soup = UniformSoup(collection)
    clone(soup)
    repr(soup)
    soup._repr_html_()
    np.asarray(collection)
    pickle.loads(pickle.dumps(soup))
    search = GridSearchCV(UniformSoup(), {"checkpoints": [collection, collection.drop("ft1")]})
    clone(search)
    repr(search)
    search._repr_html_()
    list(ParameterGrid(search.param_grid))
    assert collection == collection
    assert collection.select(["ft1"]) != collection
    assert opened == []
    collection["ft1"]
    assert opened == ["ft1"]


def test_pickles_paths_not_weights(folder):
    collection = CheckpointCollection.from_path(folder, module=Net)
    collection.sha256("ft0")
    dumped = pickle.dumps(collection)
    assert len(dumped) < 10_000
    again = pickle.loads(dumped)
    assert same_tensors(again["ft4"], collection["ft4"])
    assert again.sha256("ft0") == collection.sha256("ft0")


def test_memory_checkpoints_are_copies():
    net = Net()
    collection = CheckpointCollection([net])
    with torch.no_grad():
        net.head.weight.zero_()
    assert collection["checkpoint0"]["head.weight"].any()
    collection["checkpoint0"]["head.weight"].zero_()
    assert collection["checkpoint0"]["head.weight"].any()


def test_save_turns_memory_into_files(tmp_path):
    memory = CheckpointCollection(make_states(3, seed=0), module=Net)
    files = memory.save(tmp_path / "zoo")
    assert files.names == memory.names
    for name in memory:
        assert same_tensors(files[name], {tensor: memory[name][tensor] for tensor in files.layout})
        assert files.content_sha256(name) == memory.sha256(name)
    with pytest.raises(FileExistsError, match="exists"):
        memory.save(tmp_path / "zoo")


def test_select_and_drop(folder):
    collection = CheckpointCollection.from_path(
        folder, scores={f"ft{k}": k / 10 for k in range(11)}
    )
    part = collection.select(["ft5", "ft2"])
    assert part.names == ("ft5", "ft2")
    assert part.scores == {"ft5": 0.5, "ft2": 0.2}
    assert len(collection.drop("ft5")) == 10
    assert collection.drop(["ft5", "ft6"]).names[5] == "ft7"
    with pytest.raises(KeyError, match="No checkpoint named 'nope'"):
        collection.select(["nope"])
    with pytest.raises(CheckpointError, match="No checkpoints are left"):
        collection.drop(collection.names)


def test_layout_and_size():
    collection = CheckpointCollection(make_states(2, seed=0))
    assert collection.layout["head.weight"].shape == (3, 6)
    state = collection["checkpoint0"]
    assert collection.nbytes == sum(value.nbytes for value in state.values())


def test_a_module_factory_leaves_random_state_alone():
    collection = CheckpointCollection(make_states(2, seed=0), module=Net)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    collection.build_module()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


# ------------------------------------------------------------------------------ bad input


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


def test_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="at least one"):
        CheckpointCollection([])
    with pytest.raises(CheckpointError, match="No checkpoints found"):
        CheckpointCollection.from_path(tmp_path)


@pytest.mark.parametrize(
    ("checkpoints", "match"),
    [
        ("runs/*.pt", "from_path"),
        (Net(), "put them in a list"),
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
        ({"scores": {"checkpoint0": 1.0}}, ValueError, "scores lacks 'checkpoint1'"),
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


def test_without_a_module_it_can_average_but_not_predict():
    with pytest.raises(CheckpointError, match="has no module"):
        CheckpointCollection(make_states(2, seed=0)).build_module()
    with pytest.raises(TypeError, match="returned a int, expected an"):
        CheckpointCollection(make_states(2, seed=0), module=lambda: 3).build_module()


def test_a_missing_file():
    with pytest.raises(CheckpointError, match=r"no/such\.pt' can't be opened"):
        CheckpointCollection(["no/such.pt"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("size", [0, 3, 200, -10])
def test_a_file_that_is_empty_or_cut_off(tmp_path, suffix, size):
    path = tmp_path / f"cut{suffix}"
    write(path, make_states(1, seed=0)[0])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"cut\.(safetensors|pt)'"):
        CheckpointCollection([path])


@pytest.mark.parametrize("size", [3, 200, -10])
def test_a_legacy_file_that_is_cut_off(tmp_path, size):
    path = tmp_path / "cut.pt"
    write(path, make_states(1, seed=0)[0], legacy=True)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"cut\.pt'"):
        CheckpointCollection([path])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"epoch": 3}, "'epoch' is a int, expected a tensor"),
        ([torch.ones(1)], "holds a list, expected a state dict"),
        ({}, "holds no tensors"),
    ],
)
def test_a_pickle_that_is_not_a_state_dict(tmp_path, content, match):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=match):
        CheckpointCollection([tmp_path / "odd.pt"])


class _Payload:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, kind):
    path, canary = tmp_path / "evil.pt", tmp_path / "canary"
    payload = {"w": torch.ones(1), "x": _Payload(canary)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps({"x": _Payload(canary)}, protocol=2))
    else:
        write(path, payload, legacy=kind == "legacy")
    with pytest.raises(CheckpointError, match=r"evil\.pt' can't be read"):
        CheckpointCollection([path])
    assert not canary.exists()


def test_sparse_complex_and_unknown_files(tmp_path):
    with pytest.raises(CheckpointError, match="sparse"):
        CheckpointCollection([{"w": torch.eye(2).to_sparse()}])
    with pytest.raises(CheckpointError, match="complex"):
        CheckpointCollection([{"w": torch.ones(1, dtype=torch.complex64)}])
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"suffix '\.txt'"):
        CheckpointCollection([tmp_path / "notes.txt"])
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="is a folder without weights"):
        CheckpointCollection([tmp_path / "folder.pt"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 2])
def test_values_that_are_not_finite_name_file_and_tensor(tmp_path, value, which):
    states = make_states(3, seed=0)
    states[which]["head.weight"][1, 1] = value
    for k, state in enumerate(states):
        save_file(state, tmp_path / f"ft{k}.safetensors")
    collection = CheckpointCollection.from_path(tmp_path)
    with pytest.raises(CheckpointError, match=rf"ft{which}\.safetensors.*'head\.weight'"):
        collection.check()


def test_a_constant_infinity_is_allowed_but_only_where_it_is_constant():
    mask = torch.tensor([0.0, -torch.inf])
    CheckpointCollection([{"w": torch.ones(1), "mask": mask}] * 3).check()
    other = torch.tensor([-torch.inf, 0.0])
    with pytest.raises(CheckpointError, match="'mask'"):
        CheckpointCollection([{"mask": mask}, {"mask": other}]).check()
    with pytest.raises(CheckpointError, match=r"checkpoint 0 .*'mask'"):
        CheckpointCollection([{"mask": mask}, {"mask": torch.zeros(2)}]).check()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("fault", ["rewritten", "replaced", "deleted"])
def test_a_file_that_changes_after_opening_is_an_error(tmp_path, suffix, fault):
    path = tmp_path / f"ft{suffix}"
    first, second = make_states(2, seed=0)
    write(path, first)
    collection = CheckpointCollection([path])
    if fault == "deleted":
        path.unlink()
    elif fault == "rewritten":
        write(path, second)
        os.utime(path, ns=(1, 1))
    else:
        write(tmp_path / f"new{suffix}", second)
        (tmp_path / f"new{suffix}").replace(path)
    with pytest.raises(CheckpointError, match=r"changed on disk|can't be opened"):
        collection["ft"]


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "ft.safetensors"
    write(path, make_states(1, seed=0)[0])
    collection = CheckpointCollection([path])

    def read_while_it_changes():
        with collection.open("ft") as read:
            read("head.bias")
            os.utime(path, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed on disk"):
        read_while_it_changes()


def test_errors_of_the_reader_of_tensors_stay_what_they_are(tmp_path):
    path = tmp_path / "ft.safetensors"
    write(path, make_states(1, seed=0)[0])
    with pytest.raises(ZeroDivisionError), CheckpointCollection([path]).open("ft"):
        raise ZeroDivisionError


def test_zip_that_is_no_checkpoint(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme", "hello")
    (tmp_path / "archive.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"archive\.pt' can't be read"):
        CheckpointCollection([tmp_path / "archive.pt"])
