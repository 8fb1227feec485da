"""Copy the other files of a Hugging Face folder to that of the soup."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..exceptions import CheckpointError
from .hub import hub_folder
from .hub_config import LIMIT, refuse_other_weights
from .modules import WEIGHTS, module_files, module_folders, refuse_unused_weights
from .read import real_path
from .sources import open_checkpoint, paths_of
from .texts import read_text
from .write import copy_new, write_anew

# configuration, tokenizer, processor
COMPANIONS = (
    "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.codes", "*.spm", "*.tokenizer",
)  # fmt: skip
TOKENIZERS = (
    "tokenizer*.json", "vocab*.json", "vocab.txt", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*.model", "*.tiktoken", "*.codes", "*.spm",
    "*.tokenizer",
)  # fmt: skip
NOT_COMPANIONS = (
    "*.index*.json", "trainer_state.json", "history.json", "*results.json", "adapter_config.json",
    "export.json",
)  # fmt: skip
ANNEX = (".git", "annex", "objects")  # where git-annex has large files, behind links
MOST_BYTES = 1 << 30  # of the files that are copied


def model_folders(checkpoints: Any, used: Iterable[str], others: Iterable[str] = ()) -> list[Path]:
    """Hugging Face folders of checkpoints and their bases; of the others, if these have none."""
    for names in (used, others):
        folders = [hub_folder(path) for path in paths_of(checkpoints, names)]
        if found := dict.fromkeys(folder for folder in folders if folder is not None):
            return [*found]
    return []


def copy_companions(source: Path, target: Path, others: Sequence[Path] = ()) -> None:
    """Copy configuration, tokenizer and sentence-transformers' modules to another model folder.

    Links may point into the folder or to the blobs of the Hugging Face cache that contains it
    (models--x/snapshots/y/config.json -> ../../blobs/z). Other links raise an error, because a
    private file could be published with the soup. Weights of a further module that differ in the
    ``others`` also raise an error, because they are not mixed.
    """
    source = source.resolve()
    modules, found = find_companions(source, others)
    for module in modules:  # also an empty one, which sentence-transformers expects
        (target / module.relative_to(source)).mkdir(parents=True, exist_ok=True)
    for path in found:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_new(path, copy)


def find_companions(source: Path, others: Sequence[Path] = ()) -> tuple[list[Path], list[Path]]:
    """The folders of modules and the files that are copied; raise an error if they can't be."""
    found = _matching(source, COMPANIONS)
    modules = module_folders(source)
    refuse_unused_weights(source, modules)
    for folder in (source, *modules):
        refuse_other_weights(folder, NOT_COMPANIONS)
    # a module may be inside another one, and may hold data, code, or whole models for runtimes
    of_modules = [
        path
        for path in dict.fromkeys(path for module in modules for path in module_files(module))
        if path.suffix in WEIGHTS or _is_companion(path, COMPANIONS)
    ]
    _refuse_links(source, [*found, *of_modules])
    _refuse_large(source, [p for p in (*found, *of_modules) if p.suffix not in WEIGHTS])
    _refuse_differing_weights(source, [p for p in of_modules if p.suffix in WEIGHTS], others)
    return modules, [*found, *of_modules]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer in place of that of another model folder.

    Its files are not saved by transformers, which may have read more files than those in its
    folder.
    """
    found = find_tokenizer(source.resolve())
    for path in _matching(target, TOKENIZERS):
        path.unlink()
    for path in found:
        copy_new(path, target / path.name)


def find_tokenizer(source: Path) -> set[Path]:
    """The files of a tokenizer; raise an error if they can't be copied."""
    found = _matching(source, TOKENIZERS)
    _refuse_links(source, found)
    _refuse_large(source, found)
    return found


def _matching(folder: Path, patterns: Sequence[str]) -> set[Path]:
    """The files of a folder that may be copied and match one of the patterns."""
    return {path for path in folder.iterdir() if _is_companion(path, patterns) and path.is_file()}


def _is_companion(path: Path, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the patterns; those of hidden files do not."""
    is_other = path.name.startswith(".") or any(path.match(one) for one in NOT_COMPANIONS)
    return not is_other and any(path.match(one) for one in patterns)


def _refuse_large(source: Path, paths: Iterable[Path]) -> None:
    """Raise an error for files that would fill the disk; sparse ones take no space until then."""
    sizes = {path: path.stat().st_size for path in paths}
    if sum(sizes.values()) > MOST_BYTES:
        large = max(sizes, key=lambda path: sizes[path])
        raise CheckpointError(
            f"The files beside the weights in {str(source)!r} can't be copied: together they have "
            f"more than {MOST_BYTES >> 30} GiB ({large.name!r} has {sizes[large]:,} bytes). Move "
            f"away what is not of the model, or use save(path)."
        )


def _refuse_links(source: Path, paths: Iterable[Path]) -> None:
    """Raise an error for links that lead out of the folder or the cache that it is part of."""
    owned = [source]
    if source.parent.name == "snapshots":
        owned.append(source.parents[1] / "blobs")
    for path in paths:
        real = Path(real_path(path))
        own = [real.relative_to(one).parts for one in owned if real.is_relative_to(one)]
        is_hidden = any(part.startswith(".") for parts in own for part in parts)
        if not own or (is_hidden and own[0][:3] != ANNEX):
            raise CheckpointError(
                f"{str(path)!r} can't be copied: it is a link to {str(real)!r}, outside its folder "
                f"or hidden. Replace the link with the file, or use save(path)."
            )


def record_dtype(folder: Path) -> None:
    """Write the dtype of the weights to the config.json, to which transformers converts them.

    The ingredient that it was copied from may have had another one.
    """
    config = folder / "config.json"
    try:
        found = json.loads(read_text(config, LIMIT))
    except (CheckpointError, ValueError, RecursionError):  # none, or damaged
        return
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        return  # not of transformers
    sizes: Counter[torch.dtype] = Counter()
    for info in open_checkpoint(folder).header.values():
        sizes[info.dtype] += info.size if info.is_floating else 0
    dtype = str(max(sizes, key=sizes.__getitem__, default=torch.float32)).removeprefix("torch.")
    changed = False
    for part in (found, *found.values()):
        for name in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and part.get(name) not in (None, dtype):
                part[name] = dtype
                changed = True
    if changed:
        write_anew(config, json.dumps(found, indent=2) + "\n")


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
