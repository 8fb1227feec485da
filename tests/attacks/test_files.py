"""What files can do to the process that opens them: at most, be refused with their name."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, Recipe, mix
from sksoup.checkpoints import prefixes
from sksoup.checkpoints.prefixes import CHAIN, prefixes_of
from sksoup.checkpoints.read import SafetensorsFile
from sksoup.checkpoints.torch_files import TorchFile
from sksoup.mixing.mix import _groups

from ..checkpoints.runs import write_lightning


class Counted(tuple):
    """Prefixes that can be looked through a few times only."""

    looks = 0

    def __iter__(self):
        self.looks += 1
        assert self.looks < 50, "prefixes are sought without end"
        return super().__iter__()


@pytest.fixture
def few_looks(monkeypatch):
    counted = Counted(prefixes.PREFIXES)
    monkeypatch.setattr(prefixes, "PREFIXES", counted)
    return counted


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_very_long_name_of_a_tensor_is_refused_and_not_shown(tmp_path, suffix):
    state, path = {"w" * 5000: torch.ones(2)}, tmp_path / f"a{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(CheckpointError, match="the name of a tensor has 5,000 characters") as error:
        CheckpointCollection([path])
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "given",
    [[{}, {}], [nn.ReLU(), nn.ReLU()], [{"w": torch.ones(2)}, {}], [{}]],
    ids=["dicts", "modules", "second", "one"],
)
def test_a_checkpoint_without_tensors_is_refused(given, few_looks):
    """Once, a chain of prefixes was sought in no names at all, without end."""
    with pytest.raises(
        CheckpointError, match=r"checkpoint [01] \(in memory\) holds no tensors, exp"
    ):
        mix(given, [1 / len(given)] * len(given))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_without_tensors_is_refused(tmp_path, suffix):
    path = tmp_path / f"empty.{suffix}"
    torch.save({}, path) if suffix == "pt" else save_file({}, path)
    with pytest.raises(CheckpointError, match=rf"empty\.{suffix}' holds no tensors, expected"):
        CheckpointCollection([path])


def test_no_names_and_long_ones_have_few_prefixes(few_looks):
    assert prefixes_of([]) == [""]
    assert len(prefixes_of([few_looks[0] * 100_000])) == CHAIN + 1


@pytest.mark.parametrize("name", ["a5²5", "٣5"])
def test_all_digits_are_sorted(tmp_path, name):
    for one in (name, "b"):
        torch.save({"w": torch.ones(1)}, tmp_path / f"{one}.pt")
    assert set(CheckpointCollection.from_path(tmp_path).names) == {name, "b"}


# What is no file, and indices


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_only_regular_files_are_opened(tmp_path, suffix, kind):
    path = tmp_path / f"a{suffix}"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    if kind == "socket":
        path.unlink()
        os.mknod(path, 0o140600)
    with pytest.raises(CheckpointError, match=r"a\..*it is a pipe, a device or a folder, expected"):
        CheckpointCollection([path])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"weight_map": ["w"]}', "has no weights in its 'weight_map'"),
        ('{"weight_map": ' + "[" * 100_000, "can't be read: RecursionError"),
        ('{"weight_map": {"w": ["a.safetensors"]}}', "the name of a file next to it"),
        ('{"weight_map": {"w": "../a.safetensors"}}', "the name of a file next to it"),
        (
            '{"weight_map": {"w": "x/../../a.safetensors"}}',
            "the name of a file next to it",
        ),
        ('{"weight_map": {"w": "/a.safetensors"}}', "the name of a file next to it"),
        ('{"weight_map": {"w": ".."}}', "the name of a file next to it"),
        ('{"weight_map": {"w": "a.safetensors\\nb"}}', "the name of a file next to it"),
        ('{"weight_map": {"w": "a\\u0000.safetensors"}}', "can't be opened: embedded null byte"),
        ('{"weight_map": {"w": "a\\ud800.safetensors"}}', "can't be opened: 'utf-8' codec can't"),
        ('{"weight_map": {"w": "' + "n" * 300 + '"}}', "can't be opened: File name too long"),
        ('{"weight_map": {"v": "a.safetensors"}}', "lacks 'v'"),
        ('{"weight_map": {"\\ud800": "a.safetensors"}}', r"lacks '\\ud800'"),
        ('{"weight_map": ' + "9" * 5000 + "}", "can't be read: ValueError"),
        ("\x00", "can't be read"),
    ],
)
def test_an_index_is_refused_with_its_name(tmp_path, content, match):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        CheckpointCollection([path])
    assert str(tmp_path) in str(caught.value)


def test_an_index_is_of_bounded_size(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(CheckpointError, match=r"index\.json' can't be used: it is larger than"):
        CheckpointCollection([path])


def test_links_of_the_cache_of_hugging_face_are_followed(tmp_path):
    """They lead out of the folder, and were put there by who owns it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, blobs / "1f2e")
    (blobs / "3d4c").write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    (snapshot / "a.safetensors").symlink_to("../../blobs/1f2e")
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/3d4c")
    path = snapshot / "model.safetensors.index.json"
    assert CheckpointCollection({"a": path})["a"]["w"].tolist() == [1, 1]


def test_a_header_is_bounded_by_its_file(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (2**31, 2**63 - 1, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
        with pytest.raises(CheckpointError, match=r"a\.safetensors' can't be read: Safetensor"):
            CheckpointCollection([path])


# Names


def test_a_file_whose_name_is_not_unicode(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"ft\xff.safetensors")
    save_file({"w": torch.ones(2)}, os.path.join(tmp_path, "a"))
    os.rename(os.path.join(os.fsencode(tmp_path), b"a"), path)
    for opened in (tmp_path, os.fsdecode(path)):
        with pytest.raises(CheckpointError, match=r"ft\\udcff.*its name is not valid Unicode"):
            CheckpointCollection.from_path(opened)
    with pytest.raises(CheckpointError, match=r"'a\\udcff' can't be the name of .*pass names="):
        CheckpointCollection({"a\udcff": {"w": torch.ones(2)}})


def test_a_path_with_a_null_byte(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\\x00b\.pt' can't be opened: embedded null"):
        CheckpointCollection([tmp_path / "a\0b.pt"])


@pytest.mark.parametrize(
    "raised",
    [
        KeyboardInterrupt(),
        # by torch.asarray, where the signal comes while it looks at the storage
        ValueError(
            "could not determine the shape of object type 'torch.storage.UntypedStorage'"
        ),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("kind", [SafetensorsFile, TorchFile])
def test_an_interrupt_while_reading_is_no_damaged_file(tmp_path, monkeypatch, kind, raised):
    path = tmp_path / f"a{kind.suffixes[0]}"
    save_file({"w": torch.ones(2)}, path) if kind is SafetensorsFile else torch.save(
        {"w": torch.ones(2)}, path
    )
    collection = CheckpointCollection([path])

    def get(name):
        raise raised

    monkeypatch.setattr(kind, "_open", lambda self: nullcontext(get))
    with pytest.raises(KeyboardInterrupt):
        collection["a"]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_file_of_a_sweep_runs_code_while_one_is_chosen(tmp_path):
    """The records of all files of a run are read, also of those that are not taken."""
    evil = {"global_step": 9, "callbacks": {"ModelCheckpoint{}": Evil(tmp_path / "made")}}
    for run in ("a", "b"):
        write_lightning(tmp_path / "study" / run, [0.5, 0.25])
        torch.save(evil, tmp_path / "study" / run / "epoch=9.ckpt")
    with pytest.raises(CheckpointError, match=r"epoch=9\.ckpt' can't be read: it holds more than"):
        CheckpointCollection.from_path(tmp_path / "study")
    assert not (tmp_path / "made").exists()


def test_records_of_odd_types_name_no_best(tmp_path):
    """What a container holds has any type; a path in it is used by its last part only."""
    key = "ModelCheckpoint{'monitor': 'x', 'mode': 'min'}"
    odd = [
        7, {key: 7}, {key: {"monitor": "x", "best_model_path": 7, "best_k_models": [1]}},
        {key: {"monitor": "x", "best_model_path": "../../../secret.ckpt"}},
        {key: {"monitor": "x", "best_k_models": {7: 1, "p": torch.zeros(3), "q": "low"}}},
    ]  # fmt: skip
    for k, callbacks in enumerate(odd):
        for run in ("a", "b"):
            folder = tmp_path / f"study{k}" / run
            folder.mkdir(parents=True)
            for step in (1, 2):
                container = {"global_step": step, "callbacks": callbacks,
                             "state_dict": {"w": torch.ones(2)}}  # fmt: skip
                torch.save(container, folder / f"step={step}.ckpt")
        found = CheckpointCollection.from_path(tmp_path / f"study{k}")
        assert [found.path(name).name for name in found] == ["step=2.ckpt"] * 2


def test_files_of_many_small_tensors_are_opened_a_few_times(tmp_path, monkeypatch):
    """Groups no larger than the largest tensor were of one each, where all have one size."""
    names = [f"w{k}" for k in range(50)]
    for k in range(2):
        save_file(
            {name: torch.full((2,), float(k)) for name in names}, tmp_path / f"{k}.safetensors"
        )
    ckpts = CheckpointCollection([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    recipe = Recipe.record("average", ckpts, [0.5, 0.5], layers=dict.fromkeys(names, 0))
    opened = []
    real = CheckpointCollection.open
    monkeypatch.setattr(
        CheckpointCollection, "open", lambda self, name: opened.append(name) or real(self, name)
    )
    folder = mix(ckpts, [0.5, 0.5], out=tmp_path / "mixed")
    assert opened == ["0", "1"]
    assert recipe.verify(folder, ckpts).ok
    assert opened == ["0", "1"] * 2
    # where a tensor is larger than such a group, the largest is what it takes
    monkeypatch.setattr("sksoup.mixing.mix.GROUP", 1)
    sizes = {"a": 3, "b": 1, "c": 2, "d": 2, "e": 2, "f": 0}
    assert list(_groups(sizes)) == [["a"], ["b", "c"], ["d"], ["e", "f"]]
    monkeypatch.setattr("sksoup.mixing.mix.GROUP", 7)
    assert list(_groups(sizes)) == [["a", "b", "c"], ["d", "e", "f"]]
    assert list(_groups({})) == [[]]


# Containers


@pytest.mark.parametrize(
    "model",
    [
        {"w": torch.ones(2), "_extra_state": {"calls": 3}},
        {"w": torch.ones(2), "_extra_state": None},
        {"w": torch.ones(2), "num_updates": 5},
        {"encoder": {"w": torch.ones(2)}, "decoder": {"w": torch.ones(2)}},
        {"layers": [torch.ones(2)]},
    ],
    ids=["extra", "none", "number", "parts", "list"],
)
def test_no_other_state_dict_is_taken_for_a_model_that_is_not_plain(tmp_path, model):
    """Once, the averages or a loss beside the model were mixed without a word."""
    torch.save({"model": model, "ema": {"w": torch.zeros(2)}}, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"a\.pt' holds .*'ema' .*'model', so it is not clear"
    ):
        CheckpointCollection([tmp_path / "a.pt"])
    assert CheckpointCollection([tmp_path / "a.pt"], key="ema")["a"]["w"].tolist() == [0, 0]


def test_an_entry_that_holds_itself_is_looked_through_once(tmp_path):
    entry = {"n": 1}
    entry["self"] = entry
    torch.save({"model": {"w": torch.ones(2)}, "entry": entry}, tmp_path / "a.pt")
    assert list(CheckpointCollection([tmp_path / "a.pt"])["a"]) == ["w"]


def test_tied_complex_weights_are_refused_with_a_message(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    w = torch.ones(2, 2)
    torch.save({"a.weight": w}, tmp_path / "1.pt")
    wide = w.to(torch.complex128)
    torch.save({"a.weight": wide, "b.weight": wide}, tmp_path / "2.pt")
    with pytest.raises(CheckpointError, match="complex"):
        CheckpointCollection([tmp_path / "1.pt", tmp_path / "2.pt"], module=Tied)


def test_empty_tensors_of_impossible_sizes_are_refused(tmp_path):
    for k, shape in enumerate(([0, 2**40, 2**40], [0, 2**40])):
        header = json.dumps(
            {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
        ).encode()
        path = tmp_path / f"{k}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"0\.safetensors' can't be used: 'w' has shape"):
        CheckpointCollection([tmp_path / "0.safetensors"])
    assert len(CheckpointCollection([tmp_path / "1.safetensors"])) == 1


def test_a_tensor_with_the_name_of_the_metadata_is_refused(tmp_path):
    """A file of safetensors with it can't be read, and was written at the end of a fit."""
    states = [{"m.w": torch.ones(2) * k, "m.__metadata__": torch.ones(2)} for k in range(2)]
    for k, state in enumerate(states):
        torch.save(state, tmp_path / f"{k}.pt")
    for checkpoints in (states, sorted(tmp_path.iterdir())):
        with pytest.raises(CheckpointError, match="a tensor is named '__metadata__'"):
            CheckpointCollection(checkpoints, prefix="m.")


def test_tensors_of_very_many_dimensions_are_refused(tmp_path):
    """Operations of torch take quadratic time for them."""
    for n in (64, 65, 50_000):
        header = {"w": {"dtype": "F32", "shape": [1] * n, "data_offsets": [0, 4]}}
        text = json.dumps(header).encode()
        (tmp_path / f"{n}.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + bytes(4)
        )
    assert len(CheckpointCollection([tmp_path / "64.safetensors"]).layout["w"].shape) == 64
    for n in (65, 50_000):
        with pytest.raises(
            CheckpointError, match=rf"'w' has {n:,} dimensions, expected at most 64"
        ):
            CheckpointCollection([tmp_path / f"{n}.safetensors"])
