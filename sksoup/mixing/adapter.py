"""A soup of LoRA adapters as one adapter: concatenated factors, or the best of a given rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.adapters import PREFIX, AdapterCheckpoint
from ..checkpoints.base_model import CONV1D, CONVOLUTION, EMBEDDING, TRANSPOSED
from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.low_rank import Factors
from ..checkpoints.write import write_safetensors
from ..exceptions import CheckpointError

BIAS = re.compile(r"bias[^.]*$")  # such as in_proj_bias of an attention layer
# PEFT's tasks; it rejects others
TASKS = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip
AUTO_MAPPING = {"base_model_class", "parent_library"}
Bias: TypeAlias = Literal["none", "all", "lora_only"]  # of PEFT


@dataclass(frozen=True)
class MixedAdapter:
    """The mixed difference of adapters from their base.

    ``errors`` has, for every tensor with factors, the norm of the part lost by the rank, relative
    to that of the full difference.
    """

    adapters: Sequence[AdapterCheckpoint]  # the ingredients
    factors: Mapping[str, Factors]
    whole: Mapping[str, torch.Tensor]
    errors: Mapping[str, float]

    def on_base(self) -> dict[str, torch.Tensor]:
        """The tensors stored as a whole that differ from the base."""
        base = self.adapters[0].base
        found = dict(self.whole)
        with base.open() as read:
            for name, factors in self.factors.items():
                value = read(name)
                total = value.double()
                factors.add_to(total)
                found[name] = total.to(value.dtype)
        return found


def mixed_adapter(
    checkpoints: CheckpointCollection,
    coef: NDArray[np.float64],
    rows: Mapping[str, int],
    mixed: Mapping[str, torch.Tensor],
    rank: int | None = None,
) -> MixedAdapter:
    """The factors of a mix with coefficients (n_layers, K); heads are taken from ``mixed``."""
    used = [name for name, c in zip(checkpoints.names, coef.T, strict=True) if c.any()]
    adapters = _all_adapters(checkpoints, used)
    whole = sorted({name for one in adapters for name in one.whole})
    ranks = sorted({n for one in adapters for n in one.ranks} - set(whole))
    parts: dict[str, list[Factors]] = {name: [] for name in ranks}
    for checkpoint in used:
        k = checkpoints.names.index(checkpoint)
        with checkpoints.open_factors(checkpoint) as (read, _):
            for name in ranks:
                if (c := float(coef[rows[name], k])) and (both := read(name)) is not None:
                    parts[name].append(Factors(both.left.double() * c, both.right.double()))
    factors, errors = {}, {}
    for name, found in parts.items():
        if found:
            factors[name], errors[name] = truncated(side_by_side(found), rank)
    return MixedAdapter(adapters, factors, {name: mixed[name] for name in whole}, errors)


def _all_adapters(
    checkpoints: CheckpointCollection, used: Sequence[str]
) -> list[AdapterCheckpoint]:
    """The ingredients, if all are adapters of one base."""
    adapters = checkpoints.on_one_base(used)
    found = [one for one in adapters.values() if isinstance(one, AdapterCheckpoint)]
    if not found:
        known = checkpoints.adapters(used)
        other = next((name for name in used if name not in known), used[0])
        raise CheckpointError(
            f"This soup can't be written as an adapter: its ingredient {other!r} is a whole "
            f"model{'' if other not in known else ' or has another base'}, so its difference from "
            f"the base does not have a low rank. Use save_pretrained or save, or leave it out of "
            f"the collection."
        )
    return found


def side_by_side(factors: Sequence[Factors]) -> Factors:
    """The sum of products as one product, whose rank is the sum of the ranks."""
    left = torch.cat([each.left for each in factors], dim=1)
    return Factors(left, torch.cat([each.right for each in factors]))


def truncated(factors: Factors, rank: int | None) -> tuple[Factors, float]:
    """The best approximation of this rank by singular values, and its relative error.

    None keeps all, with at most as many columns as the tensor.
    """
    most = min(len(factors.left), factors.right.shape[1])
    wanted = factors.rank if rank is None else rank
    if factors.rank <= min(wanted, most):
        return factors, 0.0
    q_left, r_left = torch.linalg.qr(factors.left)
    q_right, r_right = torch.linalg.qr(factors.right.T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept = min(wanted, len(s))
    root = s[:kept].sqrt()
    total = float(torch.linalg.vector_norm(s))
    left_out = float(torch.linalg.vector_norm(s[kept:]))
    near = Factors((q_left @ u[:, :kept]) * root, (root[:, None] * vt[:kept]) @ q_right.T)
    return near, left_out / total if total > 0 else 0.0


def check_peft() -> None:
    """Raise an error if peft, which writes the configuration, is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "save_adapter needs peft, which is not installed: pip install 'sksoup[peft]'."
        ) from error


def write_adapter(folder: Path, mixed: MixedAdapter) -> None:
    """Write PEFT's two files to an existing folder."""
    from peft import LoraConfig

    first = mixed.adapters[0]
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for name, factors in mixed.factors.items():
        module = name.removesuffix(".weight")
        kinds[module], ranks[module] = first.base.kind(module, "this soup"), factors.rank
        tensors |= _as_peft(module, kinds[module], factors, first.header[name].shape)
    modules, biases = _held_whole(mixed, kinds)
    for name, value in mixed.whole.items():
        module, _, last = name.rpartition(".")
        inner = f"{module}.base_layer.{last}" if module in kinds else name
        tensors[PREFIX + inner] = value
    usual = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    others = {f"^{re.escape(m)}": r for m, r in ranks.items() if r != usual}
    fields = [one.config.fields for one in mixed.adapters]
    task = _agreed(fields, "task_type")
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=others, alpha_pattern=dict(others),
        target_modules=_targets(list(kinds), first), modules_to_save=modules or None, bias=biases,
        fan_in_fan_out=CONV1D in kinds.values(), inference_mode=True,
        task_type=task if task in TASKS else None, revision=_text(_agreed(fields, "revision")),
        base_model_name_or_path=_text(_agreed(fields, "base_model_name_or_path")),
    )  # fmt: skip
    config.auto_mapping = _auto_mapping(_agreed(fields, "auto_mapping"))
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config.save_pretrained(str(folder))


def _as_peft(
    module: str, kind: str, factors: Factors, shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Two factors by PEFT's names and in its layout, in float32."""
    left, right = factors.left.float().contiguous(), factors.right.float().contiguous()
    a, b = (left.T.contiguous(), right.T.contiguous()) if kind in TRANSPOSED else (right, left)
    start = f"{PREFIX}{module}.lora_"
    if kind == EMBEDDING:
        return {f"{start}embedding_A": a, f"{start}embedding_B": b}
    if kind == CONVOLUTION:
        a = a.reshape(factors.rank, *shape[1:])
        b = b.reshape(*b.shape, *(1 for _ in shape[2:]))
    return {f"{start}A.weight": a, f"{start}B.weight": b}


def _held_whole(mixed: MixedAdapter, kinds: Mapping[str, str]) -> tuple[list[str], Bias]:
    """The modules that are saved as a whole, and PEFT's ``bias`` option for other biases."""
    parents = {name.rpartition(".")[0] for name in mixed.whole if not BIAS.search(name)}
    if "" in parents:
        raise CheckpointError(
            "This soup can't be written as an adapter: a tensor of its root module is stored as a "
            "whole. Use save."
        )
    # peft can't wrap a module inside a wrapped one
    modules = {one for one in parents if parents.isdisjoint(_around(one))}
    biases = {name for name in mixed.whole if modules.isdisjoint(_around(name))}
    bias: Bias = "all"
    if biases <= {f"{module}.bias" for module in kinds}:
        bias = "lora_only" if biases else "none"
    return sorted(modules), bias


def _around(name: str) -> list[str]:
    """The names of the modules that a module or a tensor is in, the root excepted."""
    return [name[:dot] for dot, character in enumerate(name) if character == "."]


def _targets(modules: list[str], adapter: AdapterCheckpoint) -> list[str] | str:
    """The modules as a list of names if these are unambiguous, otherwise as a pattern."""
    inner = {name[len(outer) + 1 :] for name in adapter.base.modules for outer in _around(name)}
    if not inner.isdisjoint(modules):
        return f"^({'|'.join(map(re.escape, modules))})$"
    return modules


def _agreed(fields: Iterable[Mapping[str, Any]], name: str) -> Any:
    """A field on which all configurations agree, or None."""
    values = [each.get(name) for each in fields]
    return values[0] if all(value == values[0] for value in values) else None


def _text(value: Any) -> str | None:
    """A field that is a string, or None: peft accepts no other types."""
    return value if isinstance(value, str) else None


def _auto_mapping(value: Any) -> dict[str, str] | None:
    """The class of a base and its package, if they are strings, or None."""
    is_plain = isinstance(value, dict) and value.keys() <= AUTO_MAPPING
    return value if is_plain and all(isinstance(v, str) for v in value.values()) else None
