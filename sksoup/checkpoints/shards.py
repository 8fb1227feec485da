"""A checkpoint in several files, described by a Hugging Face shard index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..exceptions import CheckpointError
from .protocol import Checkpoint, Read
from .read import CheckpointFile, SafetensorsFile, naming
from .texts import read_text
from .torch_files import TorchFile

INDEX = ".index.json"
INDEX_BYTES = 100_000_000  # the limit for the header of a .safetensors file


class ShardedCheckpoint(Checkpoint):
    """The shards listed in an index, opened when their first tensor is read."""

    def __init__(self, file: Path, key: str | None = None, path: Path | None = None) -> None:
        self.path = file if path is None else path
        self.key = key
        self.weight_map = weight_map(file)
        self.shards: dict[str, CheckpointFile] = {}
        listed: dict[str, list[str]] = {}
        for tensor, name in self.weight_map.items():
            listed.setdefault(name, []).append(tensor)
        for name, tensors in listed.items():
            shard = file.parent / name
            kind = SafetensorsFile if SafetensorsFile.accepts(shard) else TorchFile
            self.shards[name] = part = kind(shard)
            if isinstance(part, TorchFile) and not part.is_plain:
                raise CheckpointError(
                    f"{str(shard)!r} can't be used as a shard: it holds more than a plain state "
                    f"dict, so other programs may read other weights from it. Write the checkpoint "
                    f"again, or leave it out."
                )
            # before the next one is opened, as there may be many links to one file
            self._check_listed(file, name, tensors)
        self.is_soup = any(shard.is_soup for shard in self.shards.values())
        self.header = {t: self.shards[name].header[t] for t, name in self.weight_map.items()}

    def _check_listed(self, file: Path, name: str, tensors: Iterable[str]) -> None:
        """Raise an error if a shard holds other tensors than the index lists there.

        Other programs load all tensors in the shards, and the last of two with one name wins.
        """
        header = self.shards[name].header
        lacks = (f"lacks {one!r}" for one in tensors if one not in header)
        holds = (
            f"holds {one!r}, which the index does not list there"
            for one in header
            if self.weight_map.get(one) != name
        )
        for wrong in chain(lacks, holds):
            raise CheckpointError(
                f"{str(file)!r} does not match its shards: {name!r} {wrong}. Write the checkpoint "
                f"again, or leave it out."
            )

    def __repr__(self) -> str:
        return repr(str(self.path))

    suffixes: ClassVar[tuple[str, ...]] = ()  # an index is recognized by the end of its name

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.name.endswith(INDEX)

    def open(self) -> AbstractContextManager[Read]:
        """Read tensors; a shard is opened when its first tensor is read."""
        return self.open_rows({})

    @contextmanager
    def open_rows(self, rows: Mapping[str, slice]) -> Iterator[Read]:
        """Read rows; a shard is opened when its first tensor is read."""
        with ExitStack() as stack:
            opened: dict[str, Read] = {}

            def read(name: str) -> torch.Tensor:
                shard = self.weight_map[name]
                if shard not in opened:
                    opened[shard] = stack.enter_context(self.shards[shard].open_rows(rows))
                return opened[shard](name)

            yield read

    def identity(self) -> tuple[Any, ...]:
        """The key, and sizes, times and inodes of the shards."""
        files = [part for shard in self.shards.values() for part in shard.identity()[1]]
        return self.key, files

    def sha256(self, prefix: str = "") -> str:
        """SHA-256 of the shards' names and digests, in order of name."""
        lines = [f"{name}:{self.shards[name].sha256()}\n" for name in sorted(self.shards)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def warm(self) -> None:
        """Ask the operating system to read the shards into its cache."""
        for shard in self.shards.values():
            shard.warm()


def weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from an index."""
    with naming(path):
        weights = json.loads(read_text(path, INDEX_BYTES))["weight_map"]
        if not isinstance(weights, dict) or not weights:
            raise CheckpointError(f"{str(path)!r} has no weights in its 'weight_map'.")
        for tensor, name in weights.items():
            is_name = isinstance(name, str) and name == Path(name).name and name.strip(".")
            if not is_name or "\n" in name:  # which would end a line of the digest
                raise CheckpointError(
                    f"{str(path)!r} lists the shard {name!r} for {tensor!r}, expected the name of "
                    f"a file next to it."
                )
        return dict(weights)
