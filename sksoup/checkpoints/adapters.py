"""PEFT's LoRA adapters as checkpoints of their base model, from folders and from memory."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..exceptions import CheckpointError
from ..runtime.copies import copied
from .base_model import EMBEDDING, TRANSPOSED, BaseModel
from .in_memory import MemoryCheckpoint, content_sha256
from .low_rank import Factors, LowRankCheckpoint, ReadFactors, widened
from .peft_config import CONFIG, PeftConfig
from .protocol import Checkpoint, Entry, Read, TensorInfo, is_cast
from .sources import open_checkpoint

DOUBLES = re.compile(r"\.(original_module|modules_to_save(\.[^.]+)?)\.")
PREFIX = "base_model.model."
# suffixes of the two factors: of linear layers and convolutions, of embeddings
OF_EMBEDDINGS = ".lora_embedding_A"
PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (OF_EMBEDDINGS, ".lora_embedding_B"),
)
# rank that the factors of any layer may have, even if it is larger than that of the layer
MOST_SPARE_COLUMNS = 256


class AdapterCheckpoint(LowRankCheckpoint):
    """A LoRA adapter with its base: w_0 + lambda B A, and heads and biases stored as a whole.

    ``stored`` contains the adapter's tensors by PEFT's names. Tensor names are those of the base.
    """

    base: BaseModel

    def __init__(
        self, stored: Checkpoint, config: PeftConfig, base: BaseModel, path: Path | None = None
    ) -> None:
        self.stored, self.config, self.base, self.path = stored, config, base, path
        self._factors: dict[str, _Pair] = {}
        self._whole: dict[str, str] = {}  # tensor of the base -> PEFT's name
        self._copies: dict[str, str] = {}  # copies of the base's values of a tensor with factors
        self._read_names()
        self.is_soup = path is not None and (path / "recipe.json").is_file()
        self.ranks = {name: pair.rank for name, pair in self._factors.items()}
        self.whole = frozenset(self._whole)
        own = {name: stored.header[inner] for name, inner in self._whole.items()}
        # many adapters of one base share its header
        adds = any(base.header.get(name) != info for name, info in own.items())
        self.header: Mapping[str, TensorInfo] = {**base.header, **own} if adds else base.header

    def __repr__(self) -> str:
        return repr(self.stored) if self.path is None else repr(str(self.path))

    @contextmanager
    def open(self) -> Iterator[Read]:
        """Read tensors of the whole model; those with factors are computed on each read."""
        with self.base.open() as read_base, self.open_factors() as (factors, read_whole):

            def read(name: str) -> torch.Tensor:
                if name in self.whole:
                    return read_whole(name)
                value = read_base(name)
                if (added := factors(name)) is None:
                    return value
                total = widened(value)
                added.add_to(total)
                return total.to(value.dtype)

            yield read

    @contextmanager
    def open_factors(self) -> Iterator[tuple[ReadFactors, Read]]:
        """Read factors (the left one includes lambda) and whole tensors, by the base's names."""
        with self.stored.open() as read, ExitStack() as opened:
            base = cache(lambda: opened.enter_context(self.base.open()))  # opened once, if needed

            def read_factors(name: str) -> Factors | None:
                if (pair := self._factors.get(name)) is None:
                    return None
                copy = self._copies.get(name)
                if copy is not None and not is_cast(base()(name), read(copy)):
                    differs = f"its values of {name!r} differ from those of the base"
                    raise self._does_not_fit(differs)
                return pair.factors(read)

            yield read_factors, lambda name: read(self._whole[name])

    def identity(self) -> tuple[Any, ...]:
        """The identities of the adapter and its base, and the scales."""
        return ("adapter", *self.stored.identity(), self._meaning(), *self.base.identity())

    def sha256(self, prefix: str = "") -> str:
        """SHA-256 of the adapter's tensors (or of their file) and of their scales."""
        return self._with_scales(self.stored.sha256())

    def content_sha256(self) -> str:
        """SHA-256 of names, values and scales: the same in memory and in a folder."""
        return self._with_scales(content_sha256(Entry(self.stored)))

    def _with_scales(self, digest: str) -> str:
        return hashlib.sha256(f"{digest}:{self._meaning()}".encode()).hexdigest()

    def warm(self) -> None:
        """Ask the operating system to read the adapter's file into its cache."""
        self.stored.warm()

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that the adapter and its base keep in memory."""
        yield from self.stored.held_tensors()
        yield from self.base.held_tensors()

    def _meaning(self) -> str:
        """How the factors are read, according to the configuration."""
        return ";".join(
            f"{name}={pair.scaling!r}{'T' * pair.is_transposed}"
            for name, pair in sorted(self._factors.items())
        )

    def _read_names(self) -> None:
        """Sort PEFT's names into pairs of factors and whole tensors, and check each."""
        header = self.stored.header
        wrong = [name for name in header if not name.startswith(PREFIX)]
        if wrong:
            raise self._error(
                f"its tensor {wrong[0]!r} does not have a name that PEFT uses, expected "
                f"{PREFIX + '...'!r}. Save it with model.save_pretrained(folder)"
            )
        # the names of modules may have ".lora_" in them, too
        self.config.check_work({name.rpartition(".lora_")[0] or name for name in header})
        taken: set[str] = set()
        for a_end, b_end in PAIRS:
            for a in [name for name in header if name.endswith(a_end)]:
                b = a.removesuffix(a_end) + b_end
                if b not in header:
                    raise self._error(f"it holds {a!r} without {b!r}. Save it again")
                self._add_pair(a, b, a.removesuffix(a_end).removeprefix(PREFIX))
                taken |= {a, b}
        for name, pair in self._factors.items():
            self._check_selected(name.removesuffix(".weight"), pair.a)
        for inner in header.keys() - taken:
            name = inner.removeprefix(PREFIX)
            plain = DOUBLES.sub(".", f".{name}")[1:]
            if plain != name:  # with bias="all": unused, or a duplicate
                if PREFIX + plain not in header:
                    missing = f"it holds {inner!r} without {PREFIX + plain!r}, which PEFT reads"
                    raise self._error(f"{missing}. Save it again")
                continue
            if "lora_" in name:
                raise self._error(
                    f"its tensor {inner!r} is not supported. Merge the adapter into its base model "
                    f"(peft: model.merge_and_unload()) and pass whole models instead"
                )
            self._check_wrapped(name, inner)
            name = _plain(name)
            if name in self._factors:
                self._copies[name] = inner
            else:
                self._add_whole(name, inner)
        if not self._factors and not self._whole:
            raise self._error("it holds no factors. Save it again with peft")

    def _add_pair(self, a: str, b: str, target: str) -> None:
        """A pair of factors, checked against the tensor of the base to which they are added."""
        module = _plain(target)
        name = f"{module}.weight"
        if name in self._factors:
            raise self._error(f"it holds two pairs of factors of {module!r}. Save it again")
        info = self.base.header.get(name)
        if info is None:
            raise self._does_not_fit(f"it changes {name!r}, which the base does not have")
        self.base.check_target(name, repr(self))
        kind = self.base.kind(module, repr(self))
        is_transposed = kind in TRANSPOSED
        first, second = self.stored.header[a], self.stored.header[b]
        if len(first.shape) < 2 or len(second.shape) < 2:
            raise self._error(f"{a!r} has shape {first.shape}, expected a matrix. Save it again")
        rank = first.shape[0]
        # shapes of both; kernel sizes (in a convolution's A) count as inputs
        outputs, inputs = second.shape[0], first.size // max(1, rank)
        expected = _matrix(info.shape, is_transposed)
        if second.size != outputs * rank or (outputs, inputs) != expected or not info.is_floating:
            raise self._does_not_fit(
                f"{name!r} has dtype {info.dtype} and shape {info.shape} in the base, which does "
                f"not match the factors {first.shape} and {second.shape}"
            )
        for factor in (first, second):
            if not factor.is_floating:
                raise self._error(f"{a!r} has dtype {factor.dtype}, expected a floating-point one")
        if rank > max(MOST_SPARE_COLUMNS, min(expected)):
            raise self._error(
                f"the factors of {name!r}, of shape {info.shape}, have rank {rank:,}, more than "
                f"such a matrix can have. Merge the adapter into its base model (peft: "
                f"model.merge_and_unload()) and pass whole models instead"
            )
        scaling = self.config.scaling(module, rank)
        self._factors[name] = _Pair(a, b, rank, scaling, is_transposed)

    def _add_whole(self, name: str, inner: str) -> None:
        """A tensor that replaces that of the base."""
        info, own = self.base.header.get(name), self.stored.header[inner]
        if info is not None and info.shape != own.shape:
            raise self._does_not_fit(
                f"{name!r} has shape {own.shape}, expected {info.shape} as in the base"
            )
        if info is not None and info.is_floating != own.is_floating:
            raise self._does_not_fit(
                f"{name!r} has dtype {own.dtype}, expected {info.dtype} as in the base"
            )
        if info is None and not self.base.lacks(name):
            raise self._does_not_fit(f"it holds {name!r}, which the base does not have")
        if info is None or info != own or own.is_floating:
            self.base.check_whole(name, repr(self))
        self._whole[name] = inner

    def _check_selected(self, module: str, a: str) -> None:
        """Raise an error for factors that PEFT would not read."""
        is_embedding = self.base.kind(module, repr(self)) == EMBEDDING
        if a.endswith(OF_EMBEDDINGS) != is_embedding:
            raise self._error(
                f"{a!r} is not a factor that PEFT uses for {module!r}, which is "
                f"{'an' if is_embedding else 'not an'} embedding. Save it again"
            )
        if self.path is None:  # in memory, the layers themselves show it
            return
        if ".base_layer." in a or not self._is_target(module):
            raise self._error(
                f"PEFT would not read {a!r}: according to {CONFIG} ('target_modules', "
                f"'exclude_modules', 'modules_to_save', 'layers_to_transform') {module!r} has no "
                f"factors. Correct that file, or save the adapter again"
            )

    def _check_wrapped(self, name: str, inner: str) -> None:
        """Raise an error for a whole tensor whose name PEFT's model would not have."""
        if self.path is None:
            return
        module, _, last = _plain(name).rpartition(".")
        is_wrapped = self._is_target(module)
        if name != (f"{module}.base_layer.{last}" if is_wrapped else f"{module}.{last}".strip(".")):
            raise self._error(
                f"PEFT would not read {inner!r}: according to {CONFIG} ('target_modules' and "
                f"others) {module!r} has {'factors' if is_wrapped else 'no factors'}, so the names "
                f"of its tensors {'begin' if is_wrapped else 'do not begin'} with 'base_layer'. "
                f"Correct that file, or save the adapter again"
            )

    def _is_target(self, module: str) -> bool:
        """Whether PEFT gives a module of the base factors; if that is not known, the file tells."""
        targets = self.config.targets
        is_known = targets.are_known or f"{module}.weight" in self._factors
        return is_known and self.base.has_factors(module, targets)

    def _does_not_fit(self, why: str) -> CheckpointError:
        return self._error(
            f"{why}. It is an adapter of {self.config.base_model or 'another base'!r}. Pass that "
            f"network, as it was before PEFT wrapped it (module=build_base, or its folder), and "
            f"open only adapters of the same base together. If PEFT loads it, its names are those "
            f"of another version of transformers: save it again with PEFT"
        )

    def _error(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self!r} can't be opened as a LoRA adapter: {why}.")


class _Pair:
    """The names of two factors, and how to compute the difference in the base's layout."""

    def __init__(self, a: str, b: str, rank: int, scaling: float, is_transposed: bool) -> None:
        self.a, self.b, self.rank, self.scaling = a, b, rank, scaling
        self.is_transposed = is_transposed

    def factors(self, read: Read) -> Factors:
        """Left @ right: lambda B A of (out, in), or its transpose."""
        a, b = read(self.a), read(self.b)
        wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        right = a.to(wide).reshape(self.rank, -1)
        left = b.to(wide).reshape(-1, self.rank) * self.scaling
        return Factors(right.T, left.T) if self.is_transposed else Factors(left, right)


def open_adapter(folder: Path, config: PeftConfig, base: BaseModel) -> AdapterCheckpoint:
    """The adapter in a PEFT folder."""
    return AdapterCheckpoint(open_checkpoint(folder), config, base, folder)


def adapter_in_memory(model: Any, base: BaseModel, label: str) -> AdapterCheckpoint:
    """The active adapter of a PeftModel."""
    from peft import get_peft_model_state_dict

    _check_unmerged(model, label)
    active = active_adapter(model, label)
    config = PeftConfig(label, model.peft_config[active].to_dict()).checked()
    state = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    adapter = AdapterCheckpoint(MemoryCheckpoint(state, label), config, base)
    _check_as_configured(model, active, adapter)
    own = base_of_peft(model)
    with base.open() as read:
        for name, value in own.items():
            if name in adapter.whole or name not in base.header:
                continue
            if not is_cast(read(name), value.detach().cpu()):
                raise CheckpointError(
                    f"{label} can't join this collection: {name!r} of its base differs from that "
                    f"of the others. Only adapters of the same base can be mixed."
                )
    return adapter


def _check_as_configured(model: Any, active: str, adapter: AdapterCheckpoint) -> None:
    """Raise an error for a model whose layers are not scaled as its configuration says."""
    for name, layer in model.get_base_model().named_modules():
        scaling, pair = getattr(layer, "scaling", None), adapter._factors.get(f"{name}.weight")
        if pair is None or not isinstance(scaling, dict) or active not in scaling:
            continue
        if not math.isclose(scaling[active], pair.scaling):
            raise CheckpointError(
                f"{adapter!r} can't join this collection: {name!r} scales its product by "
                f"{scaling[active]:.6g}, expected {pair.scaling:.6g} as in its configuration. Undo "
                f"that (set_scale, scale_layer), or pass the whole network: "
                f"model.merge_and_unload()."
            )


def unwrapped(model: Any, label: str) -> tuple[nn.Module, frozenset[str]]:
    """The base of a PeftModel, and the names of its tensors that training changed in place."""
    from peft import get_peft_model_state_dict

    _check_unmerged(model, label)
    base: nn.Module = copied(model).unload()  # with its heads in place of the base's
    known = base.state_dict().keys()
    state = {n: value for n, value in base_of_peft(model).items() if n in known}
    base.load_state_dict(state, strict=False)
    states = (
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        for name in model.peft_config
    )
    held = {_plain(name.removeprefix(PREFIX)) for one in states for name in one}
    names = model.get_base_model().state_dict().keys()
    saved = {n.replace("original_module.", "") for n in names if "original_module." in n}
    return base, frozenset(held & known - saved)  # biases


def _check_unmerged(model: Any, label: str) -> None:
    """Raise an error for a model whose adapter is merged into the base."""
    if any(getattr(layer, "merged_adapters", None) for layer in model.modules()):
        raise CheckpointError(
            f"{label} can't join this collection: its adapter is merged into the base. Undo that "
            f"(model.unmerge_adapter()), or pass the whole network: model.merge_and_unload()."
        )


def active_adapter(model: Any, label: str) -> str:
    """The name of the one active adapter of a PeftModel."""
    active = model.active_adapters
    active = [active] if isinstance(active, str) else list(active)
    if len(active) != 1:
        raise CheckpointError(
            f"{label} has {len(active)} active adapters, expected one. Call "
            f"model.set_adapter(name)."
        )
    return str(active[0])


def base_of_peft(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of a PeftModel's base, with its original names."""
    state: dict[str, torch.Tensor] = {}
    for name, value in model.get_base_model().state_dict().items():
        if ".modules_to_save." in f".{name}" or "lora_" in name:
            continue
        state[_plain(name).replace("original_module.", "")] = value
    return state


def is_peft_model(item: Any) -> bool:
    """Whether an object is a PeftModel, judging by its methods."""
    return (
        isinstance(item, nn.Module)
        and hasattr(item, "peft_config")
        and hasattr(item, "get_base_model")
    )


def _plain(name: str) -> str:
    """The name of a tensor or module before PEFT wrapped its layer."""
    return name.replace(".base_layer.", ".").removesuffix(".base_layer")


def _matrix(shape: tuple[int, ...], is_transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of a weight; kernel sizes count as inputs."""
    if len(shape) < 2:
        return (0, 0)
    rest = 1
    for size in shape[1:]:
        rest *= size
    return (rest, shape[0]) if is_transposed else (shape[0], rest)
