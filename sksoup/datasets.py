"""Small real zoos for demos and tests: one comes with the package, more are made in seconds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import get_data_home, load_digits
from torch import nn

from .checkpoints.collection import CheckpointCollection
from .checkpoints.texts import read_json
from .checkpoints.workplace import workplace
from .checkpoints.write import write_safetensors, write_text
from .exceptions import CheckpointError
from .runtime.random_state import preserved_random_state

__all__ = [
    "DigitsConvNet",
    "DigitsZoo",
    "FineTuning",
    "load_digits_checkpoints",
    "make_digits_checkpoints",
]

VERSION = 1  # raised whenever the same arguments would give another zoo
MANIFEST = "zoo.json"
REFERENCE = Path(__file__).parent / "reference_zoo"  # made by python -m benchmarks reference_zoo
REFERENCE_SEED = 0
DIGESTS = "SHA256SUMS"  # in the format of the command sha256sum
ORIGINALS = {"pretrain": 847, "finetune": 300, "val": 250, "test": 400}  # of 1797 images
VARIANTS = {"val": 4, "test": 5}  # shifted, noisy copies of each original
TARGET_NOISE, PRETRAIN_NOISE = 0.25, 0.1  # standard deviation, pixels are in [0, 1]


class DigitsConvNet(nn.Module):
    """A convolutional net for 8 x 8 digits: 3 convolutions with GroupNorm and a linear head.

    Takes rows of 64 pixels in [0, 1], float (n, 64), and gives logits, float (n, 10).

    Examples
    --------
    >>> import torch
    >>> from sksoup.datasets import DigitsConvNet
    >>> DigitsConvNet()(torch.zeros(2, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64 * 4 * 4, 10)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Compute logits.

        Parameters
        ----------
        X : Tensor of shape (n, 64)
            Pixels in [0, 1].

        Returns
        -------
        logits : Tensor of shape (n, 10)
            Unnormalized.
        """
        images = X.reshape(-1, 1, 8, 8)
        logits: torch.Tensor = self.head(self.features(images).flatten(1))
        return logits


@dataclass(frozen=True)
class FineTuning:
    """Hold the hyper-parameters one checkpoint was fine-tuned with.

    Parameters
    ----------
    lr : float
        Peak learning rate of AdamW with a one-cycle schedule.
    weight_decay : float
        Of AdamW.
    label_smoothing : float
        Of the cross-entropy.
    augmentation : float
        Standard deviation of noise added to every batch.
    epochs : int
        Passes over the fine-tuning rows.
    seed : int
        For the order of rows and the augmentation.

    Examples
    --------
    >>> from sksoup.datasets import FineTuning
    >>> FineTuning(1e-3, 0.1, 0.0, 0.2, 8, 0).epochs
    8
    """

    lr: float
    weight_decay: float
    label_smoothing: float
    augmentation: float
    epochs: int
    seed: int


@dataclass(frozen=True)
class DigitsZoo:
    """Hold a zoo of fine-tuned digit networks and the rows to soup and to test them with.

    Parameters
    ----------
    checkpoints : CheckpointCollection
        ``ft00``, ``ft01``, ... with `DigitsConvNet` as their module.
    X_val : ndarray of shape (1000, 64), float32
        Held-out rows of the target domain.
    y_val : ndarray of shape (1000,), int64
        Their digits.
    X_test : ndarray of shape (2000, 64), float32
        Test rows of the target domain.
    y_test : ndarray of shape (2000,), int64
        Their digits.
    fine_tunings : dict of str to FineTuning
        Hyper-parameters by checkpoint name.
    folder : Path
        Where the files are.

    Examples
    --------
    >>> from sksoup.datasets import DigitsZoo
    >>> [name for name in DigitsZoo.__dataclass_fields__][:3]
    ['checkpoints', 'X_val', 'y_val']
    """

    checkpoints: CheckpointCollection
    X_val: NDArray[np.float32]
    y_val: NDArray[np.int64]
    X_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    fine_tunings: dict[str, FineTuning]
    folder: Path


def load_digits_checkpoints(folder: str | os.PathLike[str] | None = None) -> DigitsZoo:
    """Load the reference zoo that comes with sksoup: 24 networks fine-tuned on digits.

    The files are the same on every machine, so that a demo gives the same results everywhere, up
    to the rounding of different processors. They are the checkpoints of
    ``make_digits_checkpoints(random_state=0)`` as one machine made them, with weights rounded to
    the precision of bfloat16 and stored as float32.

    Parameters
    ----------
    folder : str, path-like or None, default=None
        Where the checkpoints are copied to; files that are there already are not copied again.
        None opens them where the package is installed.

    Returns
    -------
    zoo : DigitsZoo
        24 checkpoints as a collection on disk, validation data (1000, 64) and test data (2000, 64),
        float32, and their labels. The files are opened for reading only.

    Raises
    ------
    CheckpointError
        A file differs from the published one (its SHA-256 is compared), or is missing.

    See Also
    --------
    make_digits_checkpoints : Fine-tune such a zoo on this machine, with any seed and size.

    Examples
    --------
    >>> from sksoup.datasets import load_digits_checkpoints
    >>> zoo = load_digits_checkpoints()
    >>> len(zoo.checkpoints), zoo.X_val.shape, zoo.X_test.shape
    (24, (1000, 64), (2000, 64))
    """
    root = REFERENCE if folder is None else Path(folder)
    if folder is not None:
        root.mkdir(parents=True, exist_ok=True)
    lines = (REFERENCE / DIGESTS).read_text(encoding="utf-8").splitlines()
    paths = {}
    for digest, file in map(str.split, lines):
        path = paths[Path(file).stem] = root / file
        if folder is not None and not path.exists():
            with workplace(path) as temporary:
                shutil.copyfile(REFERENCE / file, temporary)
                temporary.replace(path)
        _check_digest(path, digest)
    data = _digits(REFERENCE_SEED)
    return DigitsZoo(
        CheckpointCollection(paths, module=DigitsConvNet),
        *data["val"],
        *data["test"],
        fine_tunings={name: _draw(REFERENCE_SEED, k) for k, name in enumerate(paths)},
        folder=root,
    )


def _check_digest(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if found != expected:
        raise CheckpointError(
            f"{str(path)!r} is not the file of the reference zoo: got SHA-256 {found}, expected "
            f"{expected}. Give another folder, or install sksoup again."
        )


def make_digits_checkpoints(
    folder: str | os.PathLike[str] | None = None,
    n_checkpoints: int = 24,
    *,
    random_state: int = 0,
) -> DigitsZoo:
    """Make a small real zoo: one pretrained network, fine-tuned many times on digits.

    A `DigitsConvNet` is pretrained on clean and slightly shifted and noisy copies of 847 of
    scikit-learn's digits. From that start it is fine-tuned ``n_checkpoints`` times on 300 other
    digits of a harder target domain (shifted by up to a pixel each way, noise of standard
    deviation 0.25), with random learning rate (log-uniform in 5e-4 to 6e-3), weight decay,
    label smoothing, augmentation, epochs and seed. Held-out rows are 4 variants each of 250 other
    digits, test rows 5 variants each of 400 others, all from the target domain.

    Parameters
    ----------
    folder : str, path-like or None, default=None
        Where the checkpoints go, and where they are found again the next time; None is a folder
        below scikit-learn's data home (``sklearn.datasets.get_data_home``).
    n_checkpoints : int, default=24
        How many fine-tunings; a smaller zoo is the beginning of a larger one.
    random_state : int, default=0
        Seeds everything; global random state stays as it is.

    Returns
    -------
    zoo : DigitsZoo
        The checkpoints as a collection on disk, held-out rows (1000, 64) and test rows (2000, 64),
        float32, and their labels.

    Raises
    ------
    ValueError
        ``n_checkpoints`` is below 1.
    CheckpointError
        The folder holds checkpoints of something else; nothing is written.

    Notes
    -----
    Takes about 0.4 s per checkpoint on two cores. Every file is written whole or not at all: a run
    that was interrupted continues where it stopped. Each original digit is in one part only. The
    same arguments give the same data anywhere, and the same weights for the same number of torch
    threads and build.

    See Also
    --------
    load_digits_checkpoints : The same zoo with files that are the same on every machine.

    References
    ----------
    Wortsman et al., *Model soups*, ICML 2022, arXiv:2203.05482, Appendix J (the random search).

    Examples
    --------
    >>> from sksoup.datasets import make_digits_checkpoints
    >>> zoo = make_digits_checkpoints(n_checkpoints=24)  # doctest: +SKIP
    >>> zoo.checkpoints  # doctest: +SKIP
    CheckpointCollection(24 checkpoints, 14 tensors, 265,256 bytes each, on disk)
    """
    if not isinstance(n_checkpoints, Integral) or n_checkpoints < 1:
        raise ValueError(f"n_checkpoints must be an integer >= 1, got {n_checkpoints!r}.")
    root = Path(folder or Path(get_data_home()) / "sksoup" / f"digits-{random_state}")
    _claim(root, random_state)
    data = _digits(random_state)
    tunings = {f"ft{k:02d}": _draw(random_state, k) for k in range(n_checkpoints)}
    paths = {name: root / f"{name}.safetensors" for name in tunings}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        start = _pretrained(root, data, random_state)
        for name in missing:
            net = _new_net(0)
            net.load_state_dict(start)
            write_safetensors(paths[name], _train(net, *data["finetune"], tunings[name]))
    return DigitsZoo(
        CheckpointCollection(paths, module=DigitsConvNet),
        *data["val"],
        *data["test"],
        fine_tunings=tunings,
        folder=root,
    )


def _claim(root: Path, random_state: int) -> None:
    """Write the manifest to the folder; raise an error if it holds anything else."""
    root.mkdir(parents=True, exist_ok=True)
    manifest = {"zoo": "digits", "version": VERSION, "random_state": random_state}
    path = root / MANIFEST
    try:
        found = read_json(path, 1 << 20) if path.exists() else None
    except CheckpointError:
        found = "an unreadable manifest"
    if found is None and not any(root.glob("*.safetensors")):
        write_text(path, json.dumps(manifest))
    elif found != manifest:
        raise CheckpointError(
            f"{str(root)!r} already holds something else: got "
            f"{found or 'checkpoints of unknown origin'}, expected {manifest}. Give another "
            f"folder, or empty this one."
        )


def _digits(random_state: int) -> dict[str, tuple[Any, Any]]:
    """X (n, 64) float32 and y (n,) int64 of each part; the originals are split before anything."""
    rng = np.random.default_rng(random_state)
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)  # (1797, 8, 8)
    order = rng.permutation(len(images))
    parts = np.split(order, np.cumsum(list(ORIGINALS.values()))[:-1])
    data = {}
    for name, rows in zip(ORIGINALS, parts, strict=True):
        X, y = images[rows], digits.target[rows].astype(np.int64)
        if name == "pretrain":
            copies = [_distorted(X, PRETRAIN_NOISE, rng) for _ in range(3)]
            data[name] = np.concatenate([X.reshape(-1, 64), *copies]), np.tile(y, 4)
        else:
            n = VARIANTS.get(name, 1)
            X = _distorted(np.repeat(X, n, axis=0), TARGET_NOISE, rng)
            data[name] = X, np.repeat(y, n)
    return data


def _distorted(
    images: NDArray[np.float32], noise: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Shift each image by -1, 0 or 1 pixel both ways and add noise: (n, 8, 8) -> (n, 64)."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
    down, right = rng.integers(0, 3, size=(2, len(images)))
    shifted = windows[np.arange(len(images)), down, right]
    noisy = np.clip(shifted + rng.normal(0, noise, size=shifted.shape), 0, 1)
    rows: NDArray[np.float32] = noisy.reshape(len(images), 64).astype(np.float32)
    return rows


def _draw(random_state: int, k: int) -> FineTuning:
    """Hyper-parameters of the k-th fine-tuning, whatever the number of them."""
    rng = np.random.default_rng([random_state, k])
    return FineTuning(
        lr=float(np.exp(rng.uniform(np.log(5e-4), np.log(6e-3)))),
        weight_decay=float(10 ** rng.uniform(-4, -1)),
        label_smoothing=float(rng.choice([0.0, 0.05, 0.1])),
        augmentation=float(rng.choice([0.0, 0.05, 0.1, 0.2])),
        epochs=int(rng.integers(4, 16)),
        seed=int(rng.integers(2**31)),
    )


def _pretrained(
    root: Path, data: dict[str, tuple[Any, Any]], random_state: int
) -> dict[str, torch.Tensor]:
    """The start of all fine-tunings, made once and kept beside them."""
    path = root / "start.safetensors"
    if not path.exists():
        settings = FineTuning(3e-3, 1e-2, 0.0, 0.0, 8, random_state)
        write_safetensors(path, _train(_new_net(random_state), *data["pretrain"], settings))
    return CheckpointCollection([path])["start"]


def _new_net(seed: int) -> DigitsConvNet:
    with preserved_random_state():
        torch.manual_seed(seed)
        return DigitsConvNet()


def _train(
    net: DigitsConvNet, X: NDArray[np.float32], y: NDArray[np.int64], how: FineTuning
) -> dict[str, torch.Tensor]:
    """Train with AdamW and a one-cycle schedule, in batches of 64; returns the weights."""
    generator = torch.Generator().manual_seed(how.seed)
    inputs, targets = torch.as_tensor(X), torch.as_tensor(y)
    criterion = nn.CrossEntropyLoss(label_smoothing=how.label_smoothing)
    optimizer = torch.optim.AdamW(net.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    n_steps = how.epochs * -(-len(X) // 64)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.lr, total_steps=n_steps, pct_start=0.2
    )
    net.train()
    for _ in range(how.epochs):
        for rows in torch.split(torch.randperm(len(X), generator=generator), 64):
            batch = inputs[rows]
            noise = how.augmentation * torch.randn(batch.shape, generator=generator)
            loss = criterion(net((batch + noise).clamp(0, 1)), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return net.state_dict()
