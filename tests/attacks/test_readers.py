"""Files that readers read in different ways, classes that libraries allow, builds without end."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tarfile
import time
from argparse import Namespace
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sksoup import CheckpointCollection, CheckpointError, Recipe, RecipeError, mix
from sksoup.__main__ import main
from sksoup.checkpoints import growth, torch_archives
from sksoup.checkpoints.read import SafetensorsFile, is_tar
from sksoup.checkpoints.records import read_lightning
from sksoup.checkpoints.torch_archives import read_torch_file

from .test_configs import BERT, write
from .test_pickles import NUMBERS, WEIGHT, name, pickled, tensor, text, write_legacy, write_zip

transformers = pytest.importorskip("transformers")


# ------------------------------------------------------------------ pickles


@pytest.mark.parametrize("end", [b"PK\5\6", b"\0" * 70_000])
def test_an_archive_that_two_readers_tell_apart_is_refused(tmp_path, end):
    secret = (text("w"), name("torch.ByteTensor") + b"J" + struct.pack("<i", 1 << 20) + b"\x85R")
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(secret)), NUMBERS)
    path.write_bytes(path.read_bytes() + end)
    with pytest.raises(CheckpointError, match=r"a\.pt' .*can't be read"):
        CheckpointCollection([path])


def test_a_legacy_file_with_an_archive_behind_it_is_refused(tmp_path):
    path = write_legacy(tmp_path / "a.pt", pickled(), b"\x80\x02].")
    archive = write_zip(tmp_path / "b.pt", ("data.pkl", pickled(WEIGHT)), NUMBERS)
    path.write_bytes(path.read_bytes() + archive.read_bytes())
    with pytest.raises(CheckpointError, match="two programs may read different"):
        CheckpointCollection([path])


def test_a_file_that_begins_as_an_archive_is_not_read_as_safetensors(tmp_path):
    """The first bytes are the length of a header, too: of 67 MB."""
    path = tmp_path / "a.bin"
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    size = int.from_bytes(b"PK\3\4", "little")
    with path.open("wb") as file:
        file.write(b"PK\3\4\0\0\0\0" + header.ljust(size) + bytes(8))
    assert not SafetensorsFile.accepts(path)
    with pytest.raises(CheckpointError, match=r"a\.bin' can't be read"):
        CheckpointCollection([path])


@pytest.mark.parametrize(
    ("ops", "is_pickle"),
    [
        (b"x", False),
        (b".", False),
        (b"0.weight", False),
        (b"\x8a\x0a" + torch_archives.MAGIC + b".", True),
        (b"0I0x1\n0\x8a\x0a" + torch_archives.MAGIC + b".", True),
        (b"0L0x1950A86A20F9469CFC6CL\n.", True),
        (b"cos\nsystem\n.", True),
        (b"\x93.", True),
    ],
)
def test_a_file_that_begins_as_a_pickle_is_not_read_as_safetensors(tmp_path, ops, is_pickle):
    """The length of a header may be the opcode of a text, which hides what follows."""
    size = int.from_bytes(b"U\xff", "little")
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"x":"'
    header = header.ljust(249, b"x") + ops
    path = tmp_path / "a.pt"
    path.write_bytes(
        b"U\xff".ljust(8, b"\0")
        + header
        + b"".rjust(size - 252 - len(ops), b"x")
        + b'"}}'
        + bytes(8)
    )
    assert SafetensorsFile.accepts(path) is not is_pickle
    if is_pickle:
        with pytest.raises(CheckpointError, match="does not begin as a file of torch"):
            CheckpointCollection([path])
    else:
        assert CheckpointCollection([path])["a"]["w"].tolist() == [0, 0]


def test_only_the_first_header_of_an_archive_is_read(tmp_path):
    """A compressed one was opened, too, and its first member, of any size, was read into memory."""
    plain, packed = tmp_path / "a.tar", tmp_path / "a.tgz"
    with tarfile.open(plain, "w") as one, tarfile.open(packed, "w:gz") as other:
        for archive in (one, other):
            archive.add(__file__)
    assert is_tar(plain)
    assert not is_tar(packed)
    (tmp_path / "short").write_bytes(plain.read_bytes()[:100])
    assert not is_tar(tmp_path / "short")


def test_what_torch_or_a_library_has_allowed_is_not_called(tmp_path, monkeypatch):
    """A DeviceMesh opens connections; here it would only set a mark."""
    called = []
    monkeypatch.setattr(DeviceMesh, "__init__", lambda self, *given: called.append(given))
    mesh = (text("m"), name("torch.distributed.device_mesh.DeviceMesh") + text("cpu") + b"]\x86R")
    inner = (text("state_dict"), b"}" + WEIGHT[0] + WEIGHT[1] + b"s")
    zipped = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(inner, mesh)), NUMBERS)
    legacy = write_legacy(tmp_path / "b.pt", pickled(mesh), b"\x80\x02].")
    with torch.serialization.safe_globals([DeviceMesh]):
        for path in (zipped, legacy):
            with pytest.raises(CheckpointError, match=r"more than tensors \(torch\.distributed"):
                CheckpointCollection([path])
        assert DeviceMesh in torch.serialization.get_safe_globals()
    assert not called


class Allowed:
    """A class that the user's program has allowed."""

    calls = 0

    def __init__(self, *given):
        type(self).calls += 1


def test_a_foreign_class_that_is_allowed_elsewhere_becomes_a_placeholder(tmp_path):
    Allowed.calls = 0
    torch.save({"state_dict": {"w": torch.ones(2)}, "args": Allowed()}, tmp_path / "a.pt")
    made = Allowed.calls
    with torch.serialization.safe_globals([Allowed]):
        ckpts = CheckpointCollection([tmp_path / "a.pt"])
        assert ckpts["a"]["w"].tolist() == [1, 1]
        assert Allowed in torch.serialization.get_safe_globals()
    assert Allowed.calls == made


def test_what_other_threads_load_and_allow_is_not_disturbed(tmp_path, monkeypatch):
    """The classes that torch.load may build are one list for the process."""
    used = []
    for one in ("clear_safe_globals", "add_safe_globals", "safe_globals"):
        monkeypatch.setattr(torch.serialization, one, lambda *_, one=one: used.append(one))
    monkeypatch.setattr(torch, "load", lambda *_, **__: used.append("load"))
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    assert CheckpointCollection([tmp_path / "a.pt"])["a"]["w"].tolist() == [1, 1]
    assert not used


@pytest.mark.parametrize("hidden", ["real", "data", "detach", "items", "get"])
def test_attributes_that_hide_methods_or_values_are_refused(tmp_path, hidden):
    state = b"}" + text(hidden) + name("torch.Tensor") + b"s"
    hiding = (
        name("torch._tensor._rebuild_from_type_v2")
        + b"("
        + name("torch._utils._rebuild_tensor_v2")
        + name("torch.Tensor")
        + tensor(4, 1).partition(b"_rebuild_tensor_v2\n")[2].removesuffix(b"R")
        + state
        + b"tR"
    )
    odd = name("collections.OrderedDict") + b")R" + state + b"b"
    is_of_dict = hidden in ("items", "get")
    content = pickled(WEIGHT, (text("x"), odd if is_of_dict else hiding))
    path = write_zip(tmp_path / "a.pt", ("data.pkl", content), NUMBERS)
    with pytest.raises(CheckpointError, match=f"an object whose '{hidden}' is replaced"):
        CheckpointCollection([path])
    content = pickled(WEIGHT, (text("x"), hiding if is_of_dict else odd))  # there, it is no method
    write_zip(path, ("data.pkl", content), NUMBERS)
    assert not read_torch_file(path, "meta").is_plain


LARGE = (
    (text("t"), text("a" * 200_000) + b"q\x01"),
    (text("l"), b"](" + b"J\0\0\0\0" * 20_000 + b"eq\x02"),
    (text("p"), b"](" + b"NN\x86" * 20_000 + b"eq\x03"),
)


@pytest.mark.parametrize(
    "call",
    [
        name("_codecs.encode") + b"h\x01" + text("latin1") + b"\x86R",
        name("__builtin__.set") + b"h\x02\x85R",
        name("collections.Counter") + b"h\x02\x85R",
    ],
    ids=["encode", "set", "Counter"],
)
def test_calls_on_one_large_argument_again_and_again_copy_nothing(tmp_path, call):
    content = pickled(WEIGHT, *LARGE, (text("c"), b"](" + call * 5_000 + b"e"))
    path = write_zip(tmp_path / "a.pt", ("data.pkl", content), NUMBERS)
    found = read_torch_file(path, "meta").value
    assert len(found["c"]) == 5_000
    given = {id(each.given[0]) for each in found["c"]}
    assert len(given) == 1


def test_dicts_of_one_large_list_again_and_again_are_refused(tmp_path):
    call = name("collections.OrderedDict") + b"h\x03\x85R"
    content = pickled(WEIGHT, *LARGE, (text("c"), b"](" + call * 5_000 + b"e"))
    path = write_zip(tmp_path / "a.pt", ("data.pkl", content), NUMBERS)
    with pytest.raises(CheckpointError, match="the same list or arguments in very many calls"):
        CheckpointCollection([path])
    pairs = name("collections.OrderedDict") + b"](" + WEIGHT[0] + WEIGHT[1] + b"\x86e\x85R."
    write_zip(path, ("data.pkl", b"\x80\x02" + pairs), NUMBERS)  # as Python 2 wrote them
    assert CheckpointCollection([path])["a"]["w"].tolist() == [1, 2, 3, 4]


def test_a_name_that_is_no_text_is_not_written_out(tmp_path):
    long = b"(" + text("a" * 100_000) + b"q\x01" + b"h\x01" * 5_000 + b"t"  # 500 MB as text
    inner = (text("state_dict"), b"}" + WEIGHT[0] + WEIGHT[1] + b"s")
    callbacks = (text("callbacks"), b"}" + long + b"}s")
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled((long, tensor(4, 1)))), NUMBERS)
    with pytest.raises(CheckpointError) as caught:
        CheckpointCollection([path])
    assert len(str(caught.value)) < 1_000
    path = write_zip(tmp_path / "b.pt", ("data.pkl", pickled((long, b"}"), inner)), NUMBERS)
    assert CheckpointCollection([path])["b"]["w"].tolist() == [1, 2, 3, 4]
    path = write_zip(tmp_path / "last.ckpt", ("data.pkl", pickled(inner, callbacks)), NUMBERS)
    assert read_lightning([path]).best is None


def test_tensors_with_the_negative_bit_are_read_as_their_values(tmp_path):
    good = {"w": torch.arange(3.0) + 1}
    odd = {"w": torch._neg_view(-good["w"])}
    torch.save(good, tmp_path / "a.pt")
    torch.save(odd, tmp_path / "b.pt")
    files = CheckpointCollection([tmp_path / "a.pt", tmp_path / "b.pt"])
    for ckpts in (files, CheckpointCollection([good, odd])):
        assert mix(ckpts, [0.5, 0.5])["w"].tolist() == [1, 2, 3]
        ckpts.describe()
    recipe = Recipe.record("by hand", files, [0.5, 0.5], layers={"w": 0})
    assert recipe.verify(odd, files).ok
    torch.save([odd["w"]] * 2 + [torch._neg_view(odd["w"].resolve_neg())], tmp_path / "c.pt")
    read_torch_file(tmp_path / "c.pt", "cpu")
    negative = tensor(4, 1).replace(b"RtR", b"R}" + text("neg") + b"\x88stR")
    content = pickled(WEIGHT, (text("x"), negative), (text("y"), negative))
    path = write_zip(tmp_path / "d.pt", ("data.pkl", content), NUMBERS)
    with pytest.raises(CheckpointError, match="more tensors with the negative bit than values"):
        CheckpointCollection([path])


def test_dtypes_that_can_not_be_mixed_are_refused_when_opened(tmp_path):
    torch.save(
        {"w": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, tmp_path / "a.pt"
    )
    with pytest.raises(CheckpointError, match=r"'w' has dtype torch\.float4"):
        CheckpointCollection([tmp_path / "a.pt"])


# ------------------------------------------------- verified, and other weights elsewhere


@pytest.fixture
def soup(tmp_path):
    """Two small models, the folder of their mean, and its weights."""
    config = transformers.BertConfig(**{k: v for k, v in BERT.items() if k != "architectures"})
    torch.manual_seed(0)
    for each in "ab":
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "in" / each)
    ckpts = CheckpointCollection.from_path(tmp_path / "in")
    layers = dict.fromkeys(ckpts.layout, 0)
    recipe = Recipe.record("average", ckpts, [[0.5, 0.5]], layers=layers, layer_names=("all",))
    folder = recipe.cook(ckpts, out=tmp_path / "soup")
    shutil.copy(tmp_path / "in/a/config.json", folder)
    assert main(["verify", str(folder), str(tmp_path / "in")]) == 0
    return folder, recipe.cook(ckpts)


def test_a_tensor_in_two_shards_is_refused(soup, tmp_path, capsys):
    folder, weights = soup
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = {n: torch.full_like(w, 7) for n, w in weights.items()}
    last = next(reversed(weights))
    other[last] = weights[last]
    save_file(other, folder / "other.safetensors", {"format": "pt"})
    index["weight_map"][last] = "other.safetensors"
    path.write_text(json.dumps(index))
    assert main(["verify", str(folder), str(tmp_path / "in")]) == 2
    assert "which the index does not list there" in capsys.readouterr().err


def test_a_shard_with_more_than_the_index_lists_is_refused(soup):
    folder, _ = soup
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = folder / next(iter(index["weight_map"].values()))
    save_file(load_file(shard) | {"more": torch.ones(2)}, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds 'more'"):
        CheckpointCollection([folder])


def test_a_config_that_names_other_weights_is_not_verified(soup, tmp_path, capsys):
    folder, _ = soup
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "x"}))
    assert main(["verify", str(folder), str(tmp_path / "in")]) == 2
    assert "transformers_weights" in capsys.readouterr().err


def test_a_container_is_not_verified(tmp_path):
    nets = [nn.Linear(2, 2) for _ in range(2)]
    ckpts = CheckpointCollection(nets)
    layers = dict.fromkeys(ckpts.layout, 0)
    recipe = Recipe.record("average", ckpts, [0.5, 0.5], layers=layers)
    good = recipe.cook(ckpts)
    evil = {n: w + 1 for n, w in good.items()}
    torch.save({**evil, "extra": good}, tmp_path / "soup.pt")
    with pytest.raises(CheckpointError, match="twice, next to 'extra'"):
        recipe.verify(tmp_path / "soup.pt", ckpts)
    torch.save({"extra": good}, tmp_path / "soup.pt")
    with pytest.raises(RecipeError, match="more than a plain state dict"):
        recipe.verify(tmp_path / "soup.pt", ckpts)
    odd = OrderedDict(good)
    odd._metadata = Namespace()  # other readers would build it, and whatever else is named
    torch.save(odd, tmp_path / "soup.pt")
    with pytest.raises(RecipeError, match="more than a plain state dict"):
        recipe.verify(tmp_path / "soup.pt", ckpts)
    torch.save(good, tmp_path / "soup.pt")
    assert recipe.verify(tmp_path / "soup.pt", ckpts).ok
    torch.save(OrderedDict(nets[0].state_dict()), tmp_path / "soup.pt")  # with its versions
    assert recipe.verify(tmp_path / "soup.pt", ckpts).differing


# ---------------------------------------------------------------- without end


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "levit", "architectures": ["LevitModel"], "image_size": 4096},
        {"model_type": "inkling_vision", "architectures": ["InklingVisionModel"], "patch_size": 0},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_build_that_takes_too_long_is_stopped(tmp_path, monkeypatch, config):
    if config["model_type"] not in transformers.CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such model")
    monkeypatch.setattr(growth, "SECONDS", 2)
    folder = write(tmp_path / "ft", config, {"w": torch.zeros(1000)})
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match="takes too long or too much memory"):
        CheckpointCollection([folder]).build_module()
    assert time.perf_counter() - begin < 30
    assert ends_under_a_profiler()  # nothing is left that is raised, or signalled, later


def ends_under_a_profiler() -> bool:
    """A signal that is never taken back makes Python 3.11 turn in a circle there."""
    sys.setprofile(lambda *_: None)
    try:
        return sum(int(str(k)) for k in range(1000)) == 499_500
    finally:
        sys.setprofile(None)


def test_a_build_that_ends_as_it_is_stopped_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(growth, "SECONDS", 0)
    monkeypatch.setattr(growth, "SECONDS_PER_TENSOR", 0)
    ended = []

    def build(seconds):
        with growth.bounded_work(1, Path("ft/config.json")):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                pass
            ended.append(seconds)

    for k in range(20):  # about when the watch looks
        with suppress(CheckpointError):
            build(0.095 + 0.0005 * k)
        assert ends_under_a_profiler()
    with pytest.raises(ZeroDivisionError), growth.bounded_work(1, Path("ft/config.json")):
        _ = 1 / 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_finalizer_that_swallows_the_stop_is_not_waited_for(monkeypatch):
    """Python drops exceptions there."""
    monkeypatch.setattr(growth, "SECONDS", 0)
    monkeypatch.setattr(growth, "SECONDS_PER_TENSOR", 0)

    class Slow:
        def __del__(self):
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                pass

    begin = time.monotonic()
    with growth.bounded_work(1, Path("ft/config.json")):
        Slow()
    assert time.monotonic() - begin < 10


def test_a_build_that_takes_too_much_memory_is_stopped(monkeypatch):
    monkeypatch.setattr(growth, "MEMORY", 1 << 26)
    held: list[bytearray] = []

    def build():
        with growth.bounded_work(1, Path("ft/config.json")):
            for _ in range(10_000):
                held.append(bytearray(b"x" * (1 << 20)))
                time.sleep(0.01)

    with pytest.raises(CheckpointError, match=r"ft/config\.json' .*too much memory"):
        build()
    assert len(held) < 2_000


def test_a_pattern_does_not_follow_links_without_end(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    torch.save({"w": torch.ones(2)}, runs / "x.pt")
    (runs / "y").mkdir()
    torch.save({"w": torch.ones(2)}, runs / "y" / "z.pt")
    for link in ("a", "b"):
        os.symlink(runs, runs / link)
    begin = time.perf_counter()
    assert len(CheckpointCollection.from_path(runs / "**" / "*.pt")) == 2
    assert time.perf_counter() - begin < 10


def test_folders_that_many_links_lead_to_are_looked_into_once(tmp_path, monkeypatch):
    for folder in ("top", "e", "f"):
        (tmp_path / folder).mkdir()
    for k in range(40):
        os.symlink(tmp_path / "e", tmp_path / "top" / f"l{k}")
        os.symlink(tmp_path / "f", tmp_path / "e" / f"l{k}")
    torch.save({"w": torch.ones(2)}, tmp_path / "f" / "x.pt")
    looked = []
    real = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: looked.append(path) or real(path))
    assert len(CheckpointCollection.from_path(tmp_path / "top")) == 1
    assert len(looked) < 200


def test_two_names_for_one_file_are_not_saved(tmp_path):
    ckpts = CheckpointCollection({"x/y": {"w": torch.ones(1)}, "x//y": {"w": torch.zeros(1)}})
    with pytest.raises(ValueError, match="the same file"):
        ckpts.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("computes", [False, True])
def test_archives_without_checksums_are_read(tmp_path, computes):
    torch.serialization.set_crc32_options(computes)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert CheckpointCollection([tmp_path / "a.pt"])["a"]["w"].tolist() == [1, 1, 1]
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(b"FloatStorage")] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC-32" if computes else "more than"):
        CheckpointCollection([tmp_path / "a.pt"])
