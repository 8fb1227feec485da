"""The folders of sentence-transformers' modules beside the network, such as 1_Pooling."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..exceptions import CheckpointError
from .hub_config import LIMIT as CONFIG_LIMIT
from .read import KEPT, TORCH_SUFFIXES, RealFile, real_path
from .shards import INDEX
from .texts import read_json, read_text

MODULES = "modules.json"  # lists the modules, each in a folder
ROUTER = "router_config.json"  # a module with several routes, each in a folder
LIMIT = 1 << 20  # bytes; these files have a few lines
MOST_MODULES = 100
MOST_FILES = 10_000  # and folders in that of a module
MOST_DEPTH = 50  # of folders in each other
WEIGHTS = (".safetensors", *TORCH_SUFFIXES)
ROUTES = ("types", "structure")  # fields of a Router: classes by path, and paths by route
ROUTERS = ("Router", "Asym")  # classes of a module with several routes
FILES = (*WEIGHTS, ".json", ".md")
# classes of sentence-transformers that read texts or images with weights of their own
NETWORK = re.compile(
    r".*(Transformer|(?<!Auto)Encoder|Embeddings?|Model|BoW|B[Ee][Rr][Tt]|T5|XLNet)"
)


def module_folders(source: Path) -> list[Path]:
    """The existing folders of sentence-transformers' modules, such as 1_Pooling.

    Includes those of the routes of a Router. No folder is listed twice, even through links.
    """
    root = Path(real_path(source))
    found = [source]
    reals = {str(root)}
    for folder in found:  # grows in the loop: a Router may be a route of another one
        for listing, listed in _listings(folder):
            for name in (one.path for one in listed):
                module = folder / name
                # ".." is no folder below, ".git" may hold secrets, and commands, and files of a
                # soup have other names
                is_odd = any(p.startswith(".") or p.endswith(FILES) for p in name.parts)
                if name.is_absolute() or is_odd:
                    raise CheckpointError(
                        f"{str(listing)!r} lists the module {str(name)!r}, expected a folder next "
                        f"to it that is not hidden and not named as a file. Correct the file, or "
                        f"use save(path)."
                    )
                _check_depth(module, source)
                if module in found or not _is_folder(module, listing):
                    continue  # a folder can be written in several ways, such as 'a/./'
                real = real_path(module)
                if real in reals or root.is_relative_to(real):
                    raise CheckpointError(
                        f"{str(module)!r} can't be a module: it is a link to {real!r}, which is "
                        f"already a module, or holds this one. Replace the link with the folder."
                    )
                reals.add(real)
                found.append(module)
                _check_number(len(reals) - 1, listing)
    return found[1:]


@dataclass(frozen=True)
class Listed:
    """A module in a listing: its relative path, its class, and its places in routes."""

    path: Path
    kind: str
    is_first: bool
    is_later: bool


def _listings(folder: Path) -> Iterator[tuple[Path, list[Listed]]]:
    """The files that list modules, or those of the routes of a Router."""
    for path in (folder / MODULES, folder / ROUTER, folder / "config.json"):
        if path.is_file():
            listed = _listed(RealFile.at(path), path.name)
            if isinstance(listed, str):
                raise CheckpointError(
                    f"{str(path)!r} can't be read: expected a list of modules, each with a 'path' "
                    f"({listed}). Correct the file, or use save(path)."
                )
            if listed is not None:
                _check_number(len(listed), path)
                yield path, listed


@lru_cache(maxsize=KEPT)  # many paths may be links to one file
def _listed(file: RealFile, name: str) -> list[Listed] | str | None:
    """The modules in one file of this name, or what is wrong; None if it is no such file."""
    path = file.path
    is_config = name == "config.json"  # in older versions also of a Router
    try:
        found: Any = json.loads(read_text(path, CONFIG_LIMIT if is_config else LIMIT))
        return _of_modules(found) if name == MODULES else _of_routes(found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        if is_config and isinstance(error, json.JSONDecodeError):  # unreadable for all
            return None
        return f"{type(error).__name__}: {error}"


def _of_modules(found: Any) -> list[Listed]:
    """The modules in a modules.json."""
    names = [module["name"] for module in found if "name" in module]
    if len(set(names)) < len(names):  # the last of them would be used for both
        raise ValueError("two modules of one name")
    return [
        Listed(Path(module["path"]), _class_name(module.get("type")), k == 0, k > 0)
        for k, module in enumerate(found)
    ]


def _of_routes(found: Any) -> list[Listed]:
    """The modules of all routes, which may share some."""
    types, routes = (found.get(f) if isinstance(found, dict) else None for f in ROUTES)
    if not isinstance(types, dict):  # the config.json of something else
        return []
    each = [*routes.values()] if routes else [[path] for path in types]
    firsts = {path for route in each for path in route[:1]}
    later = {path for route in each for path in route[1:]}
    return [
        Listed(Path(path), _class_name(kind), path in firsts, path in later)
        for path, kind in types.items()
    ]


def _class_name(kind: Any) -> str:
    return str(kind).rpartition(".")[2]


def refuse_unused_weights(folder: Path, modules: Sequence[Path]) -> None:
    """Raise an error if sentence-transformers would load another network than that of a folder.

    The first module must be that of the folder, and no later one a network, but for further routes
    of a Router in the folder.
    """
    is_router = False
    routes: list[Path] = []
    networks: list[Path] = []
    for listing, listed in _listings(folder):  # modules.json first
        others = [one for one in listed if folder / one.path != folder]
        firsts = [one for one in listed if one.is_first and one not in others]
        if listing.name == MODULES:
            is_own = bool(firsts)
            is_router = is_own and firsts[0].kind in ROUTERS
        elif is_router:
            routes += [folder / one.path for one in others]
            is_own = bool(firsts) or not any((folder / one.path).is_dir() for one in listed)
        else:  # not used
            continue
        networks += [
            folder / one.path for one in others if one.is_later and NETWORK.fullmatch(one.kind)
        ]
        if not is_own:
            raise CheckpointError(
                f"{str(listing)!r} does not list its own folder (an empty path), or not as the "
                f"first module, so sentence-transformers loads other weights than those beside it. "
                f"Correct the file, or use save(path)."
            )
    for module in modules:
        is_of_route = any(module.is_relative_to(route) for route in routes)
        if module in networks or (not is_of_route and _is_network(module)):
            raise CheckpointError(
                f"{str(module)!r} is a network of its own among the modules of {str(folder)!r}, "
                f"which would be loaded beside that of the folder, or instead of it. Mix its "
                f"weights by themselves, or use save(path)."
            )


def _is_network(module: Path) -> bool:
    """Whether a module has weights with a tokenizer or a config of transformers, or such routes."""
    if any(NETWORK.fullmatch(one.kind) for _, listed in _listings(module) for one in listed):
        return True
    if not any(path.name.endswith((*WEIGHTS, INDEX)) for path in module_files(module)):
        return False
    config = module / "config.json"
    is_described = config.is_file() and _has_model_type(RealFile.at(config))
    return is_described or (module / "tokenizer.json").exists()


@lru_cache(maxsize=KEPT)
def _has_model_type(file: RealFile) -> bool:
    found = read_json(file.path, CONFIG_LIMIT)
    return isinstance(found, dict) and "model_type" in found


def _check_number(n_modules: int, listing: Path) -> None:
    if n_modules > MOST_MODULES:
        raise CheckpointError(
            f"{str(listing)!r} can't be used: there are {n_modules:,} modules, expected at most "
            f"{MOST_MODULES}. Correct the file, or use save(path)."
        )


def _check_depth(folder: Path, top: Path) -> None:
    if len(folder.relative_to(top).parts) > MOST_DEPTH:
        raise CheckpointError(
            f"{str(top)!r} can't be used: a folder in it is more than {MOST_DEPTH} folders deep. "
            f"Move it away."
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
    """The files of a module, which are not hidden, as those in .git are."""
    return files_below(folder, MOST_FILES, hidden=False)


def files_below(folder: Path, most: int, hidden: bool = True) -> Iterator[Path]:
    """All regular files below a folder; follows links to files but not to folders below it."""
    n_found = 0
    try:
        for root, folders, names in os.walk(folder):
            if not hidden:
                folders[:] = [name for name in folders if not name.startswith(".")]
                names = [name for name in names if not name.startswith(".")]
            _check_depth(Path(root), folder)
            n_found += 1 + len(names)
            if n_found > most:
                raise CheckpointError(
                    f"{str(folder)!r} can't be used: it has more than {most:,} files and folders, "
                    f"expected those of a model. Move it away."
                )
            yield from (path for name in sorted(names) if (path := Path(root, name)).is_file())
    except OSError as error:  # no permission
        raise CheckpointError(
            f"{str(folder)!r} can't be searched: {error}. Move it away."
        ) from error
