"""Read files of tensors: first the header, then one tensor at a time; safetensors files."""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import pickletools
import re
import stat
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, ClassVar

import torch
from safetensors import safe_open

from ..exceptions import CheckpointError
from .protocol import (
    HASHING,
    LONGEST_NAME,
    MOST_DIMENSIONS,
    Checkpoint,
    Read,
    TensorInfo,
    end_if_stopped,
    is_text,
)

KEPT = 10_000  # files of which a small result is kept
LEAVE_OUT = "leave it out: move it to another folder, or pass only the paths of the others"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
RECIPE_KEY = "sksoup"  # of the recipe in the metadata of a soup
SHARD = re.compile(r"shard-(\d{5})(-model-.*)")  # of a rank
OF_A_RANK = "DCP_SHARDING_INFO"  # in the metadata of parts by torch.distributed.checkpoint
RECIPE_SUFFIX = ".recipe.json"  # of the recipe beside a file without metadata
# torch raises this for Ctrl-C while it takes over the bytes of a safetensors file
SWALLOWED = "could not determine the shape of object type 'torch.storage.UntypedStorage'"
# codes of pickles, and the bytes of their arguments, or a kind of length (< 0)
OPCODES = {
    each.code.encode("latin-1"): (each.name, 0 if each.arg is None else each.arg.n)
    for each in pickletools.opcodes
}
LENGTHS = {-2: 1, -3: 4, -4: 4, -5: 8}  # bytes of the length before an argument
NUMBERS_AND_NAMES = ("INT", "LONG", "LONG1", "LONG4", "GLOBAL", "STACK_GLOBAL", "INST", "EXT1",
                     "EXT2", "EXT4")  # fmt: skip
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def suffix_of(path: Path) -> str:
    """The suffix in lower case: ".pt" of "a.PT", and ".pth" of "a.pth.tar", a usual name."""
    name = Path(path.name.lower())
    inner = Path(name.stem).suffix
    return inner if name.suffix == ".tar" and inner in TORCH_SUFFIXES else name.suffix


def file_identity(path: Path) -> tuple[int, int, int]:
    """Size, modification time (ns) and inode; a file that replaces it differs in one of them."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: NUL or a surrogate in the name
        raise CheckpointError(
            f"{str(path)!r} can't be opened: {getattr(error, 'strerror', None) or error}. Check "
            f"the path, or leave the checkpoint out of the collection."
        ) from error
    if not is_text(str(path)):  # safetensors and torch can't read these
        raise CheckpointError(
            f"{str(path)!r} can't be opened: its name is not valid Unicode (UTF-8). Rename it."
        )
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(
            f"{str(path)!r} can't be opened: it is a pipe, a device or a folder, expected a "
            f"regular file. Check the path, or leave the checkpoint out of the collection."
        )
    return found.st_size, found.st_mtime_ns, found.st_ino


def real_path(path: str | os.PathLike[str]) -> str:
    """`os.path.realpath`, but found by the kernel on Linux: links may lead through many folders."""
    try:
        opened = os.open(path, os.O_PATH)
    except (AttributeError, OSError, ValueError):
        return os.path.realpath(path)
    try:
        found = os.readlink(f"/proc/self/fd/{opened}")
        if os.path.samestat(os.stat(found), os.fstat(opened)):  # not "... (deleted)"
            return found
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise CheckpointError(
                f"{str(path)!r} can't be used: its real path is too long ({error.strerror}). Move "
                f"what it leads to."
            ) from error
    finally:
        os.close(opened)
    return os.path.realpath(path)


def place_of(path: Path) -> object:
    """What is the same for links to one file, also hard ones, as timm makes of the best."""
    try:
        status = path.stat()
    except OSError:  # it is gone, which is an error where it is opened
        return path
    # some file systems make numbers up, but then count no links
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else real_path(path)


@dataclass(frozen=True)
class RealFile:
    """A file at one of its paths, equal for all links to it: what is found in it can be kept."""

    path: Path = field(compare=False)
    identity: object

    @classmethod
    def at(cls, path: Path) -> RealFile:
        """The file at a path, as it is now."""
        # files unpacked with fixed times may get the inodes of deleted ones
        return cls(path, (place_of(path), *file_identity(path), path.stat().st_ctime_ns))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Convert any error of a reader on a damaged file to a CheckpointError with its path."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if SWALLOWED in str(error):
            raise KeyboardInterrupt from error
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that a reader could not read, with a remedy for the cause."""
    if isinstance(error, UnpicklingError):  # raised with a remedy
        return CheckpointError(f"{str(path)!r} can't be read: {error}")
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    reason = f"{type(error).__name__}: {line}".rstrip(": .")
    if isinstance(error, MemoryError) or "allocate memory" in text:
        remedy = "There is too little memory, or the header is damaged."
    else:
        remedy = (
            f"The file is damaged, incomplete or in another format. Copy or write it again, or "
            f"{LEAVE_OUT}."
        )
    return CheckpointError(f"{str(path)!r} can't be read: {reason}. {remedy}")


class _Hashed(io.FileIO):
    """A file whose reading ends if the thread that hashes it was stopped."""

    def readinto(self, buffer: Any, /) -> int:
        end_if_stopped()
        return super().readinto(buffer) or 0


class CheckpointFile(Checkpoint):
    """A file of tensors: its header, and its size, time and inode when it was opened.

    Each format is a subclass with ``suffixes``, ``_read_header`` and ``_open``.
    """

    suffixes: ClassVar[tuple[str, ...]]
    is_soup = False  # whether sksoup wrote it, with a recipe

    def __init__(self, file: Path, key: str | None = None, path: Path | None = None) -> None:
        self.file = file
        self.path = file if path is None else path  # as passed; may be the folder of the file
        self.key = key
        self._digest: str | None = None
        self._opened_as = file_identity(file)
        # files unpacked with fixed times may get the inodes of deleted ones
        self._changed = file.stat().st_ctime_ns
        if self._opened_as[0] == 0:
            raise CheckpointError(
                f"{str(file)!r} is empty (0 bytes), expected a checkpoint. Writing it was probably "
                f"interrupted. Write it again, or {LEAVE_OUT}."
            )
        with naming(file):
            self.header = self._read_header()
        if (most := max(map(len, self.header), default=0)) > LONGEST_NAME:
            raise CheckpointError(
                f"{str(file)!r} can't be used: the name of a tensor has {most:,} characters, "
                f"expected at most {LONGEST_NAME:,}. Rename the tensor."
            )
        for name, info in self.header.items():
            if len(info.shape) > MOST_DIMENSIONS:
                raise CheckpointError(
                    f"{str(file)!r} can't be used: {name!r} has {len(info.shape):,} dimensions, "
                    f"expected at most {MOST_DIMENSIONS}. Write the file again."
                )
            # torch multiplies all sizes but 0
            if math.prod(filter(None, info.shape)) >= 2**63:
                raise CheckpointError(
                    f"{str(file)!r} can't be used: {name!r} has shape {info.shape}, which is too "
                    f"large for torch. Write the file again."
                )

    def __repr__(self) -> str:
        return repr(str(self.path))

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a file has this format, by its suffix or its first bytes."""
        return suffix_of(path) in cls.suffixes

    @abstractmethod
    def _read_header(self) -> dict[str, TensorInfo]: ...

    @abstractmethod
    def _open(self) -> AbstractContextManager[Read]:
        """Yield a function that reads a tensor; may raise any error on a damaged file."""

    def open(self) -> AbstractContextManager[Read]:
        """Read tensors; before and after, check that the file has not changed."""
        return self._checked(self._open(), {})

    @contextmanager
    def _checked(
        self, opened: AbstractContextManager[Read], rows: Mapping[str, slice]
    ) -> Iterator[Read]:
        """Check that the file and the shapes of these rows have not changed."""
        self._check_identity()
        with ExitStack() as stack:
            with naming(self.file):
                get = stack.enter_context(opened)

            def read(name: str) -> torch.Tensor:
                with naming(self.file):
                    value = torch.Tensor.detach(get(name)).resolve_neg()
                    if TensorInfo.of(value) != self.header[name].rows(rows.get(name)):
                        raise ValueError(f"{name!r} changed since the file was opened")
                    return value

            yield read
        self._check_identity()

    def identity(self) -> tuple[Any, ...]:
        """The key, and size, modification time, inode and change time of the file."""
        return self.key, [(*self._opened_as, self._changed)]

    def sha256(self, prefix: str = "") -> str:
        """SHA-256 of the file, after checking that it has not changed."""
        with HASHING:
            if self._digest is None:
                self._check_identity()
                with _Hashed(self.file) as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                self._check_identity()
                self._digest = digest
        return self._digest

    def warm(self) -> None:
        """Ask the operating system to read the file into its cache; never raises."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), self.file.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _check_identity(self) -> None:
        if file_identity(self.file) != self._opened_as:
            raise CheckpointError(
                f"{str(self.file)!r} changed on disk since the collection was opened (size, "
                f"modification time or inode differ). Open the collection again."
            )


class SafetensorsFile(CheckpointFile):
    """A safetensors file; skorch also writes this format to files named ``params.pt``."""

    suffixes = (".safetensors",)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        if suffix_of(path) not in TORCH_SUFFIXES:
            return super().accepts(path)
        size, *_ = file_identity(path)
        with naming(path), path.open("rb") as file:
            start = file.read(9)  # the length of a JSON header and its first byte
        is_header = start[8:] == b"{" and int.from_bytes(start[:8], "little") < size
        return is_header and not _is_of_torch(path)

    def _read_header(self) -> dict[str, TensorInfo]:
        with safe_open(self.file, framework="pt") as file:
            metadata = file.metadata() or {}
            self.is_soup = RECIPE_KEY in metadata
            if OF_A_RANK in metadata and _has_other_ranks(self.file):
                raise CheckpointError(
                    f"{str(self.file)!r} can't be used: it is one rank's part of a model, as "
                    f"save_pretrained(distributed_checkpoint=True) writes it. Load the model with "
                    f"from_pretrained, and save it without that option."
                )
            header = {}
            for name in file.keys():  # noqa: SIM118  (a safe_open is not a mapping)
                part = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{str(self.file)!r} can't be used: {name!r} has dtype "
                        f"{part.get_dtype()}, expected one of {', '.join(SAFETENSORS_DTYPES)}."
                    )
                header[name] = TensorInfo(tuple(part.get_shape()), dtype)
        return header

    @contextmanager
    def _open(self) -> Iterator[Read]:
        with safe_open(self.file, framework="pt") as file:
            yield file.get_tensor

    def open_rows(self, rows: Mapping[str, slice]) -> AbstractContextManager[Read]:
        """Read only the bytes of the rows."""
        return self._checked(self._open_slices(rows), rows)

    @contextmanager
    def _open_slices(self, rows: Mapping[str, slice]) -> Iterator[Read]:
        with safe_open(self.file, framework="pt") as file:

            def get(name: str) -> torch.Tensor:
                found: torch.Tensor = (
                    file.get_slice(name)[rows[name]] if name in rows else file.get_tensor(name)
                )
                return found

            yield get


def is_tar(path: Path) -> bool:
    """Whether a file begins as a tar archive; no more than its first header is read."""
    with path.open("rb") as file, suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        return True
    return False


def _has_other_ranks(file: Path) -> bool:
    """Whether a file is one of several: ranks write shard-00001-model-..., shard-00002-..."""
    found = SHARD.fullmatch(file.name)
    if found is None:
        return False
    return int(found[1]) > 1 or file.with_name(f"shard-00002{found[2]}").exists()


def _is_of_torch(path: Path) -> bool:
    """Whether torch.load may find an archive or its first pickle at the beginning of a file."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\3\4" or is_tar(path):
            return True
        file.seek(0)
        return _is_pickle(file, path.stat().st_size)


def _is_pickle(file: IO[bytes], size: int) -> bool:
    """Whether a file may begin as a pickle of a long number, as torch's, or with names.

    Some headers of safetensors begin as a pickle of a text only. Arguments are not decoded, since
    readers of pickles decode them in different ways.
    """
    is_found = False
    while (code := file.read(1)) in OPCODES:
        name, n = OPCODES[code]
        if name == "STOP":
            return is_found
        is_found |= name in NUMBERS_AND_NAMES
        if n == -1:  # up to the end of the line
            for _ in range(2 if name in ("GLOBAL", "INST") else 1):
                while (part := file.readline(2**16)) and part[-1:] != b"\n":
                    pass  # a line may be as long as the file
        else:
            n = n if n >= 0 else int.from_bytes(file.read(LENGTHS[n]), "little")
            if n > size - file.tell():
                return False
            file.seek(n, os.SEEK_CUR)
    return False


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The free-form metadata of a .safetensors file."""
    file_identity(path)
    with naming(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
