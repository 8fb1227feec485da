"""Read small text files next to weights (configs, indices) safely, whatever the path is."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ..exceptions import CheckpointError
from ..runtime.entries import without_waiting


def read_text(path: Path, limit: int) -> str:
    """The UTF-8 text of a regular file (or a link to one) of at most ``limit`` bytes."""
    try:
        # opening a pipe or a device may block or change it: check before opening, and again after,
        # since the file may have been replaced in between
        _check_regular(path, os.stat(path))
        with open(path, "rb", opener=without_waiting) as file:
            _check_regular(path, os.fstat(file.fileno()))
            content = file.read(limit + 1)
        if len(content) > limit:
            raise CheckpointError(
                f"{str(path)!r} can't be used: it is larger than {limit:,} bytes, which no such "
                f"file needs."
            )
        return content.decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, a path with a null byte
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{str(path)!r} can't be read: {error}.") from error


def read_json(path: Path, limit: int, **options: Any) -> Any:
    """The contents of a JSON file of at most ``limit`` bytes; options are those of json.loads."""
    try:
        return json.loads(read_text(path, limit), **options)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} can't be read: {error}.") from error


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(
            f"{str(path)!r} can't be used: it is a pipe, a device or a folder, expected a regular "
            f"file."
        )
