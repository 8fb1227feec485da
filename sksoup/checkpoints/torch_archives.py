"""Find the pickle and the storages in files of torch.save: zip archives, and before torch 1.6."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import IO

import torch

from .pickles import Pickled, Place, read_pickle
from .protocol import Read
from .read import is_tar

ZIP64, LOCATOR, END = 56, 20, 22  # bytes of the records at the end of a zip archive
ALIGNED = 16  # bytes of the largest dtype
LOCAL = 30  # bytes at the beginning of a member, before its name
DESCRIPTOR = 24  # most bytes between members, which repeat the size of the one before
ENCRYPTED = 0x1 | 0x40  # flags of a member
FOLDER = 0x10  # an attribute of a member
MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # in the first pickle before torch 1.6
SAVE_AGAIN = "Load it and save it again with torch."


def read_torch_file(path: Path, device: str) -> Pickled:
    """Read a file; on 'meta', only its pickle, else the values are mapped from the file."""
    if is_zip(path):
        return _read_archive(path, device)
    with path.open("rb") as file:
        return _read_legacy(path, file, device)


def map_tensors(path: Path, places: Mapping[str, Place]) -> Read:
    """Map a file, and return a function that gives its tensors: views of it, which are not read.

    Storages that torch did not align are copied when the first of their tensors is needed.
    """
    take = _taker(path, "cpu")

    @cache
    def storage(start: int, stop: int) -> torch.Tensor:
        return take(start, torch.uint8, stop - start)

    def read(name: str) -> torch.Tensor:
        start, stop, view = places[name]
        return view.of(storage(start, stop))

    return read


def is_zip(path: Path) -> bool:
    """Whether torch reads a file as a zip archive: it checks the first bytes, Python the last."""
    with path.open("rb") as file:
        found = file.read(4) == b"PK\3\4"
    if found == zipfile.is_zipfile(path):
        return found
    if found:
        raise ValueError("it begins as a zip archive but does not end as one")
    raise UnpicklingError(
        f"it is a zip archive according to its last bytes, but not according to its first ones, so "
        f"two programs may read different contents. {SAVE_AGAIN}"
    )


def _read_archive(path: Path, device: str) -> Pickled:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        end, listed = _directory(file), archive.infolist()
        members = {_inner(member).lower(): member for member in listed}
        wrong = next(filter(None, map(_oddity, listed)), "")
        if end != archive.start_dir:
            wrong = "its end record points to a wrong position of its directory"
        elif archive.comment:
            wrong = "it has a comment"
        elif (
            len(members) < len(listed)
            or len({m.orig_filename.partition("/")[0] for m in listed}) > 1
        ):
            wrong = "it holds two members of one name, or more than one folder"
        elif "constants.pkl" in members:
            wrong = "it is a module of TorchScript"
        starts = {} if wrong else _starts(file, members, end)
        if wrong or not starts:
            raise UnpicklingError(
                f"it is a zip archive that torch.save does not write, in which other programs may "
                f"find other members: {wrong or 'its members do not fill it'}. {SAVE_AGAIN}"
            )
        if "data.pkl" not in members:
            raise ValueError("it is a zip archive without data.pkl")
        take = _taker(path, device)

        def storage(key: str, dtype: torch.dtype, count: int) -> tuple[int, torch.Tensor]:
            member = members.get(f"data/{key}")
            if member is None or member.file_size // dtype.itemsize != count:
                raise _lost(key)
            start = starts[f"data/{key}"]
            return start, take(start, dtype, count)

        def contents(name: str) -> bytes:
            if members[name].CRC:
                return archive.read(members[name])
            file.seek(starts[name])  # torch.serialization.set_crc32_options(False) writes none
            return file.read(members[name].file_size)

        if "byteorder" in members:
            _check_byte_order(contents("byteorder"))
        return read_pickle(contents("data.pkl"), storage)


def _inner(member: zipfile.ZipInfo) -> str:
    """A member's name in the archive's folder, as it is stored: not that in an extra field."""
    return member.orig_filename.partition("/")[2]


def _oddity(member: zipfile.ZipInfo) -> str:
    """What is unusual about a member, so that programs may read it in different ways."""
    name = _inner(member)
    is_folder = name.endswith("/") or not name
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        return "a member is compressed"
    if member.flag_bits & ENCRYPTED:
        return "a member is encrypted"
    if member.external_attr & FOLDER and not is_folder:  # torch gives what is in the memory
        return "a member is marked as a folder"
    if not name.isascii() or not (name.isprintable() or not name):  # torch reads up to NUL
        return "a name of a member is not in plain ASCII"
    if _zip64_fields(member.extra) > 1:  # torch goes by the first, zipfile by all
        return "a member has two positions"
    return ""


def _starts(file: IO[bytes], members: Mapping[str, zipfile.ZipInfo], end: int) -> dict[str, int]:
    """Where the bytes of each member start; empty unless the members fill the file up to its end.

    Names are compared without case, as torch does.
    """
    starts, position = {}, 0
    for name, member in sorted(members.items(), key=lambda item: item[1].header_offset):
        file.seek(member.header_offset)
        local = file.read(LOCAL)
        if local[:4] != b"PK\3\4" or not 0 <= member.header_offset - position <= DESCRIPTOR:
            return {}
        lengths = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
        starts[name] = member.header_offset + LOCAL + sum(lengths)
        position = starts[name] + member.file_size
    return starts if 0 <= end - position <= DESCRIPTOR else {}


def _check_byte_order(found: bytes) -> None:
    order = found[:8].decode("latin1")
    if order != sys.byteorder:
        raise UnpicklingError(
            f"it has the byte order {order!r}, expected {sys.byteorder!r}. Load it with torch and "
            f"save it as .safetensors."
        )


def _zip64_fields(extra: bytes) -> int:
    """The number of fields with sizes and a position in the extra data of a member."""
    count = 0
    while extra:
        count += extra[:2] == b"\1\0"
        extra = extra[4 + int.from_bytes(extra[2:4], "little") :]
    return count


def _directory(file: IO[bytes]) -> int:
    """The start of the directory according to the end of a zip archive, as torch reads it.

    Python's zipfile uses the bytes just before the end instead. -1 if the two disagree.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(-min(size, ZIP64 + LOCATOR + END), io.SEEK_END)
    last = file.read()
    record, locator, end = last[: -LOCATOR - END], last[-LOCATOR - END : -END], last[-END:]
    if end[:4] != b"PK\5\6":
        return -1
    if locator[:4] != b"PK\6\7":
        return int.from_bytes(end[16:20], "little")
    if record[:4] != b"PK\6\6" or int.from_bytes(locator[8:16], "little") != size - len(last):
        return -1
    return int.from_bytes(record[48:56], "little")


def _read_legacy(path: Path, file: IO[bytes], device: str) -> Pickled:
    """Four pickles, the last of them the object, a list of storages, and their values."""
    if MAGIC not in file.read(32):
        raise ValueError("it does not begin as a file of torch.save")
    if is_tar(path):  # torch.load would read it as an older format
        raise UnpicklingError(f"it is a tar archive. {SAVE_AGAIN}")
    file.seek(0)
    magic, _, _ = (read_pickle(file, _no_storage).value for _ in range(3))
    if magic != int.from_bytes(MAGIC, "little"):
        raise ValueError("it does not begin as a file of torch.save")
    begin = file.tell()
    used: dict[str, tuple[torch.dtype, int]] = {}

    def note(key: str, dtype: torch.dtype, count: int) -> tuple[int, torch.Tensor]:
        used[key] = dtype, count
        return 0, torch.empty(count, dtype=dtype, device="meta")

    read_pickle(file, note)  # where the values are is known only at the end
    keys = read_pickle(file, _no_storage).value
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UnpicklingError(f"it has no list of storages. {SAVE_AGAIN}")
    starts, end = {}, os.fstat(file.fileno()).st_size
    for key in keys:  # each is a number of values, and the values
        dtype, count = used.get(key, (torch.uint8, -1))
        is_there = key not in starts and int.from_bytes(file.read(8), "little") == count
        starts[key] = file.tell()
        if not is_there or file.seek(count * dtype.itemsize, io.SEEK_CUR) > end:
            raise _lost(key)
    if lost := used.keys() - starts:
        raise _lost(min(lost))
    take = _taker(path, device)
    file.seek(begin)
    return read_pickle(
        file, lambda key, dtype, count: (starts[key], take(starts[key], dtype, count))
    )


def _taker(path: Path, device: str) -> Callable[[int, torch.dtype, int], torch.Tensor]:
    """A function that gives the values of a storage from its start, its dtype and their number."""
    size = path.stat().st_size
    whole = None if device == "meta" else torch.UntypedStorage.from_file(str(path), False, size)

    def take(start: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        stop = start + count * dtype.itemsize
        if stop > size:
            raise ValueError("it ends within a storage")
        if whole is None:
            return torch.empty(count, dtype=dtype, device="meta")
        part = whole[start:stop]
        # torch.save aligns storages since version 1.6, and reads those before as they are
        return torch.empty(0, dtype=dtype).set_(part.clone() if start % ALIGNED else part)

    return take


def _no_storage(key: str, dtype: torch.dtype, count: int) -> tuple[int, torch.Tensor]:
    raise ValueError("tensors are in a place where torch.save does not write any")


def _lost(key: str) -> UnpicklingError:
    return UnpicklingError(
        f"the data of the storage {key!r} is missing, or not as long as its values. {SAVE_AGAIN}"
    )
