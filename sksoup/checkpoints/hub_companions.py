"""Copy the other files of a Hugging Face folder to that of the soup."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..exceptions import CheckpointError
from .hub_config import LIMIT as CONFIG_LIMIT
from .hub_config import refuse_other_weights
from .read import TORCH_SUFFIXES
from .texts import read_text

# configuration, tokenizer, processor
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
NOT_COMPANIONS = (
    "*.index.json", "trainer_state.json", "history.json", "*results.json", "adapter_config.json",
)  # fmt: skip
MODULES = "modules.json"  # sentence-transformers: further modules, each in a folder
ROUTER = "router_config.json"  # a module with several routes, each in a folder
LIMIT = 1 << 20  # bytes; these files have a few lines
MOST_MODULES = 100
WEIGHTS = (".safetensors", *TORCH_SUFFIXES)


def copy_companions(source: Path, target: Path, others: Sequence[Path] = ()) -> None:
    """Copy configuration, tokenizer and sentence-transformers' modules to another model folder.

    Links may point into the folder or to the blobs of the Hugging Face cache that contains it
    (models--x/snapshots/y/config.json -> ../../blobs/z). Other links raise an error, because a
    private file could be published with the soup. Weights of a further module that differ in the
    ``others`` also raise an error, because they are not mixed.
    """
    source = source.resolve()
    owned = [source]
    if source.parent.name == "snapshots":
        owned.append(source.parents[1] / "blobs")
    found = {
        path
        for pattern in COMPANIONS
        for path in source.glob(pattern)
        if path.is_file() and not any(path.match(other) for other in NOT_COMPANIONS)
    }
    modules = module_folders(source)
    for folder in (source, *modules):
        refuse_other_weights(folder)
    # a module may be inside another one
    of_modules = [*dict.fromkeys(path for module in modules for path in module_files(module))]
    for path in [*found, *of_modules]:
        if not any(path.resolve().is_relative_to(folder) for folder in owned):
            raise CheckpointError(
                f"{str(path)!r} can't be copied: it is a link to {str(path.resolve())!r}, outside "
                f"its folder. Replace the link with the file, or use save(path)."
            )
    _refuse_differing_weights(source, [p for p in of_modules if p.suffix in WEIGHTS], others)
    for module in modules:  # also an empty one, which sentence-transformers expects
        (target / module.relative_to(source)).mkdir(parents=True, exist_ok=True)
    for path in [*found, *of_modules]:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def module_folders(source: Path) -> list[Path]:
    """The existing folders of sentence-transformers' modules, such as 1_Pooling.

    Includes those of the routes of a Router. No folder is listed twice, even through links.
    """
    root = Path(os.path.realpath(source))
    found = [source]
    reals = {str(root)}
    for folder in found:  # grows in the loop: a Router may be a route of another one
        for listing, names in _listings(folder):
            for name in map(Path, names):
                module = folder / name
                if name.is_absolute() or ".." in name.parts:
                    raise CheckpointError(
                        f"{str(listing)!r} lists the module {str(name)!r}, expected a folder next "
                        f"to it. Correct the file, or use save(path)."
                    )
                if module in found or not _is_folder(module, listing):
                    continue  # a folder can be written in several ways, such as 'a/./'
                real = os.path.realpath(module)
                if real in reals or root.is_relative_to(real):
                    raise CheckpointError(
                        f"{str(module)!r} can't be a module: it is a link to {real!r}, which is "
                        f"already a module, or holds this one. Replace the link with the folder."
                    )
                reals.add(real)
                found.append(module)
                _check_number(len(reals) - 1, listing)
    return found[1:]


def _listings(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The files that list modules, or the routes of a Router, and the names in them."""
    for path in (folder / MODULES, folder / ROUTER, folder / "config.json"):
        if not path.is_file():
            continue
        is_config = path.name == "config.json"  # in older versions also of a Router
        try:
            listed: Any = json.loads(read_text(path, CONFIG_LIMIT if is_config else LIMIT))
            if path.name == MODULES:
                names = [module["path"] for module in listed]
            else:
                routes = listed.get("types") if isinstance(listed, dict) else None
                names = [*routes] if isinstance(routes, dict) else []
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a 'path' that is not a string")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            if is_config and isinstance(error, json.JSONDecodeError):  # unreadable for all
                continue
            raise CheckpointError(
                f"{str(path)!r} can't be read: expected a list of modules, each with a 'path' "
                f"({type(error).__name__}: {error}). Correct the file, or use save(path)."
            ) from error
        _check_number(len(names), path)
        yield path, names


def _check_number(n_modules: int, listing: Path) -> None:
    if n_modules > MOST_MODULES:
        raise CheckpointError(
            f"{str(listing)!r} can't be used: there are {n_modules:,} modules, expected at most "
            f"{MOST_MODULES}. Correct the file, or use save(path)."
        )


def _is_folder(path: Path, listing: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a name too long for the file system
        raise CheckpointError(
            f"{str(listing)!r} lists a module that can't be opened: {error.strerror}. Correct the "
            f"file, or use save(path)."
        ) from error


def module_files(folder: Path) -> Iterator[Path]:
    """All regular files below a folder; follows links to files but not to folders."""
    for root, _, names in os.walk(folder):
        yield from (path for name in sorted(names) if (path := Path(root, name)).is_file())


def _refuse_differing_weights(source: Path, paths: Sequence[Path], others: Sequence[Path]) -> None:
    """Raise an error if the weights of a further module, which are copied, differ."""
    for path in paths:
        name = path.relative_to(source)
        for other in others:
            if not same_content(path, other / name):
                raise CheckpointError(
                    f"{str(path)!r} can't be copied: its weights are not mixed, but those in "
                    f"{str(other)!r} differ. Use save(path) for the weights of the network, and "
                    f"mix those of this module from its own folders ({str(name.parent)!r})."
                )


def same_content(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes."""
    if not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as a, other.open("rb") as b:
        while part := a.read(1 << 20):
            if part != b.read(1 << 20):
                return False
    return True
