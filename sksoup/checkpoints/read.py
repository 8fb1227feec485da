"""Checkpoint files: headers, tensors one at a time, atomic writes. No other module opens them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..exceptions import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"
SHARD_BYTES = 5_000_000_000  # as Hugging Face cuts them
# what the weights of a Hugging Face or skorch folder are called, in order of preference
FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "params.safetensors",
    "params.pt",
)
# what training loops leave beside the weights
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|criterion|scaler|rng_state(_\d+)?)\.(bin|pt|pth|safetensors)"
)
# modules whose names a pickle has no harmless use for, whatever they are called
_NEVER = ("builtins", "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "importlib",
          "runpy", "pty", "ctypes", "code", "pdb", "webbrowser", "pickle", "operator", "functools",
          "multiprocessing", "asyncio", "signal", "platform", "pip", "torch")  # fmt: skip

Read: TypeAlias = Callable[[str], torch.Tensor]

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
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


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


class _naming:
    """Turn whatever a reader raises on a damaged file into a CheckpointError that names it."""

    __slots__ = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            raise _unreadable(self.path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """What to say of a file on which a reader, which raises anything, has failed."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    if "Weights only load failed" in str(error) and re.search("GLOBAL|allowlisted", text):
        named = re.search(r"GLOBAL ([\w.]+)", text)
        return CheckpointError(
            f"{str(path)!r} can't be read: it holds more than tensors"
            f"{f' ({named[1]})' if named else ''}, and reading it could run code. sksoup never "
            f"unpickles code; save the state dict alone: torch.save(module.state_dict(), path)."
        )
    if "Unsupported operand" in text:
        return CheckpointError(
            f"{str(path)!r} can't be read safely: it was written with a pickle protocol that torch "
            f"reads only by running code. Save it anew, without pickle_protocol=."
        )
    if "Can only " in text:
        return CheckpointError(
            f"{str(path)!r} can't be read: it holds objects beside tensors that can't be read "
            f"without running code ({text.splitlines()[0]}). Save the state dict alone: "
            f"torch.save(module.state_dict(), path)."
        )
    reason = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}".rstrip(": .")
    short = isinstance(error, MemoryError) or "allocate memory" in text
    remedy = (
        "There is too little memory, or its header is damaged"
        if short
        else "The file is damaged, incomplete or of another format: copy or write it again, or "
        "leave it out"
    )
    return CheckpointError(f"{str(path)!r} can't be read: {reason}. {remedy}.")


def find_weights(folder: Path) -> Path | None:
    """Return the weights file of a Hugging Face or skorch folder, or None for any other folder."""
    found = next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds a PEFT adapter, expected whole weights. The mean of low-rank "
            f"factors is not the low-rank mean: merge the adapter into its base model first "
            f"(peft: model.merge_and_unload()) and save that."
        )
    marks = ("config.json", "history.json", *(name for name in FOLDER_WEIGHTS if INDEX in name))
    is_skorch = found is not None and found.stem == "params"
    return found if is_skorch or any((folder / mark).is_file() for mark in marks) else None


def list_weights(folder: Path) -> list[Path]:
    """All checkpoints in a folder (files, sharded ones once, and folders), or the one it is."""
    indices = [path for path in folder.iterdir() if path.name.endswith(INDEX)]
    shards = {folder / name for index in indices for name in set(_weight_map(index).values())}
    files = [
        path
        for path in folder.iterdir()
        if path.suffix in SUFFIXES
        and path.is_file()
        and path not in shards
        and not NOT_WEIGHTS.fullmatch(path.name)
    ]
    folders = [path for path in folder.iterdir() if path.is_dir() and find_weights(path)]
    if find_weights(folder):
        if not folders:
            return [folder]
        raise CheckpointError(
            f"{str(folder)!r} is a checkpoint and holds {len(folders)} more, such as "
            f"{folders[0].name!r}: say which, by a list of paths or a pattern like "
            f"{str(folder / 'checkpoint-*')!r}."
        )
    return [*files, *indices, *folders]


def open_weights(path: Path, key: str | None = None) -> WeightsFile | ShardedWeights:
    """Read the header of a checkpoint: a file, an index of shards, or a folder with either."""
    path = _weights_of(path) if path.is_dir() else path
    return ShardedWeights(path) if path.name.endswith(INDEX) else WeightsFile(path, key)


def _weights_of(folder: Path) -> Path:
    found = find_weights(folder)
    if found is None:
        raise CheckpointError(
            f"{str(folder)!r} is a folder without weights sksoup knows: expected "
            f"{', '.join(FOLDER_WEIGHTS)} beside a config.json, or params.pt of skorch. For a "
            f"folder of checkpoints use CheckpointCollection.from_path."
        )
    return found


class WeightsFile:
    """A file of tensors: its header, and what the file was when it was opened."""

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        self.key = key
        self.header, self.identity = self._read_header()

    def _read_header(self) -> tuple[dict[str, TensorInfo], FileIdentity]:
        path = self.path
        if path.suffix not in SUFFIXES:
            raise CheckpointError(
                f"{str(path)!r} is not a checkpoint sksoup reads: got the suffix {path.suffix!r}, "
                f"expected one of {', '.join(SUFFIXES)}."
            )
        identity = FileIdentity.of(path)
        if identity.size == 0:
            raise CheckpointError(
                f"{str(path)!r} is empty (0 bytes), expected a checkpoint. It was probably cut off "
                f"while being written: write it again, or leave it out."
            )
        with _naming(path):
            self.is_safetensors = _is_safetensors(path, identity.size)
            if self.is_safetensors:
                header = _safetensors_header(path)
            else:  # on 'meta' the storages stay on disk; a legacy pickle is read once and dropped
                state = _load_torch(path, "meta", self.key)
                header = {n: TensorInfo(tuple(v.shape), v.dtype) for n, v in state.items()}
        if not header:
            raise CheckpointError(
                f"{str(path)!r} holds no tensors, expected a state dict (tensor name -> tensor)."
            )
        return header, identity

    @contextmanager
    def open(self) -> Iterator[Read]:
        """Give ``read(name) -> tensor`` (CPU; may be a view of the mapped file: use it promptly).

        The file's identity is compared before and after, so other weights are never used silently.
        """
        self._check_identity()
        with ExitStack() as stack:
            with _naming(self.path):
                get: Read
                if self.is_safetensors:
                    get = stack.enter_context(safe_open(self.path, framework="pt")).get_tensor
                else:
                    get = _load_torch(self.path, "cpu", self.key).__getitem__

            def read(name: str) -> torch.Tensor:
                with _naming(self.path):
                    return get(name).detach()

            yield read
        self._check_identity()

    def warm(self) -> None:
        """Have the operating system read the file into its cache, if it can: no error if not."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def sha256(self) -> str:
        """Return the SHA-256 of the file, checked to be the one first opened."""
        self._check_identity()
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._check_identity()
        return digest

    def identities(self) -> list[FileIdentity]:
        """What the file was when it was opened."""
        return [self.identity]

    def _check_identity(self) -> None:
        if FileIdentity.of(self.path) != self.identity:
            raise CheckpointError(
                f"{str(self.path)!r} changed on disk since the collection was opened (size, "
                f"modification time or inode differ). Open the collection again."
            )


class ShardedWeights:
    """A checkpoint in several files, as Hugging Face's index of shards describes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weight_map = _weight_map(path)
        self.shards = {name: WeightsFile(path.parent / name) for name in self._shard_names()}
        for tensor, name in self.weight_map.items():
            if tensor not in self.shards[name].header:
                raise CheckpointError(
                    f"{str(path)!r} does not fit its shards: {name!r} lacks {tensor!r}. Write the "
                    f"checkpoint again, or leave it out."
                )
        self.header = {t: self.shards[name].header[t] for t, name in self.weight_map.items()}

    def identities(self) -> list[FileIdentity]:
        """What the shards were when they were opened."""
        return [shard.identity for shard in self.shards.values()]

    def _shard_names(self) -> list[str]:
        return list(dict.fromkeys(self.weight_map.values()))

    @contextmanager
    def open(self) -> Iterator[Read]:
        """Give ``read(name) -> tensor``; a shard is opened when its first tensor is read."""
        with ExitStack() as stack:
            opened: dict[str, Read] = {}

            def read(name: str) -> torch.Tensor:
                shard = self.weight_map[name]
                if shard not in opened:
                    opened[shard] = stack.enter_context(self.shards[shard].open())
                return opened[shard](name)

            yield read

    def warm(self) -> None:
        """Have the operating system read the shards into its cache."""
        for shard in self.shards.values():
            shard.warm()

    def sha256(self) -> str:
        """Return the SHA-256 of the shards' names and digests, in order of name."""
        lines = [f"{name}:{self.shards[name].sha256()}\n" for name in sorted(self.shards)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from an index."""
    FileIdentity.of(path)
    with _naming(path):
        weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weights, dict) or not weights:
            raise CheckpointError(f"{str(path)!r} has no weights in its 'weight_map'.")
        for tensor, name in weights.items():
            if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
                raise CheckpointError(
                    f"{str(path)!r} names the shard {name!r} for {tensor!r}, expected the name of "
                    f"a file beside it."
                )
        return dict(weights)


def _is_safetensors(path: Path, size: int) -> bool:
    """By its suffix, or its beginning: skorch writes the format to files called ``params.pt``."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < size


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


# once: to catch warnings is not safe beside other threads
warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
_ONE_AT_A_TIME = threading.Lock()  # what torch holds for safe is the same for all threads


def _load_torch(path: Path, device: str, key: str | None) -> dict[str, torch.Tensor]:
    """Load with ``weights_only``; harmless foreign classes become inert placeholders.

    Only files in zip format, torch's since 1.6, tell which classes they hold.
    """
    is_zip = zipfile.is_zipfile(path)
    with _ONE_AT_A_TIME:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        inert: list[Any] = [(_placeholder(name), name) for name in foreign if _is_harmless(name)]
        with torch.serialization.safe_globals(inert):
            state = torch.load(path, map_location=device, mmap=is_zip or None, weights_only=True)
    return check_state_dict(_unwrap(state, key, repr(str(path))), repr(str(path)))


def _is_harmless(name: str) -> bool:
    """Whether a pickled name may become a placeholder: a class by its name, or part of numpy."""
    module, _, attribute = name.rpartition(".")
    package = module.partition(".")[0]
    return package not in _NEVER and (package == "numpy" or attribute[:1].isupper())


def _placeholder(name: str) -> type:
    """Make a class that can be unpickled in the place of another and does nothing."""

    def ignore(self: Any, *args: Any, **kwargs: Any) -> None:
        pass

    return type(name.rpartition(".")[2], (), {"__init__": ignore, "__setstate__": ignore})


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(n, str) and isinstance(v, torch.Tensor) for n, v in value.items())
    )


def _unwrap(state: Any, key: str | None, where: str) -> Any:
    """Take the state dict out of a training container, where it is plain which one it is."""
    if not isinstance(state, Mapping) or (key is None and _is_state_dict(state)):
        return state
    candidates = [
        name
        for name, value in state.items()
        if _is_state_dict(value) and not str(name).endswith("_extra_state")  # part of a flat one
    ]
    listed = ", ".join(f"{name!r} ({len(state[name])} tensors)" for name in candidates)
    if key is not None:
        if key in candidates:
            return state[key]
        raise CheckpointError(
            f"{where} has no state dict under key={key!r}: it offers "
            f"{listed or 'none; it is a plain state dict' if _is_state_dict(state) else listed}."
        )
    if len(candidates) > 1:
        raise CheckpointError(
            f"{where} holds several state dicts: {listed}. Say which: key={candidates[0]!r}."
        )
    return state[candidates[0]] if candidates else state


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


def read_metadata(path: Path) -> dict[str, str]:
    """Return the free-form metadata of a .safetensors file, or of the first shard of a folder."""
    path = _weights_of(path) if path.is_dir() else path
    if path.name.endswith(INDEX):
        path = path.parent / min(_weight_map(path).values())
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
        with _unwritten(path):
            temporary.touch()
            mode = temporary.stat().st_mode  # of new files; safetensors lets only the owner read
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _unwritten(path: Path) -> Iterator[None]:
    """Say, where a disk is full or a folder read-only, what is there and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        error.add_note(
            f"{str(path)!r} was not written; what was there before is as it was. Make room, or "
            f"write to a folder that can be written to."
        )
        raise


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


def write_shards(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[Sequence[str]], Iterator[tuple[str, torch.Tensor]]],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the tensors that ``read(names)`` gives, in order, to shards and an index in a folder.

    Each tensor is on disk before the next one is asked for. The folder is new, and appears whole.
    """
    names = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)  # so all are aligned
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
    """Write a safetensors file whose tensors come one at a time, in the order of ``infos``.

    The library writes from memory only. The format: the length of a JSON header as 8 bytes, the
    header (padded to 8 bytes), then the tensors' bytes without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    codes = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}
    end = 0
    for name, info in infos.items():
        if info.dtype not in codes:
            raise CheckpointError(
                f"{name!r} can't be written: safetensors has no {info.dtype}. Convert the "
                f"checkpoints to another dtype."
            )
        begin, end = end, end + info.nbytes
        header[name] = {
            "dtype": codes[info.dtype],
            "shape": info.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            given, tensor = next(tensors)
            if given != name or TensorInfo(tuple(tensor.shape), tensor.dtype) != info:
                raise RuntimeError(f"{given!r} came where {name!r} was to be written")
            data: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
            file.write(data)
        os.fsync(file.fileno())


def pack(value: Any) -> bytes:
    """Tensors, numbers, strings, lists and dicts of them as bytes, with a checksum."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def unpack(payload: bytes) -> Any:
    """Read what `pack` wrote, on the CPU; runs no code that is in it."""
    digest, body = payload[:32], payload[32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("its checksum is wrong")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have the same dtype and bits (NaN equals itself)."""
    if a.dtype != b.dtype:
        return False
    as_integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, atomically."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that becomes it once all is written."""
    path = path.resolve()  # a link stays, and what it points to becomes the folder
    if path.exists() and (not path.is_dir() or path.is_mount() or any(path.iterdir())):
        raise FileExistsError(
            f"{str(path)!r} exists and is not an empty folder. Give another name, or move it away."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} can't be written: the folder {str(path.parent)!r} does not exist. "
            f"Create it first."
        )
    # another host, or a container, may have the same process number
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with _unwritten(path):
        temporary.mkdir()
        try:
            yield temporary
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
