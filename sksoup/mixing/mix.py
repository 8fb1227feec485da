"""Mix checkpoints with given coefficients: the function behind the weights of every soup."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..checkpoints.collection import CheckpointCollection
from ..checkpoints.low_rank import LowRankCheckpoint, widened
from ..checkpoints.protocol import TensorInfo, same_bits, same_values
from ..checkpoints.write import SHARD_BYTES, write_shards
from ..exceptions import CheckpointError, SoupWarning
from ..runtime.distributed import agreed, all_gather
from ..runtime.memory import parse_bytes
from .layers import check_layers, is_variance

__all__ = ["mix"]

# dtypes that the floating-point tensors of a mix can be converted to
DTYPES = {
    "float64": torch.float64, "float32": torch.float32,
    "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
GROUP = 1 << 22  # elements: 16 MiB of an accumulator in float32


@overload
def mix(
    checkpoints: CheckpointCollection | Any,
    coef: ArrayLike,
    *,
    layers: Mapping[str, int] | None = None,
    out: None = None,
    dtype: str | torch.dtype | None = None,
) -> dict[str, torch.Tensor]: ...


@overload
def mix(
    checkpoints: CheckpointCollection | Any,
    coef: ArrayLike,
    *,
    layers: Mapping[str, int] | None = None,
    out: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    shard_size: int | str = SHARD_BYTES,
) -> Path: ...


def mix(
    checkpoints: CheckpointCollection | Any,
    coef: ArrayLike,
    *,
    layers: Mapping[str, int] | None = None,
    out: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    shard_size: int | str = SHARD_BYTES,
) -> dict[str, torch.Tensor] | Path:
    r"""Mix checkpoints into one state dict with given coefficients.

    Every floating-point tensor becomes :math:`w = \sum_k c_{lk} w_k`, where :math:`l` is the layer
    of the tensor and :math:`\sum_k c_{lk} = 1`. The weights of every soup are computed by this
    function: ``soup.state_dict()`` equals ``mix(checkpoints, soup.coef_, layers=soup.layers_)`` bit
    for bit, except for BatchNorm statistics that were re-estimated (``recalibrated_``).

    Parameters
    ----------
    checkpoints : CheckpointCollection
        The checkpoints, or anything that the constructor of `CheckpointCollection` accepts. No
        module is needed.
    coef : array-like of shape (n_checkpoints,) or (n_layers, n_checkpoints)
        Coefficients; each row sums to 1. A Series whose index, or a DataFrame whose columns are
        names of checkpoints is matched by name.
    layers : mapping of str to int or None, default=None
        For every tensor name, the index of its row in ``coef``. May be None if there is only one
        row.
    out : str or path-like, default=None
        A new folder to which the mix is written, for models larger than memory: sharded
        ``.safetensors`` files with an index, in the layout of Hugging Face. It appears only when it
        is complete.
    dtype : {"float64", "float32", "float16", "bfloat16"}, torch.dtype or None, default=None
        Dtype to which the floating-point tensors are converted, in the one rounding at the end.
        None keeps the stored dtype.
    shard_size : int or str, default="5GB"
        Maximum size of a file in ``out``, in bytes or as a string such as "2GB". A larger tensor
        has its own file.

    Returns
    -------
    state_dict : dict of str to Tensor, or Path
        The mix on the CPU, in the stored dtype (the promoted one if the mixed checkpoints differ)
        or in ``dtype``. With ``out``, the path of that folder.

    Raises
    ------
    ValueError
        ``coef`` has a wrong shape, is not finite, or has a row that does not sum to 1; ``layers``
        does not map every tensor to a row; or ``dtype`` or ``shard_size`` is not one of the above.
    CheckpointError
        A checkpoint can't be read, or a mixed tensor is not finite or too large for its dtype.
    FileExistsError
        ``out`` exists and is not an empty folder. Nothing is read.

    Warns
    -----
    SoupWarning
        Integer tensors with two or more dimensions, such as quantized weights, differ between
        checkpoints.

    Notes
    -----
    The arithmetic is specified exactly, so that the result is reproducible bit for bit. For each
    tensor, an accumulator in float32 (float64 for float64) starts with :math:`c_1 w_1`, adds the
    rounded products :math:`w_k c_k` in the order of the checkpoints, and is cast once at the end.
    Checkpoints with a coefficient of exactly 0 are not read. A tensor with the same bits in all
    checkpoints read is copied. For LoRA adapters of one base, the accumulator starts with the
    base's :math:`w_0`, which is read once, and adds :math:`c_k (\lambda_k B_k A_k)`, with the
    product computed in float64 and rounded; tensors that an adapter stores as a whole, and adapters
    that are mixed with whole models, are treated like any others. Integer tensors are taken from
    the checkpoint with the largest mean coefficient (the first one if there are ties). Negative
    running variances are set to 0.

    Each byte is read once. Memory: the result (in the accumulator's dtype), one tensor, and at most
    256 numbers for each tensor of every checkpoint (fewer, at least 16, if they are more than
    65,536), by which they are compared; with ``out``, instead of the result, a group of tensors of
    at most 16 MiB or the largest tensor. Files are memory-mapped, one at a time; of legacy pickles,
    the tensors of a group are copied.

    References
    ----------
    Wortsman et al., *Model soups*, ICML 2022, arXiv:2203.05482, Section 2.

    Examples
    --------
    >>> import torch
    >>> from sksoup import mix
    >>> a, b = {"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([3.0, 5.0])}
    >>> mix([a, b], [0.5, 0.5])
    {'w': tensor([2., 5.])}
    >>> mix([a, b], [2.0, -1.0])
    {'w': tensor([-1.,  5.])}
    """
    if not isinstance(checkpoints, CheckpointCollection):
        checkpoints = CheckpointCollection(checkpoints)
    weights = check_coef(in_order(coef, checkpoints.names), len(checkpoints))
    rows = check_layers(layers, checkpoints.layout, len(weights))
    wanted, most = as_dtype(dtype), parse_bytes(shard_size, "shard_size")
    if out is not None:
        return mix_into(Path(out), checkpoints, weights, rows, dtype=wanted, shard_bytes=most)
    mixed, differing = accumulate(checkpoints, weights, rows, checkpoints.layout)
    _warn_of_integers(mixed, differing)
    dtypes = stored_dtypes(checkpoints, weights, wanted)
    return {
        name: _finished(name, mixed.pop(name), dtypes[name], name in differing)
        for name in checkpoints.layout
    }


def mix_into(
    folder: Path,
    checkpoints: CheckpointCollection,
    coef: NDArray[np.float64],
    rows: Mapping[str, int],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a mix to a new folder as shards, each with ``metadata``."""
    infos = {
        name: TensorInfo(checkpoints.layout[name].shape, dtype)
        for name, dtype in stored_dtypes(checkpoints, coef, dtype).items()
    }

    def read(names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return mix_some(checkpoints, coef, rows, names, dtype)

    write_shards(folder, infos, read, metadata, shard_bytes)
    return folder


def mix_some(
    checkpoints: CheckpointCollection,
    coef: NDArray[np.float64],
    rows: Mapping[str, int],
    names: Iterable[str],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Mix these tensors in groups, with one group in memory at a time."""
    dtypes = stored_dtypes(checkpoints, coef, dtype)
    is_warned = False
    for group in _groups({name: checkpoints.layout[name].size for name in names}):
        mixed, differing = accumulate(checkpoints, coef, rows, group)
        is_warned = is_warned or _warn_of_integers(mixed, differing)
        for name in group:
            yield name, _finished(name, mixed.pop(name), dtypes[name], name in differing)


def _warn_of_integers(mixed: Mapping[str, torch.Tensor], differing: AbstractSet[str]) -> bool:
    """Warn if integer matrices, which are copied, differ, as quantized weights do."""
    names = sorted(n for n in differing if not mixed[n].is_floating_point())
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"Integer tensors are not averaged, but {', '.join(map(repr, names[:5]))}{more} differ "
            f"between the checkpoints, and the mix has those of the checkpoint with the largest "
            f"coefficient. If they are quantized weights, the mix is useless. Dequantize the "
            f"checkpoints first.",
            SoupWarning,
            stacklevel=3,
        )
    return bool(names)


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Split the tensors, in order, into groups of at most `GROUP` elements or one tensor.

    Every checkpoint is opened again for every group, and many tensors may have the same size.
    """
    most, group, held = max([GROUP, *sizes.values()]), list[str](), 0
    for name, size in sizes.items():
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def in_order(coef: Any, names: Sequence[str]) -> Any:
    """Coefficients in the order of the collection; those of pandas may have names."""
    if not hasattr(coef, "loc"):
        return coef
    what, found = ("index", coef.index) if coef.ndim == 1 else ("columns", coef.columns)
    if not any(isinstance(name, str) for name in found):
        return coef
    if sorted(map(str, found)) != sorted(names):
        raise ValueError(
            f"coef has the {what} {', '.join(map(repr, list(found)[:5]))}, expected the names of "
            f"the checkpoints, {', '.join(map(repr, names[:5]))}. Or pass coef.to_numpy(), in the "
            f"order of the collection."
        )
    return np.asarray(coef[list(names)])


def check_coef(coef: ArrayLike, n_checkpoints: int) -> NDArray[np.float64]:
    """Return ``coef`` as (n_layers, n_checkpoints) float64; raise ValueError if it is invalid."""
    given = np.asarray(coef)
    if np.iscomplexobj(given):
        raise ValueError("coef is complex, expected real coefficients.")
    rows = np.atleast_2d(given).astype(np.float64)
    if given.ndim not in (1, 2) or rows.shape[1] != n_checkpoints or not len(rows):
        raise ValueError(
            f"coef has shape {given.shape}, expected ({n_checkpoints},) or (n_layers, "
            f"{n_checkpoints}): one coefficient per checkpoint."
        )
    if not np.isfinite(rows).all():
        raise ValueError("coef holds NaN or infinite values, expected finite coefficients.")
    # a few units in the last place of the given numbers, but at most 1e-3
    eps = np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps
    with np.errstate(over="ignore"):
        off = np.abs(rows.sum(axis=1) - 1)
        rounding = 8 * eps * np.abs(rows).sum(axis=1)
    if (off > np.minimum(1e-6 + rounding, 1e-3)).any():
        off = off.max()
        raise ValueError(
            f"coef must sum to 1 along the last axis, got a row that is off by {off:.2g}. Divide "
            f"by the sum, or add the pretrained weights as a checkpoint with the remaining "
            f"coefficient."
        )
    return rows


def accumulate(
    checkpoints: CheckpointCollection,
    coef: NDArray[np.float64],
    rows: Mapping[str, int],
    names: Collection[str],
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Read these tensors of all checkpoints once; return sums and the names of those that differ.

    ``coef`` is (n_layers, K). Sums are not cast; tensors that are equal everywhere are unchanged.
    Integers are compared only if they have two or more dimensions, because counters always differ.
    Adapters of one base are summed without the base.
    """
    used = [name for name, c in zip(checkpoints.names, coef.T, strict=True) if c.any()]
    adapters = checkpoints.on_one_base(used)
    on_base = {n for n in names if adapters and not any(n in a.whole for a in adapters.values())}
    found: dict[str, torch.Tensor] = {}
    differing: set[str] = set()
    if on_base:
        found, differing = _accumulate_on_base(checkpoints, adapters, coef, rows, on_base)
    dtypes = checkpoints.dtypes(used, [n for n in names if n not in on_base])
    # one row after the other, as the order in memory changes sums of numpy
    leader = int(np.cumsum(coef, axis=0)[-1].argmax())
    sums: dict[str, Sum] = {}
    tables: dict[str, torch.Tensor] = {}  # integer matrices of the first checkpoint
    for k, checkpoint in enumerate(checkpoints):
        if not coef[:, k].any() or not dtypes:
            continue
        with agreed(bool(checkpoints.rows)), checkpoints.open(checkpoint) as read:
            for name, dtype in dtypes.items():
                if not dtype.is_floating_point:
                    is_table = len(checkpoints.layout[name].shape) > 1
                    if k == leader or is_table:
                        w = read(name).clone()
                        if k == leader:
                            found[name] = w
                        if is_table and not same_bits(tables.setdefault(name, w), w):
                            differing.add(name)
                elif (c := float(coef[rows[name], k])) != 0.0:
                    if name in sums:
                        sums[name].add(read(name), c)
                    else:
                        sums[name] = Sum(read(name), c, dtype)
    differing |= {name for name, total in sums.items() if total.differs}
    if checkpoints.rows:  # rows that are equal here may differ on another rank
        differing = set[str]().union(*all_gather(differing))
        for name in differing & sums.keys():
            sums[name].spread()
    return {n: found.pop(n) if n in found else sums.pop(n).value for n in names}, differing


def _accumulate_on_base(
    checkpoints: CheckpointCollection,
    adapters: Mapping[str, LowRankCheckpoint],
    coef: NDArray[np.float64],
    rows: Mapping[str, int],
    names: AbstractSet[str],
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The same for adapters of one base: w_0, which is read once, plus the products."""
    differing = {n for n in names if any(n in one.ranks for one in adapters.values())}
    base = next(iter(adapters.values())).base
    with base.open() as read:
        mixed = {n: widened(read(n)) if n in differing else read(n).clone() for n in names}
    for name in names - differing:
        if mixed[name].isnan().any():
            raise CheckpointError(
                f"{base!r} can't be used: {name!r} holds NaN. Load the base that the adapters were "
                f"trained on."
            )
    for k, name in enumerate(checkpoints):
        if name in adapters:
            with checkpoints.open_factors(name) as (factors, _):
                for tensor in differing & adapters[name].ranks.keys():
                    c = float(coef[rows[tensor], k])
                    if c != 0.0 and (both := factors(tensor)) is not None:
                        both.add_to(mixed[tensor], c)
    return mixed, differing


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that floating tensors are converted to, given as such or by its name."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in (None, *DTYPES.values()) or (found is None and dtype is not None):
        raise ValueError(
            f"dtype={dtype!r} is unknown: expected {', '.join(map(repr, DTYPES))}, or None for "
            f"that of the checkpoints."
        )
    return found


def stored_dtypes(
    checkpoints: CheckpointCollection,
    coef: NDArray[np.float64],
    dtype: torch.dtype | None = None,
) -> dict[str, torch.dtype]:
    """The dtypes of a mix: ``dtype``, else promoted over the checkpoints with a coefficient."""
    used = [name for name, c in zip(checkpoints.names, coef.T, strict=True) if c.any()]
    stored = checkpoints.dtypes(used)
    if dtype is None:
        return stored
    return {name: dtype if found.is_floating_point else found for name, found in stored.items()}


def cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round once to the stored dtype; variances stay >= 0."""
    if is_variance(name) and value.is_floating_point():
        wide = value if value.dtype.itemsize > 1 else value.float()  # float8 has no clamp
        value = wide.clamp_(min=0)
    return value.to(dtype)


def _finished(name: str, value: torch.Tensor, dtype: torch.dtype, is_sum: bool) -> torch.Tensor:
    """`cast`, and check sums; tensors that all checkpoints share may be infinite."""
    stored = cast(name, value, dtype)
    if not dtype.is_floating_point or not value.numel():
        return stored
    if is_sum:
        check_range(name, value, dtype)
    elif value.dtype != dtype:
        wide = value if value.dtype.itemsize > 1 else value.float()  # float8 has no isfinite
        if (finite := wide[wide.isfinite()]).numel():
            check_range(name, finite, dtype)
    return stored


def check_range(name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise an error if a sum is not finite or is too large for its dtype."""
    # NaN propagates into both; 20 times faster than isfinite
    low, high = (float(end) for end in torch.aminmax(value))
    kind = torch.finfo(dtype)
    most = kind.max * (1 + kind.eps / 4)  # slightly larger numbers are rounded to the largest one
    if -most <= low and high <= most:
        return
    if math.isfinite(low) and math.isfinite(high):
        raise CheckpointError(
            f"The mix of {name!r} can't be stored: it reaches {max(-low, high):.6g}, but the "
            f"largest number in {dtype} is {kind.max:.6g}. Convert the checkpoints to a wider "
            f"dtype, pass dtype=, or use coefficients closer to [0, 1]."
        )
    raise CheckpointError(
        f"The mix of {name!r} holds NaN or infinite values, expected finite ones. Leave out "
        f"checkpoints that hold such values (collection.healthy() does), or use coefficients "
        f"closer to [0, 1]."
    )


class Sum:
    """sum_k c_k w_k, which starts only when two of the w_k differ; until then w_1 is kept."""

    __slots__ = ("coefs", "differs", "dtype", "value")

    def __init__(self, w: torch.Tensor, c: float, stored: torch.dtype) -> None:
        self.value = w.clone()
        self.coefs = [c]
        self.differs = False
        self.dtype = torch.float64 if stored == torch.float64 else torch.float32

    def add(self, w: torch.Tensor, c: float) -> None:
        if not self.differs:
            if same_values(self.value, w):
                self.coefs.append(c)
                return
            self.spread()
        self.value += w.to(self.dtype) * c  # two roundings: the product, then the sum

    def spread(self) -> None:
        """Start the sum with the tensors that were equal so far."""
        if self.differs:
            return
        self.differs = True
        first = self.value.to(self.dtype)
        self.value = first * self.coefs[0]
        for past in self.coefs[1:]:
            self.value += first * past
