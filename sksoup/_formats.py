"""Checkpoint files: headers, tensors one at a time, atomic writes. No other module opens them."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .exceptions import CheckpointError

TORCH_SUFFIXES = (".pt", ".pth")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_floating(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True)
class FileIdentity:
    """What tells a file from one that took its place: compared around every read."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        try:
            stat = path.stat()
        except OSError as error:
            raise CheckpointError(
                f"{str(path)!r} can't be opened: {error.strerror}. Check the path, or leave the "
                f"checkpoint out of the collection."
            ) from error
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a damaged file into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # readers raise anything on damaged files
        unsafe = "Weights only load failed" in str(error)
        reason = (
            "it holds more than tensors, and reading it could run code"
            if unsafe
            else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        remedy = (
            "sksoup never unpickles code; save the state dict alone: "
            "torch.save(module.state_dict(), path)"
            if unsafe
            else "The file is damaged, incomplete or of another format: copy or write it again, "
            "or leave it out"
        )
        raise CheckpointError(f"{str(path)!r} can't be read: {reason}. {remedy}.") from error


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint sksoup reads: got the suffix {path.suffix!r}, "
            f"expected one of {', '.join(SUFFIXES)}."
        )


def read_header(path: Path) -> tuple[dict[str, TensorInfo], FileIdentity]:
    """Names, shapes and dtypes of a file's tensors, and its identity; reads no tensor."""
    _check_suffix(path)
    identity = FileIdentity.of(path)
    if path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a folder, expected a checkpoint file.")
    if identity.size == 0:
        raise CheckpointError(
            f"{str(path)!r} is empty (0 bytes), expected a checkpoint. It was probably cut off "
            f"while being written: write it again, or leave it out."
        )
    with _naming(path):
        header = _safetensors_header(path) if path.suffix == ".safetensors" else _torch_header(path)
    if not header:
        raise CheckpointError(
            f"{str(path)!r} holds no tensors, expected a state dict (tensor name -> tensor)."
        )
    return header, identity


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    with safe_open(path, framework="pt") as file:
        header = {}
        for name in file.keys():  # noqa: SIM118  (a safe_open is not a mapping)
            part = file.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{str(path)!r} can't be used: {name!r} has dtype {part.get_dtype()}, expected "
                    f"one of {', '.join(_SAFETENSORS_DTYPES)}."
                )
            header[name] = TensorInfo(tuple(part.get_shape()), dtype)
    return header


def _torch_header(path: Path) -> dict[str, TensorInfo]:
    # 'meta' keeps the zip format's storages on disk; a legacy pickle is read once, then dropped
    state = _load_torch(path, "meta")
    return {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()}


def _load_torch(path: Path, device: str) -> dict[str, torch.Tensor]:
    state = torch.load(
        path,
        map_location=device,
        mmap=True if zipfile.is_zipfile(path) else None,
        weights_only=True,
    )
    return check_state_dict(state, repr(str(path)))


def check_state_dict(state: Any, where: str) -> dict[str, torch.Tensor]:
    """Return ``state`` when it is a mapping of names to dense tensors, else say what it is."""
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{where} holds a {type(state).__name__}, expected a state dict (tensor name -> "
            f"tensor). Save module.state_dict()."
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{where} is not a plain state dict: {name!r} is a {type(value).__name__}, "
                f"expected a tensor. Save module.state_dict() by itself."
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise CheckpointError(
                f"{where} can't be used: {name!r} is a sparse or quantized tensor, expected a "
                f"dense one."
            )
    return dict(state)


@contextmanager
def open_tensors(path: Path, identity: FileIdentity) -> Iterator[Callable[[str], torch.Tensor]]:
    """Open a file whose header was read; gives ``read(name) -> tensor`` (CPU, use it promptly).

    A tensor may be a view of the mapped file: copy what is to outlive the context. The file's
    identity is compared before and after, so weights of another file are never used silently.
    """
    _check_identity(path, identity)
    with ExitStack() as stack:
        with _naming(path):
            get: Callable[[str], torch.Tensor]
            if path.suffix == ".safetensors":
                get = stack.enter_context(safe_open(path, framework="pt")).get_tensor
            else:
                get = _load_torch(path, "cpu").__getitem__

        def read(name: str) -> torch.Tensor:
            with _naming(path):
                return get(name).detach()

        yield read
    _check_identity(path, identity)


def _check_identity(path: Path, expected: FileIdentity) -> None:
    if FileIdentity.of(path) != expected:
        raise CheckpointError(
            f"{str(path)!r} changed on disk since the collection was opened (size, modification "
            f"time or inode differ). Open the collection again."
        )


def sha256_of(path: Path, identity: FileIdentity) -> str:
    """Return the SHA-256 of a file as hexadecimal digits, checked to be the file first opened."""
    _check_identity(path, identity)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _check_identity(path, identity)
    return digest


def read_metadata(path: Path) -> dict[str, str]:
    """Return the free-form metadata of a .safetensors file."""
    FileIdentity.of(path)
    with _naming(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes its place only once it is whole on disk."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} can't be written: the folder {str(path.parent)!r} does not exist. "
            f"Create it first."
        )
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} can't be written: it is a folder, expected a file.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and metadata to ``path``, atomically: the old file or the new, never a part."""
    with _replacing(path) as temporary:
        # contiguous clones of what shares memory: the format stores every name by itself
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        seen: set[int] = set()
        for name, tensor in whole.items():
            pointer = tensor.untyped_storage().data_ptr()
            if pointer in seen and tensor.numel():
                whole[name] = tensor.clone()
            seen.add(pointer)
        save_file(whole, temporary, metadata=dict(metadata or {}))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, atomically."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
