"""The base model of adapters: its weights and the kinds of its layers."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..exceptions import CheckpointError
from ..runtime.random_state import preserved_random_state
from .architecture import ModuleSource, skeleton
from .computed import computed_names
from .converted import convert_names
from .hub import HubModule, hub_folder
from .in_memory import MemoryCheckpoint, digest_of
from .low_rank import BaseCheckpoint
from .peft_targets import Targets
from .prefixes import drop_prefixes
from .protocol import Entry, Read, TensorInfo, same_bits
from .sources import open_checkpoint

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w.+/-]{0,199}", re.ASCII)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR, CONVOLUTION, EMBEDDING, CONV1D = "linear", "convolution", "embedding", "Conv1D"
KINDS = (LINEAR, CONVOLUTION, EMBEDDING, CONV1D)
HEADS = ("score", "classifier")  # the last layers of classifiers, according to PEFT
TRANSPOSED = (EMBEDDING, CONV1D)  # weights are (inputs, outputs)


class BaseModel(BaseCheckpoint):
    """Weights by the names of a module, with the kinds of its layers and its tied tensors.

    The module is not kept. Tensors in ``varying`` do not belong to the base: a factory initializes
    them differently each time, a PeftModel has trained them, or they are the head of another task.
    """

    def __init__(self, entry: Entry, module: nn.Module, varying: Iterable[str] = ()) -> None:
        self.entry = entry
        self.path, self.key = entry.checkpoint.path, entry.checkpoint.key
        self.varying = frozenset(varying)
        self.header: Mapping[str, TensorInfo] = {
            name: info for name, info in entry.header.items() if name not in self.varying
        }
        self._kinds = {name: _kind(part) for name, part in module.named_modules()}
        self._outputs = _outputs(module)
        self._names = frozenset(module.state_dict())
        self._computed = computed_names(module)
        self._tied = {name: same for same in tied_names(module) for name in same}
        self._digests: dict[frozenset[str], str] = {}

    def __repr__(self) -> str:
        return f"the base {self.entry!r}"

    @contextmanager
    def open(self) -> Iterator[Read]:
        """Read tensors by the module's names."""
        with self.entry.checkpoint.open() as read:
            yield lambda name: read(self.entry.prefix + name)

    def identity(self) -> tuple[Any, ...]:
        """The identity of its file, or its digest."""
        return (self.entry.prefix, *self.entry.checkpoint.identity())

    def sha256(self, prefix: str = "") -> str:
        """SHA-256 of its file, or of names and values in memory."""
        return self.entry.checkpoint.sha256(self.entry.prefix)

    def warm(self) -> None:
        """Ask the operating system to read its file into its cache."""
        self.entry.checkpoint.warm()

    def held_tensors(self) -> Iterable[torch.Tensor]:
        """The tensors that it keeps in memory."""
        return self.entry.checkpoint.held_tensors()

    def kind(self, module: str, label: str) -> str:
        """The kind of a layer, one of `KINDS`; raise an error for other layers."""
        kind = self._kinds.get(module, "not a layer of the base")
        if kind not in KINDS:
            raise CheckpointError(
                f"{label} can't be opened as a LoRA adapter: it changes {module!r}, which is "
                f"{kind}, expected a linear layer, an embedding or a convolution (without groups). "
                f"Merge the adapter into its base model (peft: model.merge_and_unload())."
            )
        return kind

    def has_factors(self, module: str, targets: Targets) -> bool:
        """Whether PEFT adds factors to a layer, according to an adapter's configuration."""
        kind = self._kinds.get(module)
        is_linear = kind in (LINEAR, CONV1D)
        return kind in KINDS and targets.selects(module, is_linear, module in self._outputs)

    def check_target(self, name: str, label: str) -> None:
        """Raise an error if an adapter changes a tied tensor, which would untie it."""
        if others := [other for other in self._tied.get(name, ()) if other != name]:
            raise CheckpointError(
                f"{label} can't be opened as a LoRA adapter: it changes {name!r}, which is tied to "
                f"{', '.join(map(repr, others))} in the base, but PEFT changes only one of them. "
                f"Untie them (transformers: tie_word_embeddings=False), or merge the adapter."
            )

    check_whole = check_target

    def content_sha256(self, without: Iterable[str] = ()) -> str:
        """SHA-256 of names and values, without some tensors; computed once."""
        left_out = frozenset(without)
        if left_out not in self._digests:
            header = {n: info for n, info in self.header.items() if n not in left_out}
            with self.open() as read:
                self._digests[left_out] = digest_of(header, read)
        return self._digests[left_out]

    @property
    def modules(self) -> Iterable[str]:
        """Names of all its modules."""
        return self._kinds.keys()

    def lacks(self, name: str) -> bool:
        """Whether the module has a tensor that the weights lack, such as a new head."""
        return name in self._names and name not in self.header

    def missing(self, header: Mapping[str, TensorInfo]) -> list[str]:
        """The module's tensors that are in neither of the two."""
        return sorted(
            name
            for name in self._names - header.keys() - self._computed
            if not any(other in header for other in self._tied.get(name, ()))
        )


def _kind(part: nn.Module) -> str:
    """The kind of a layer: one of `KINDS`, or a description."""
    transformers = sys.modules.get("transformers")
    if getattr(part, "groups", 1) != 1:
        return "a convolution with groups"
    if isinstance(part, CONVOLUTIONS) and part.padding_mode != "zeros":
        return f"a convolution with padding_mode={part.padding_mode!r}, which PEFT ignores"
    if isinstance(part, CONVOLUTIONS) and part.padding == "same" and max(part.dilation) > 1:
        return "a convolution with dilation and padding='same', which PEFT ignores"
    if isinstance(part, nn.Linear):
        return LINEAR
    if isinstance(part, CONVOLUTIONS):
        return CONVOLUTION
    if isinstance(part, nn.Embedding):
        return EMBEDDING
    if transformers is not None and isinstance(part, transformers.pytorch_utils.Conv1D):
        return CONV1D  # GPT-2's linear layer
    return f"a {type(part).__name__}"


def _outputs(network: nn.Module) -> frozenset[str]:
    """Names of the output layers of transformers models, which PEFT's "all-linear" excludes."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(network, transformers.PreTrainedModel):
        return frozenset()
    last: Any = network.get_output_embeddings()
    if last is None:
        last = next((getattr(network, n) for n in HEADS if hasattr(network, n)), None)
    return frozenset(name for name, part in network.named_modules() if part is last)


def tied_names(module: nn.Module) -> list[list[str]]:
    """The names of each tensor that has several."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, value in module.state_dict(keep_vars=True).items():
        names[id(value)].append(name)
    return [same for same in names.values() if len(same) > 1]


def base_of_folder(folder: Path, module: HubModule) -> BaseModel:
    """The base in a Hugging Face folder; its weights stay in the file."""
    entries = drop_prefixes([Entry(open_checkpoint(folder))], module)
    (entry,) = convert_names(entries, module)
    network = skeleton(module)
    if network is None:
        network = module()
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    # the folder may have the head of another task, or for another number of labels
    others = [name for name, info in entry.header.items() if own.get(name) != info.shape]
    return BaseModel(entry, network, others if module.task is not None else ())


def base_of_module(module: ModuleSource, changed: Iterable[str] = ()) -> BaseModel:
    """The base from a module or factory; its weights are kept in memory.

    Tensors of a module that were changed do not belong to the base.
    """
    if isinstance(module, nn.Module):
        return BaseModel(Entry(MemoryCheckpoint(module.state_dict(), "in memory")), module, changed)
    built = _build(module, 0)
    first, second = built.state_dict(), _build(module, 1).state_dict()
    varying = [name for name, value in first.items() if not same_bits(value, second[name])]
    return BaseModel(Entry(MemoryCheckpoint(first, "in memory")), built, varying)


def _build(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The module, built without changing the global random state."""
    with preserved_random_state():
        torch.manual_seed(seed)
        built = factory()
    if not isinstance(built, nn.Module):
        raise TypeError(
            f"module={factory!r} returned a {type(built).__name__}, expected an nn.Module."
        )
    return built.cpu()


def _is_revision(value: Any) -> bool:
    """Whether a value may be a revision on the hub: a branch, a tag, a commit, or refs/pr/1."""
    return isinstance(value, str) and bool(REVISION.fullmatch(value)) and ".." not in value


def find_base_folder(name: str, revision: Any = None) -> Path | None:
    """The folder of the base named in a configuration, if it is on this machine."""
    if not name or name.startswith(("//", "\\\\")):  # Windows would ask that machine
        return None
    try:
        path = Path(name).expanduser()
        folder = hub_folder(path) if path.exists() else None  # not the folder around it
    except (OSError, ValueError, RuntimeError):  # not a valid path
        folder = None
    if folder is not None or not HUB_ID.fullmatch(name) or ".." in name:
        return folder
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    if revision is not None and not _is_revision(revision):  # never another one
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)  # does not download
    except ValueError:  # a name that the hub does not allow
        return None
    return Path(found).parent if isinstance(found, str) else None
