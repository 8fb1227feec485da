"""The settings that must be equal for a search to continue in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.texts import read_text
from ..checkpoints.workplace import one_at_a_time
from ..checkpoints.write import write_text
from ..data.arrays import map_inputs
from ..exceptions import CheckpointError
from ..runtime.fingerprint import fingerprint
from .fine_tuning import state_of

MANIFEST = "search.json"
VERSION = 5  # increased when the same search gives another manifest than before
LIMIT = 100_000_000  # bytes; a candidate has some hundred
PLAIN = (bool, int, float, str, type, type(None))


def make_manifest(
    estimator: Any,
    scoring: Any,
    seed: int,
    params: Sequence[Mapping[str, Any]],
    start: nn.Module | None,
    parts: Sequence[Any],
) -> dict[str, Any]:
    """Everything that the candidates of a search depend on, as JSON."""
    fixed = estimator.get_params(deep=False)
    return {
        "version": VERSION,
        "seed": seed,
        "candidates": [repr({k: _described(v) for k, v in sorted(p.items())}) for p in params],
        "estimator": type(estimator).__name__,
        "params": {k: _described(v) for k, v in sorted(fixed.items())},
        "scoring": _described(scoring),
        "start": None if start is None else fingerprint(state_of(start)),
        "data": fingerprint([map_inputs(_values, part) for part in parts]),
    }


def recorded_seed(folder: Path | None) -> int | None:
    """The seed of the search in a folder, if there is one."""
    found = None if folder is None else _recorded(folder)
    return None if found is None else int(found["seed"])


def claim(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest to the folder; raise an error if it belongs to another search.

    Of searches that begin at the same time, the first one has the folder (if it can be locked).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder):
        _claim(folder, manifest)


def _claim(folder: Path, manifest: Mapping[str, Any]) -> None:
    found = _recorded(folder)
    if found is None and any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{str(folder)!r} holds checkpoints of unknown origin. Choose an empty folder."
        )
    if found is not None and found != json.loads(json.dumps(manifest)):
        changed = [key for key in manifest if found.get(key) != manifest[key]]
        raise CheckpointError(
            f"{str(folder)!r} holds another search: {', '.join(changed)} differ. Choose another "
            f"folder, or continue with the same settings."
        )
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


def _recorded(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder, if there is one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        found = json.loads(read_text(path, LIMIT))
        if 0 <= int(found["seed"]) < 2**32 and isinstance(found, dict):
            return found
        reason = "its seed is out of range"
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise CheckpointError(
        f"{str(path)!r} is not the manifest of a search: {reason}. Choose another folder."
    )


def _described(value: Any) -> str:
    """A parameter as text that is the same in every process."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, (list, tuple)):  # one by one: some may be known by their type alone
        return f"[{', '.join(map(_described, value))}]"
    try:
        return f"{type(value).__name__} {fingerprint(value)[:16]}"
    except (TypeError, ValueError):  # it can't be pickled
        return type(value).__name__


def _values(part: Any) -> Any:
    """An array; labels that are objects as a list, since a pickle differs with their identity."""
    return part.tolist() if part.dtype.hasobject else part
