"""What a pickle in a file of torch.save can do to the process that opens it: be refused."""

from __future__ import annotations

import copy
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile

import pytest
import torch
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, Recipe
from sksoup.checkpoints import torch_archives, torch_files
from sksoup.checkpoints.pickles import OddKey, read_pickle
from sksoup.checkpoints.torch_archives import read_torch_file


def name(path):
    return f"c{path.rpartition('.')[0]}\n{path.rpartition('.')[2]}\n".encode()


def text(value):
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little")


def tensor(size, stride):
    """A tensor over the four numbers of storage 0."""
    storage = b"(" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu")
    storage += number(4) + b"tQ"
    return (
        name("torch._utils._rebuild_tensor_v2")
        + (b"(" + storage + number(0) + number(size) + b"\x85" + number(stride) + b"\x85\x89")
        + (name("collections.OrderedDict") + b")RtR")
    )


def pickled(*items):
    """A dict of names (opcodes) and values."""
    return b"\x80\x02}" + b"".join(key + value + b"s" for key, value in items) + b"."


def write_zip(path, *members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, content in [*members, ("version", b"3\n")]:
            archive.writestr(f"archive/{member}", content)
    return path


def write_legacy(path, content, rest):
    """A file of before torch 1.6, with this pickle of the object, and the keys of storages."""
    torch.save({}, path, _use_new_zipfile_serialization=False)
    begin, end, after = path.read_bytes().partition(b"\x80\x02}q\x00.")
    assert end
    assert after == b"\x80\x02]q\x00."
    path.write_bytes(begin + content.replace(b"tQ", b"NtQ") + rest)  # no view of a storage
    return path


NUMBERS = ("data/0", struct.pack("<4f", 1, 2, 3, 4))
NO_NUMBERS = b"\x80\x02]."  # the keys of the storages, then their sizes and numbers
NUMBERS_AT_THE_END = b"\x80\x02]" + text("0") + b"a." + struct.pack("<q", 4) + NUMBERS[1]
WEIGHT = (text("w"), tensor(4, 1))
HEX = name("_codecs.encode") * 40 + text("a") * 1 + text("latin1") + b"\x86R"
HEX += (text("hex") + b"\x86R") * 39
SHARED = b")q\x00" + b"h\x00\x86q\x00" * 40  # a tuple of the last one, twice


def test_the_pickles_of_these_tests_are_well_formed(tmp_path):
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(WEIGHT)), NUMBERS)
    assert CheckpointCollection([path])["a"]["w"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (pickled((text("w"), tensor(10**12, 0))), "its tensors have 4,000,000,000,000 bytes"),
        (
            pickled((text("w"), tensor(10**12, 1))),
            "a tensor that is larger than its storage",
        ),
        (
            pickled((text("w"), name("torch.Tensor") + number(10**9) + b"\x85R")),
            r"tensors without their values \(a call of torch.Tensor\)",
        ),
        (
            pickled(WEIGHT, (text("x"), name("__builtin__.bytearray") + number(2**31) + b"\x85R")),
            "'x' is a bytearray, expected a tensor",
        ),
        (pickled(WEIGHT, (text("x"), HEX)), "'x' is a bytes, expected a tensor"),
        (pickled(WEIGHT, (SHARED, number(1))), "a name of type tuple is a int, expected a tensor"),
        (pickled(WEIGHT, (text("x"), SHARED + b"b")), "the state of a str"),
        (pickled(WEIGHT, (text("x"), b"]]\x85R")), "a call of something that is not a class"),
        (b"\x80\x02}X\xff\xff\xff\x7fabc", "can't be read: ValueError: expected 2147483647 bytes"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "holds no tensors"),  # a memo of 2**31 entries
        (pickled(WEIGHT, (text("x"), b"\x8d" + bytes([255] * 8))), "can't be read"),
        (pickled(WEIGHT, (text("x"), b"\x96" + bytes([255] * 8))), "can't be read"),
        (pickled(WEIGHT, (text("x"), b"\x8b\xff\xff\xff\x7f")), "can't be read"),
        (pickled((text("a\ud800"), tensor(4, 1))), r"the name 'a\\ud800' is not valid Unicode"),
    ],
    ids=["expanded", "short", "Tensor", "bytearray", "hex", "hash", "tuples", "call", "text",
         "memo", "unicode8", "bytearray8", "long4", "surrogate"],
)  # fmt: skip
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_small_pickle_fills_no_memory_and_ends(tmp_path, content, match, is_zip):
    path = tmp_path / "small.pt"
    if is_zip:
        write_zip(path, ("data.pkl", content), NUMBERS)
    else:
        write_legacy(path, content, NUMBERS_AT_THE_END if b"storage" in content else NO_NUMBERS)
    with pytest.raises(CheckpointError, match=rf"small\.pt' .*{match}"):
        CheckpointCollection([path])["small"]


def test_a_legacy_file_gives_its_own_numbers_only(tmp_path):
    """A storage that the list at the end lacks is memory as it happens to be: of other objects."""
    content = pickled(WEIGHT)
    path = write_legacy(tmp_path / "a.pt", content, NUMBERS_AT_THE_END)
    assert CheckpointCollection([path])["a"]["w"].tolist() == [1, 2, 3, 4]
    lost, no_list = "the data of the storage '[01]' is missing", "no list of storages"
    for given, keys, match in (
        (content, b"].", lost),
        (content, b"]" + text("1") + b"a.", lost),
        (content, text("0") + b"].", "more than one object"),
        (content, b"}" + text("1") + text("0") + b"s.", no_list),
        (content.replace(text("0"), b"K\0"), b"].", "a storage without a key"),
    ):
        write_legacy(path, given, b"\x80\x02" + keys + NUMBERS_AT_THE_END[-24:])
        with pytest.raises(CheckpointError, match=rf"a\.pt' can't be read: .*{match}"):
            CheckpointCollection([path])
    for numbers in (NUMBERS_AT_THE_END[-23:], NUMBERS_AT_THE_END[-24:].replace(b"\4", b"\5", 1)):
        write_legacy(path, content, NUMBERS_AT_THE_END[:-24] + numbers)
        with pytest.raises(CheckpointError, match="missing, or not as long as its values"):
            CheckpointCollection([path])


TENSOR, EIGHT = name("torch.Tensor"), number(8) + b"\x85"


@pytest.mark.parametrize(
    "value",
    [
        TENSOR + EIGHT + b"R",
        TENSOR + EIGHT + b"\x81",
        name("torch.FloatTensor") + EIGHT + b"R",
        name("torch.storage.UntypedStorage") + EIGHT + b"R",
        name("torch.nn.parameter.Parameter") + TENSOR + EIGHT + b"R\x85R",
        name("torch._tensor._rebuild_from_type_v2") + b"(" + TENSOR * 2 + EIGHT + b"}tR",
        name("torch._tensor._rebuild_from_type_v2") + b"h\x00" + b"R",
    ],
    ids=["call", "new", "FloatTensor", "storage", "parameter", "within", "unseen"],
)
def test_a_file_does_not_give_what_is_in_memory(tmp_path, value):
    """Tensors that are made by their size hold what the process had there, such as other files."""
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(WEIGHT, (text("x"), value))), NUMBERS)
    with pytest.raises(
        CheckpointError, match=r"a\.pt' can't be read: (it holds (tensors wi|more|a new)|K)"
    ):
        CheckpointCollection([path])


ODICT = name("collections.OrderedDict")
HIDING = ODICT + b"]" + text("items") + b"K\0\x86a\x85R"  # OrderedDict([("items", 0)])
OTHER_MEMORY = (
    tensor(4, 1) + b"q\x00(h\x00" + number(0) + number(9) + b"\x85" + number(1) + b"\x85t"
)


@pytest.mark.parametrize(
    "built",
    [
        tensor(4, 1) + b")b",  # Tensor.set_() with no arguments: an empty storage
        OTHER_MEMORY + b"b",  # ... and one that set_ makes larger, without values
        name("torch._utils._rebuild_parameter") + b"(" + tensor(4, 1) + b"\x89" + ODICT + b")RtR)b",
        b"}}b",
        ODICT + b")R" + HIDING + b"b",
    ],
    ids=["empty", "larger", "parameter", "dict", "hiding"],
)
def test_the_state_of_a_tensor_or_dict_is_refused(tmp_path, built):
    inner = (text("state_dict"), b"}" + WEIGHT[0] + WEIGHT[1] + b"s")
    for content in (pickled((text("w"), built)), pickled(inner, (text("x"), built))):
        path = write_zip(tmp_path / "a.pt", ("data.pkl", content), NUMBERS)
        with pytest.raises(
            CheckpointError, match=r"(the state of a (Tensor|dict), which|'items' is repl)"
        ):
            CheckpointCollection([path])


@pytest.mark.parametrize(
    "built",
    [
        name("__builtin__.set") + b"]\x85R}b",
        name("UserList.OrderedDict") + b")R}" + text("items") + b"K\0sb",  # in Python 2
    ],
    ids=["set", "alias"],
)
def test_the_state_of_other_objects_is_not_set(tmp_path, built):
    inner = (text("state_dict"), b"}" + WEIGHT[0] + WEIGHT[1] + b"s")
    content = pickled(inner, (text("x"), built))
    path = write_zip(tmp_path / "a.pt", ("data.pkl", content), NUMBERS)
    assert CheckpointCollection([path])["a"]["w"].tolist() == [1, 2, 3, 4]
    assert not read_torch_file(path, "meta").is_plain


def large(k):
    """An integer whose hash is 0."""
    return b"\x8a\x0b" + (k * sys.hash_info.modulus).to_bytes(11, "little")


LARGE = [large(k) for k in range(1, 20_000)]
COMPLEX = [  # which have equal hashes, too
    name("__builtin__.complex") + b"".join(b"G" + struct.pack(">d", x) for x in (-1000003 * k, k))
    + b"\x86R" for k in range(1, 20_000)
]  # fmt: skip
PAIRS = b"".join(b"K\0G" + struct.pack(">d", k) + b"\x86" for k in range(20_000))
HEAVY = [  # a tuple of 95 tuples of 95 tuples
    (text("1"), b"N\x85q\x01"),
    (text("2"), b"(" + b"h\x01" * 95 + b"tq\x02"),
    (text("3"), b"(" + b"h\x02" * 95 + b"tq\x03"),
]
FILLED_LATER = (
    (text("t"), b"]q\x01\x85q\x02"),  # a tuple with an empty list
    (text("l"), b"h\x01(" + b"K\0" * 50_000 + b"e"),
    (text("c"), b"](" + (name("__builtin__.set") + b"h\x02R") * 400 + b"e"),
)


@pytest.mark.parametrize(
    "more",
    [
        FILLED_LATER,
        [(text("x"), b"}(" + b"".join(each + b"N" for each in LARGE) + b"u")],
        [(text("x"), name("__builtin__.set") + b"](" + b"".join(LARGE) + b"e\x85R")],
        [(text("x"), name("collections.Counter") + b"](" + PAIRS + b"e\x85R")],
        [(text("x"), b"}(" + b"".join(each + b"N" for each in COMPLEX) + b"u")],
        [(text(f"x{k}"), name(f"made.Up{k}") + b")R") for k in range(4_000)],
        [*HEAVY, (text("y"), b"](" + b"h\x03" * 100_000 + b"e")],
        [(text("x"), b"}" + SHARED + b"Ns")],
    ],
    ids=["filled later", "keys", "set", "Counter", "complex", "names", "repeated", "nested"],
)
def test_the_time_and_memory_of_a_container_are_those_of_its_opcodes(tmp_path, more):
    """Of what a pickle holds, only texts and small integers are ever hashed or compared."""
    inner = (text("state_dict"), b"}" + WEIGHT[0] + WEIGHT[1] + b"s")
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(inner, *more)), NUMBERS)
    assert CheckpointCollection([path])["a"]["w"].tolist() == [1, 2, 3, 4]
    found = read_torch_file(path, "meta").value["x" if "x" in dict(more) else "state_dict"]
    for key in found if isinstance(found, dict) else ():
        assert isinstance(key, (str, int, OddKey))
        assert not isinstance(key, int) or abs(key) < sys.hash_info.modulus


def test_names_of_classes_are_short_and_kept_once(tmp_path):
    """Each object had its own copy of the name."""
    calls = b"](" + b"h\x01)R" * 100 + b"e"
    for n, is_read in ((900, True), (2_000, False)):
        made = (text("t"), name("made." + "U" * n) + b"q\x01")
        path = write_zip(
            tmp_path / "a.pt", ("data.pkl", pickled(WEIGHT, made, (text("c"), calls))), NUMBERS
        )
        if is_read:
            found = read_torch_file(path, "meta").value["c"]
            assert len({id(one.name) for one in found}) == 1
        else:
            with pytest.raises(CheckpointError, match="the name of a class with 2,005 characters"):
                CheckpointCollection([path])


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.replace(number(4) + b"\x85" + number(1), value + number(1)),
        lambda value: value.replace(number(1) + b"\x85\x89", value + b"\x89"),
        lambda value: name("collections.OrderedDict") + b"](" + value + b"e\x85R",
        lambda value: (
            name("torch._tensor._rebuild_from_type_v2") + b"(" + TENSOR * 2 + value + b"NtR"
        ),
    ],
    ids=["size", "stride", "pairs", "arguments"],
)
def test_a_tensor_is_not_taken_for_a_tuple(tmp_path, change):
    """It may be expanded to any length."""
    content = pickled(WEIGHT, (text("x"), change(tensor(4, 1))))
    path = write_zip(tmp_path / "a.pt", ("data.pkl", content), NUMBERS)
    with pytest.raises(CheckpointError, match=r"(wrong shape|not a list of pairs|dense tensors)"):
        CheckpointCollection([path])


@pytest.mark.parametrize("is_size", [False, True])
def test_large_arguments_of_tensors_are_not_copied(tmp_path, is_size):
    """160 kB with one large tuple took seconds, and four times as long for twice as much."""
    large = b"(" + b"K\1" * 100_000 + b"tq\x01"
    value = tensor(4, 1)
    call = (
        value.replace(number(4) + b"\x85" + number(1), b"h\x01" + number(1))
        if is_size
        else (name("torch._utils._rebuild_tensor_v2") + b"h\x01R")
    )
    content = pickled(WEIGHT, (text("t"), large), (text("c"), b"](" + call * 3 + b"e"))
    path = write_zip(tmp_path / "a.pt", ("data.pkl", content), NUMBERS)
    with pytest.raises(
        CheckpointError, match=r"(with 100,000 arguments|a tensor with a wrong shape)"
    ):
        CheckpointCollection([path])


def test_parts_that_entries_share_are_looked_at_once(tmp_path, monkeypatch):
    """In the search for weights outside the state dict."""
    shared = [f"text {k}" for k in range(1_000)]
    entries = {f"x{k}": {"a": shared, "b": k} for k in range(100)}
    torch.save({"model": {"w": torch.ones(2)}, **entries}, tmp_path / "a.pt")
    counted, original = [0], torch_files._holds_weights

    def counting(entry, seen, is_beside):
        before = len(seen)
        found = original(entry, seen, is_beside)
        counted[0] += len(seen) - before
        return found

    monkeypatch.setattr(torch_files, "_holds_weights", counting)
    assert CheckpointCollection([tmp_path / "a.pt"])["a"]["w"].tolist() == [1, 1]
    assert counted[0] == 100 + 1  # the dicts and the list, when opened


def test_texts_of_python_2_are_ascii(tmp_path):
    """pickletools decodes them as Latin-1, torch.load as UTF-8."""
    for key, is_read in ((b"w", True), (b"\xc3\xa4", False)):
        content = pickled((b"U" + bytes([len(key)]) + key, tensor(4, 1)))
        path = write_zip(tmp_path / "a.pt", ("data.pkl", content), NUMBERS)
        if is_read:
            assert CheckpointCollection([path])["a"]["w"].tolist() == [1, 2, 3, 4]
        else:
            with pytest.raises(CheckpointError, match="a text of Python 2 that is not ASCII"):
                CheckpointCollection([path])


def test_states_and_keys_are_not_looked_through_again_and_again(tmp_path):
    state = b"}(" + b"".join(text(f"a{k}") + b"N" for k in range(1_000)) + b"uq\x01"
    again = ODICT + b")R" + b"h\x01b" * 1_000
    for more, match in (
        ([(text("s"), state), (text("o"), again)], "the same list or arguments in very many calls"),
        ([(text("o"), tensor(4, 1).replace(text("0"), text("0" * 21)))], "a storage without a key"),
    ):
        path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(WEIGHT, *more)), NUMBERS)
        with pytest.raises(CheckpointError, match=match):
            CheckpointCollection([path])


def test_a_long_name_that_dicts_share_is_searched_once(tmp_path, monkeypatch):
    name_of_all = "x" * 50_000
    entries = {f"x{k}": {name_of_all: [k]} for k in range(100)}
    torch.save({"model": {"w": torch.ones(2)}, **entries}, tmp_path / "a.pt")
    searched, original = [], torch_files._is_beside
    monkeypatch.setattr(
        torch_files, "_is_beside", lambda name: searched.append(name) or original(name)
    )
    assert CheckpointCollection([tmp_path / "a.pt"])["a"]["w"].tolist() == [1, 1]
    assert searched.count(name_of_all) == 1  # when opened


def test_a_pickle_is_read_once(tmp_path, monkeypatch):
    """Also where each of many expanded tensors is a group of its own in a mix into a folder."""
    monkeypatch.setattr("sksoup.mixing.mix.GROUP", 1)
    read, original = [], torch_archives.read_pickle
    monkeypatch.setattr(
        torch_archives, "read_pickle", lambda *args: read.append(args) or original(*args)
    )
    for k in range(2):
        one = torch.full((1,), 1.0 + k)
        torch.save({f"a{i}": one.expand(i + 2) for i in range(9)}, tmp_path / f"{k}.pt")
    ckpts = CheckpointCollection([tmp_path / "0.pt", tmp_path / "1.pt"])
    recipe = Recipe.record("mean", ckpts, [0.5, 0.5], layers=dict.fromkeys(ckpts.layout, 0))
    assert recipe.verify(recipe.cook(ckpts, out=tmp_path / "mixed"), ckpts).ok
    assert len(read) == 2


def test_a_method_of_a_class_is_refused(tmp_path):
    inner = (text("state_dict"), b"}" + WEIGHT[0] + WEIGHT[1] + b"s")
    method = (text("x"), b"ccollections\nOrderedDict.update\n}}\x86R")
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(inner, method)), NUMBERS)
    with pytest.raises(CheckpointError, match=r"than tensors \(collections\.OrderedDict\.update\)"):
        CheckpointCollection([path])


def test_tables_of_pairs_are_read(tmp_path):
    """As the merges of a tokenizer, or numbers of pairs."""
    merges = {(f"a{k}", k): k for k in range(20_000)}
    torch.save({"state_dict": {"w": torch.ones(2)}, "merges": merges}, tmp_path / "a.pt")
    assert CheckpointCollection([tmp_path / "a.pt"])["a"]["w"].tolist() == [1, 1]


def test_parameters_with_attributes_are_read(tmp_path):
    weight = nn.Parameter(torch.arange(4.0))
    weight.note = "kept"
    torch.save({"w": weight}, tmp_path / "a.pt")
    assert CheckpointCollection([tmp_path / "a.pt"])["a"]["w"].tolist() == [0, 1, 2, 3]
    torch.save({"w": torch.arange(4.0), "x": torch.ones(2, dtype=torch.uint16)}, tmp_path / "b.pt")
    assert CheckpointCollection([tmp_path / "b.pt"])["b"]["x"].tolist() == [1, 1]


def test_tensors_without_values_or_with_tensors_in_them_are_refused(tmp_path):
    nested = torch._nested_view_from_buffer(
        torch.ones(5), torch.tensor([[2], [3]]), torch.tensor([[1], [1]]), torch.tensor([0, 2])
    )
    for value, match in (
        (torch.ones(3, device="meta"), "is on the device 'meta', where tensors have no values"),
        (nested, "is a sparse, quantized or nested tensor"),
    ):
        torch.save({"w": value}, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match=r"odd\.pt' .*more than dense tensors \(torch"):
            CheckpointCollection([tmp_path / "odd.pt"])
        with pytest.raises(CheckpointError, match=match):
            CheckpointCollection([{"w": value}])
    with pytest.raises(CheckpointError, match="is not valid Unicode"):
        CheckpointCollection([{"w\udcff": torch.ones(1)}])


def test_tied_and_expanded_tensors_are_read(tmp_path):
    tied = torch.rand(300_000)
    state = {f"{k}": tied for k in range(12)} | {"x": torch.ones(1).expand(1000, 1000)}
    torch.save(state, tmp_path / "a.pt")
    assert CheckpointCollection([tmp_path / "a.pt"])["a"]["x"].sum() == 10**6


def test_a_compressed_archive_is_refused(tmp_path):
    """Its small members may be of any size; and torch would map the compressed bytes as weights."""
    path = tmp_path / "a.pt"
    members = (("data.pkl", pickled(WEIGHT)), NUMBERS)
    write_zip(path, *members, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"a\.pt' .*a member is compressed"):
        CheckpointCollection([path])
    write_zip(path, *members, ("DATA.PKL", pickled(WEIGHT)))
    with pytest.raises(CheckpointError, match="two members of one name"):
        CheckpointCollection([path])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(WEIGHT))
        archive.writestr(*NUMBERS)
    with pytest.raises(CheckpointError, match="more than one folder"):
        CheckpointCollection([path])


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("key", "members"),
    [("0\0x", ("0", "0\0x")), ("\u212a", ("k", "K")), ("\xc4", ("\xe4", "\xc4")), ("k", ("k",))],
    ids=["NUL", "Kelvin", "umlaut", "letter"],
)
def test_names_of_storages_that_torch_finds_elsewhere_are_refused(tmp_path, key, members):
    """It compares bytes up to NUL, and ignores the case of A to Z only."""
    content = pickled((text("w"), tensor(4, 1).replace(text("0"), text(key))))
    found = [(f"data/{member}", NUMBERS[1]) for member in members]
    path = write_zip(tmp_path / "a.pt", ("data.pkl", content), *found)
    with pytest.raises(CheckpointError, match=r"without a key|two members|in plain ASCII"):
        CheckpointCollection([path])


@pytest.mark.parametrize("member", ["data/\xe4", "data/0\0x", "data/\u212a"])
def test_names_of_members_are_plain_ascii(tmp_path, member):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", pickled(WEIGHT)), NUMBERS, (member, b"")):
            info = zipfile.ZipInfo("x")
            info.filename = f"archive/{name}"
            archive.writestr(info, content)
    with pytest.raises(CheckpointError, match="not in plain ASCII"):
        CheckpointCollection([path])


def test_an_archive_that_was_packed_again_is_read(tmp_path):
    """With entries for its folders, under a name that is not ASCII."""
    path = tmp_path / "\xe4.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("\xe4")
        archive.mkdir("\xe4/data")
        archive.writestr("\xe4/data.pkl", pickled(WEIGHT))
        archive.writestr("\xe4/data/0", NUMBERS[1])
    assert CheckpointCollection([path])["\xe4"]["w"].tolist() == [1, 2, 3, 4]


def test_a_legacy_file_that_is_a_tar_archive_is_refused(tmp_path):
    """torch.load would read the archive, as a still older format."""
    path = write_legacy(tmp_path / "a.pt", pickled(WEIGHT), NUMBERS_AT_THE_END)
    content = path.read_bytes()
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    begin = content[: content.index(b"\x80\x02}", 20)]  # two pickles
    header[: len(begin)] = begin
    third = b"\x80\x02X" + struct.pack("<I", 512 - len(begin) - 8)
    header[len(begin) : len(begin) + len(third)] = third
    header[-1:] = b"."
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    rest = content[content.index(pickled(WEIGHT).replace(b"tQ", b"NtQ")) :]
    path.write_bytes(bytes(header) + rest + bytes(10_240))
    with tarfile.open(path, "r:"):
        pass
    with pytest.raises(CheckpointError, match="it is a tar archive"):
        CheckpointCollection([path])


def test_a_member_with_two_positions_is_refused(tmp_path):
    """torch goes by the first field of 64 bits, zipfile by the last one that is needed."""
    field = struct.pack("<HHQ", 1, 8, 2**32 - 1), struct.pack("<HHQ", 1, 8, 0)
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(WEIGHT)), NUMBERS)
    for fields, is_read in ((field[1:], True), (field, False)):
        content = bytearray(path.read_bytes())
        begin = content.index(b"PK\1\2")
        place = content.index(b"archive/data.pkl", begin)
        content[begin + 30 : begin + 32] = struct.pack("<H", sum(map(len, fields)))
        content[begin + 42 : begin + 46] = b"\xff" * 4
        content[place + 16 : place + 16] = b"".join(fields)
        end = content.index(b"PK\5\6")
        size = struct.unpack_from("<I", content, end + 12)[0] + sum(map(len, fields))
        struct.pack_into("<I", content, end + 12, size)
        other = tmp_path / f"b{len(fields)}.pt"
        other.write_bytes(content)
        if is_read:
            assert CheckpointCollection([other])[other.stem]["w"].tolist() == [1, 2, 3, 4]
        else:
            with pytest.raises(CheckpointError, match="a member has two positions"):
                CheckpointCollection([other])


@pytest.mark.parametrize("bits", [b"conj\x89", b"conjN", b"conj\x88", b"odd\x88"])
def test_bits_of_tensors_that_torch_reads_otherwise_are_refused(tmp_path, bits):
    """It sets the conjugate bit of any value; a real tensor has none."""
    state = b"}" + text(bits[:-1].decode()) + bits[-1:] + b"s"
    value = tensor(4, 1).replace(b"RtR", b"R" + state + b"tR")
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled((text("w"), value))), NUMBERS)
    with pytest.raises(CheckpointError, match=r"with (unknown metadata|the conjugate bit)"):
        CheckpointCollection([path])


def test_a_module_of_torchscript_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(WEIGHT)), NUMBERS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="it is a module of TorchScript"):
        CheckpointCollection([path])


@pytest.mark.parametrize(
    "kind",
    [b"N", b"}", b")", b"h\x01)R", b"}NNs", b"h\x01](NN\x86e\x85R", b"h\x02)R", b"h\x02)RNb"],
    ids=["keys", "dicts", "tuples", "OrderedDict", "None", "pairs", "objects", "states"],
)
def test_a_pickle_takes_memory_in_proportion_to_its_bytes(tmp_path, kind):
    before = name("collections.OrderedDict") + b"q\x01" + name("made.Up") + b"q\x02"
    items = b"(" + kind * (200_000 // len(kind)) + b"e"
    if kind == b"N":
        items = b"}(" + b")N" * 100_000 + b"ua"
    content = b"\x80\x02(" + before + b"]" + items + b"t."
    tracemalloc.start()
    read_pickle(content, lambda *_: (0, torch.empty(0)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(content)


def test_no_few_bytes_make_a_tensor_each(tmp_path):
    """With the same arguments again and again; those of torch.save are new ones."""
    function, _, rest = tensor(4, 1).partition(b"_v2\n")
    first = function + b"_v2\nq\x01" + rest.removesuffix(b"R") + b"q\x02R"
    sparse = name("torch._utils._rebuild_sparse_tensor") + b"q\x03)R"
    for call, is_read in ((b"h\x01h\x02R", False), (b"h\x03)R", True)):
        calls = b"](" + first + sparse + call * 1_000 + b"e"
        content = pickled(WEIGHT, (text("c"), calls))
        path = write_zip(tmp_path / "a.pt", ("data.pkl", content), NUMBERS)
        if is_read:
            found = read_torch_file(path, "meta").value["c"]
            assert len({id(one) for one in found}) == 2
        else:
            with pytest.raises(CheckpointError, match="arguments in very many calls"):
                CheckpointCollection([path])


def test_a_member_that_torch_does_not_read_is_refused(tmp_path):
    """torch.load without mmap returns whatever is in the memory for a member that is a folder."""
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(WEIGHT)), NUMBERS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.getinfo("archive/data/0").external_attr |= 0x10
        archive._didModify = True
    with pytest.raises(CheckpointError, match="a member is marked as a folder"):
        CheckpointCollection([path])


def test_members_that_overlap_are_refused(tmp_path):
    """Copies of unaligned storages would fill the memory."""
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(WEIGHT)), ("data/0", bytes(4000)))
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("archive/data/0")
        for k in range(1, 20):
            archive.filelist.append(copy.copy(first))
            archive.filelist[-1].filename = archive.filelist[-1].orig_filename = f"archive/data/{k}"
        archive._didModify = True
    with pytest.raises(CheckpointError, match="its members do not fill it"):
        CheckpointCollection([path])


def test_a_storage_has_one_dtype_and_size_and_those_of_its_member(tmp_path):
    other = tensor(4, 1).replace(b"FloatStorage", b"IntStorage")
    for more, numbers, match in (
        ([(text("x"), other)], NUMBERS[1], "the storage '0' with two dtypes or sizes"),
        ([], NUMBERS[1] * 2, "missing, or not as long as its values"),
        ([], NUMBERS[1][:-1], "missing, or not as long as its values"),
    ):
        content = pickled(WEIGHT, *more)
        path = write_zip(tmp_path / "a.pt", ("data.pkl", content), ("data/0", numbers))
        with pytest.raises(CheckpointError, match=rf"a\.pt' can't be read: .*{match}"):
            CheckpointCollection([path])


def in_one_file(path, read_by_torch, read_by_zipfile, has_records):
    """Two archives with a directory each; records of zip64 have one place to point to."""
    size = max(map(len, (read_by_torch, read_by_zipfile)))
    for pickle in (read_by_torch, read_by_zipfile):
        write_zip(path, ("data.pkl", pickle.ljust(size, b".")), NUMBERS)
        whole = path.read_bytes()
        if pickle is read_by_torch:
            harmful, end = whole[:-22], whole[-22:]
    if not has_records:  # both ends say the same, counted from other beginnings
        path.write_bytes(harmful + whole)
        return
    path.write_bytes(harmful + zip64(end))
    with zipfile.ZipFile(path, "a") as archive:
        for member in ("data.pkl", "data/0", "version"):
            archive.writestr(f"archive/{member}", read_by_zipfile)
    whole = path.read_bytes()
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(harmful), 1)
    path.write_bytes(whole[:-22] + zip64(whole[-22:]) + locator + whole[-22:])


def zip64(end):
    """What the end of an archive says, in 64 bits."""
    sizes = struct.unpack("<2H2I", end[8:20])
    return struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, *sizes)


@pytest.mark.parametrize("has_records", [False, True])
def test_an_archive_that_is_another_one_for_torch(tmp_path, has_records):
    """Python's zipfile goes by where the end is, torch by what it says."""
    path = tmp_path / "two.pt"
    harmless = pickled(WEIGHT)
    harmful = pickled(WEIGHT, (text("x"), name("__builtin__.bytearray") + number(1) + b"\x85R"))
    in_one_file(path, harmful, harmless, has_records)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/data.pkl").startswith(harmless)
    with pytest.raises(CheckpointError, match=r"two\.pt' .*wrong position of its directory"):
        CheckpointCollection([path])


@pytest.mark.parametrize("member", ["byteorder", "BYTEORDER"])
def test_numbers_of_another_byte_order(tmp_path, member):
    """Torch would swap the bytes of storages that have none, which ends the process."""
    order = b"little" if sys.byteorder == "big" else b"big"
    path = write_zip(tmp_path / "a.pt", ("data.pkl", pickled(WEIGHT)), NUMBERS, (member, order))
    script = "from sksoup import CheckpointCollection; CheckpointCollection(['a.pt'])"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=path.parent, capture_output=True, text=True,
        timeout=60, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert f"a.pt' can't be read: it has the byte order {order.decode()!r}" in ran.stderr
