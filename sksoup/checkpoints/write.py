"""Write files of tensors and texts atomically."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..exceptions import CheckpointError
from ..runtime.fingerprint import flat_bytes
from .agreement import METADATA
from .protocol import TensorInfo
from .read import SAFETENSORS_DTYPES
from .shards import INDEX
from .workplace import OPENED, one_at_a_time, sync_below, sync_folder, workplace

SHARD_BYTES = 5_000_000_000  # the shard size of Hugging Face


@contextmanager
def _making(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file that will replace ``path``.

    The file must be created with mode "x", so that a link placed there by others is not followed.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} can't be written: it is a folder, expected a file.")
    with _unwritten(path), workplace(path) as temporary:
        yield temporary


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file made there replaces ``path`` once it is on disk."""
    with _making(path) as temporary:
        yield temporary
        _flush(temporary, path)
        temporary.replace(path)
        sync_folder(path.parent)


def _flush(path: Path, target: Path) -> None:
    """Write a file to disk, with the mode of the user's file that it replaces, or of a new one."""
    sample = path.with_name(".tmp-new")  # files of safetensors are private
    sample.touch(exist_ok=False)
    mode = sample.stat().st_mode
    with suppress(FileNotFoundError):
        old = target.lstat()  # a link, which is replaced, could be of others
        if old.st_uid == sample.stat().st_uid and stat.S_ISREG(old.st_mode):
            mode = old.st_mode
    sample.unlink()
    file = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        os.fsync(file)
        os.chmod(file if os.chmod in os.supports_fd else path, mode)
    finally:
        os.close(file)


@contextmanager
def _restored(path: Path, backup: Path, pending: Path) -> Iterator[None]:
    """Put the file at ``path`` back if ``pending`` was not renamed, or remove the new one."""
    existed = os.path.lexists(path)
    if existed:
        try:
            os.link(path, backup, follow_symlinks=False)
        except OSError:  # a file system without hard links
            with suppress(OSError):
                shutil.copy2(path, backup, follow_symlinks=False)
    try:
        yield
    except BaseException:  # also Ctrl-C
        with suppress(OSError):
            if pending.exists():
                backup.replace(path) if existed else path.unlink()
        raise


@contextmanager
def _unwritten(path: Path) -> Iterator[None]:
    """Explain disk errors: missing folder, full disk, no permission."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} can't be written: the folder {str(path.parent)!r} does not exist. "
            f"Create it first."
        )
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # raises for an invalid name before any work
        yield
    except (OSError, SafetensorError) as error:
        if path.is_relative_to(OPENED):  # the folder that it is a part of is named
            raise
        if (
            isinstance(error, OSError)
            and str(error.filename).startswith(f"{OPENED}{os.sep}")
            and error.filename2 is None  # not of a rename
        ):
            error.filename = str(path)
        error.add_note(
            f"{str(path)!r} was not written; an existing file is unchanged. Free some disk space, "
            f"or choose a folder with write permission."
        )
        raise


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and metadata to ``path`` atomically."""
    with _replacing(path) as temporary:
        # contiguous clones of tensors that share memory: the format stores every name separately
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        seen: set[int] = set()
        for name, tensor in whole.items():
            pointer = tensor.untyped_storage().data_ptr()
            if pointer in seen and tensor.numel():
                whole[name] = tensor.clone()
            seen.add(pointer)
        save_file(whole, temporary, metadata=dict(metadata or {}))


def write_torch(path: Path, tensors: Mapping[str, torch.Tensor], beside: Path, text: str) -> None:
    """Write a plain state dict with torch.save, and a text file next to it.

    Each is replaced atomically, and both or neither, unless the computer stops in between.
    """
    with _making(path) as temporary, _making(beside) as temporary_text:
        _write_new(temporary_text, text)
        # saving a view would save its whole storage
        whole = {
            name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            for name, tensor in tensors.items()
        }
        try:
            with temporary.open("xb") as file:
                torch.save(whole, file)
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError(f"torch.save could not write {str(path)!r}: {error}") from error
        _flush(temporary, path)
        _flush(temporary_text, beside)
        backup = temporary_text.with_name(".tmp-old")
        with one_at_a_time(path.parent), _restored(beside, backup, temporary):
            temporary_text.replace(beside)
            temporary.replace(path)
        sync_folder(path.parent)


def write_shards(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[Sequence[str]], Iterator[tuple[str, torch.Tensor]]],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the tensors that ``read(names)`` yields, one at a time, to shards in a new folder."""
    names = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)  # so that all are aligned
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        if shards[-1] and filled + infos[name].nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += infos[name].nbytes
    files = {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": part for i, part in enumerate(shards, 1)
    }
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
        "weight_map": {name: file for file, part in files.items() for name in part},
    }
    with new_folder(folder) as temporary:
        tensors = read(names)
        for file, part in files.items():
            _write_one_by_one(temporary / file, {n: infos[n] for n in part}, tensors, metadata)
        write_text(temporary / f"model.safetensors{INDEX}", json.dumps(index, indent=1))


def _write_one_by_one(
    path: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterator[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None,
) -> None:
    """Write a safetensors file whose tensors come one at a time, in the order of ``infos``."""
    # 8 bytes with the length of a JSON header, the header padded to 8 bytes, then all tensor bytes;
    # the library itself can only write tensors that are in memory
    header: dict[str, Any] = {METADATA: {"format": "pt", **(metadata or {})}}
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    end = 0
    for name, info in infos.items():
        if info.dtype not in codes:
            raise CheckpointError(
                f"{name!r} can't be written: safetensors does not support {info.dtype}. Convert "
                f"the checkpoints to another dtype."
            )
        begin, end = end, end + info.nbytes
        offsets = [begin, end]
        header[name] = {"dtype": codes[info.dtype], "shape": info.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            given, tensor = next(tensors)
            if given != name or TensorInfo.of(tensor) != info:
                raise RuntimeError(f"got the tensor {given!r}, expected {name!r}")
            data: Any = flat_bytes(tensor).numpy()
            file.write(data)
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with _replacing(path) as temporary:
        _write_new(temporary, text)


def _write_new(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def _copy_mode(source: Path, folder: Path) -> None:
    """Give a folder the mode of another one of this user, but not through a link."""
    file = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        old = source.stat()
        if old.st_uid == os.fstat(file).st_uid:
            os.chmod(file if os.chmod in os.supports_fd else folder, stat.S_IMODE(old.st_mode))
    finally:
        os.close(file)


def copy_new(source: Path, target: Path) -> None:
    """Copy a file to one that does not exist yet; a link of this name is not followed."""
    with source.open("rb") as original, target.open("xb") as copy:
        shutil.copyfileobj(original, copy)


def write_anew(path: Path, text: str) -> None:
    """Replace a file in a folder that is being written; a link of this name is not followed."""
    path.unlink(missing_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``path``, which is renamed to it once it is complete."""
    path = path.absolute()
    # a link is kept, and the empty folder that it points to is replaced; a broken link is an error
    if path.exists() if path.is_symlink() else path.name in ("", ".."):
        path = path.resolve()
    if os.path.lexists(path) and (not path.is_dir() or path.is_mount() or any(path.iterdir())):
        raise FileExistsError(
            f"{str(path)!r} exists and is not an empty folder. Choose another name, or move it "
            f"away."
        )
    if path.is_dir() and path.samefile(Path.cwd()):
        raise FileExistsError(
            f"{str(path)!r} is the current folder, which can't be replaced while it is in use. "
            f"Give the name of a new folder."
        )
    with _unwritten(path), workplace(path) as temporary:
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            _copy_mode(path, temporary)
        sync_below(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
