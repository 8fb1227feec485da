"""Find the pickle and the storages in files of torch.save: zip archives, and before torch 1.6."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import IO

import torch

from .pickles import Pickled, read_pickle

ZIP64, LOCATOR, END = 56, 20, 22  # bytes of the records at the end of a zip archive
ALIGNED = 16  # bytes of the largest dtype
LOCAL = 30  # bytes at the beginning of a member, before its name
ENCRYPTED = 0x1 | 0x40  # flags of a member
FOLDER = 0x10  # an attribute of a member
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of before torch 1.6
SAVE_AGAIN = "Load it and save it again with torch."


def read_torch_file(path: Path, device: str) -> Pickled:
    """Read a file; on 'meta', only its pickle, else the values are mapped from the file."""
    if is_zip(path):
        return _read_archive(path, device)
    with path.open("rb") as file:
        return _read_legacy(path, file, device)


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
        members = _members(archive, _directory(file))
        found = members.get("data.pkl")
        if found is None:
            raise ValueError("it is a zip archive without data.pkl")
        take = _taker(path, device)

        def storage(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
            member = members.get(f"data/{key}".lower())
            if member is None or member.file_size // dtype.itemsize != count:
                raise _lost(key)
            return take(_start(file, member), dtype, count)

        return read_pickle(archive.read(found), storage)


def _members(archive: zipfile.ZipFile, directory: int) -> dict[str, zipfile.ZipInfo]:
    """The members in the archive's folder; raise an error for what other programs read otherwise.

    Names are compared as they are stored, without case, as torch does; zipfile can take them from
    an extra field.
    """
    if directory != archive.start_dir:
        raise UnpicklingError(
            f"it is a zip archive whose end record points to a wrong position of its directory, so "
            f"other programs may find other members in it. {SAVE_AGAIN}"
        )
    listed = archive.infolist()
    names = [member.orig_filename.lower().partition("/") for member in listed]
    found = {name: member for (_, _, name), member in zip(names, listed, strict=True)}
    wrong = ""
    if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in listed):
        wrong = "its members are compressed"
    elif sum(member.file_size for member in listed) > directory:
        wrong = "its members overlap"
    elif len(found) < len(listed) or len({folder for folder, *_ in names}) > 1:
        wrong = "it holds two members of one name, or more than one folder"
    elif archive.comment or any(member.flag_bits & ENCRYPTED for member in listed):
        wrong = "it is encrypted or has a comment"
    elif any(member.external_attr & FOLDER for member in listed):  # not read by torch at all
        wrong = "a member is marked as a folder"
    if wrong:
        raise UnpicklingError(
            f"it is a zip archive that torch.save does not write: {wrong}. {SAVE_AGAIN}"
        )
    if (member := found.get("byteorder")) is not None:
        with archive.open(member) as opened:
            order = opened.read(8).decode("latin1")
        if order != sys.byteorder:
            raise UnpicklingError(
                f"it has the byte order {order!r}, expected {sys.byteorder!r}. Load it with torch "
                f"and save it as .safetensors."
            )
    return found


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


def _start(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member start, which the directory of the archive does not say."""
    file.seek(member.header_offset)
    local = file.read(LOCAL)
    if local[:4] != b"PK\3\4" or len(local) < LOCAL:
        raise ValueError("a member of the zip archive is not where its directory says")
    lengths = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    return member.header_offset + LOCAL + sum(lengths)


def _read_legacy(path: Path, file: IO[bytes], device: str) -> Pickled:
    """Four pickles, the last of them the object, a list of storages, and their values."""
    magic, _, _ = (read_pickle(file, _no_storage).value for _ in range(3))
    if magic != MAGIC:
        raise ValueError("it does not begin as a file of torch.save")
    begin = file.tell()
    used: dict[str, tuple[torch.dtype, int]] = {}

    def note(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        used[key] = dtype, count
        return torch.empty(count, dtype=dtype, device="meta")

    header = read_pickle(file, note)
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
    if device == "meta":
        return header
    take = _taker(path, device)
    file.seek(begin)
    return read_pickle(file, lambda key, dtype, count: take(starts[key], dtype, count))


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


def _no_storage(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
    raise ValueError("tensors are in a place where torch.save does not write any")


def _lost(key: str) -> UnpicklingError:
    return UnpicklingError(
        f"the data of the storage {key!r} is missing, or not as long as its values. {SAVE_AGAIN}"
    )
