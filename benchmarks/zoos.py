"""Checkpoints and rows for measuring cost: their shapes matter, not what they know."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from sksoup import CheckpointCollection
from sksoup.checkpoints.read import write_safetensors
from sksoup.checkpoints.sources import preserved_random_state
from sksoup.datasets import FineTuning, _digits, _draw, _train


class SmallViT(nn.Module):
    """A vision transformer on 8 x 8 digits.

    With a token per pixel a weight meets 65 positions; patches of 2 x 2 learn faster.
    """

    def __init__(
        self, width: int = 64, depth: int = 3, patch: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch**2, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 64 // patch**2 + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=dropout, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        pixels = nn.functional.unfold(X.reshape(-1, 1, 8, 8), self.patch, stride=self.patch)
        tokens = self.embed(pixels.transpose(1, 2))  # (n, 64 / patch^2, width)
        tokens = torch.cat([self.token.expand(len(X), -1, -1), tokens], dim=1) + self.position
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return (X + self.body(X)).relu()


class SmallResNet(nn.Module):
    """A residual network with BatchNorm for 8 x 8 digits, rows of 64 pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(
            ResidualBlock(width), ResidualBlock(width), nn.MaxPool2d(2), ResidualBlock(width)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        images = self.stem(X.reshape(-1, 1, 8, 8)).relu()
        return self.head(self.blocks(images).mean(dim=(2, 3)))


class MLP(nn.Module):
    """Each weight meets one position per row: combining is as much work as a step."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10),
        )  # fmt: skip

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.layers(X)


class ClipSized(nn.Module):
    """CLIP's ViT-B/32 image tower (87M parameters, random weights) and a head for 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        config = CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, image_size=224, patch_size=32,
        )  # fmt: skip
        self.tower = CLIPVisionModel(config)
        self.head = nn.Linear(768, 1000)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(pixel_values=X).pooler_output)


@dataclass(frozen=True)
class Kind:
    module: type[nn.Module]
    image: tuple[int, ...]
    n_classes: int


KINDS = {
    "vit": Kind(SmallViT, (1, 8, 8), 10),
    "mlp": Kind(MLP, (1, 8, 8), 10),
    "clip": Kind(ClipSized, (3, 224, 224), 1000),
}


def make_checkpoints(folder: Path, kind: str, n: int) -> None:
    """Write n checkpoints around one random start, as far from it as fine-tuning goes."""
    with preserved_random_state():
        torch.manual_seed(0)
        start = KINDS[kind].module().state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        generator = torch.Generator().manual_seed(k + 1)
        state = {
            name: w + 0.02 * torch.randn(w.shape, generator=generator) / math.sqrt(w.shape[-1] or 1)
            if w.is_floating_point() and w.ndim
            else w
            for name, w in start.items()
        }
        save_file(state, folder / f"ft{k:02d}.safetensors")


def fine_tune_vits(folder: Path, n: int, seed: int) -> CheckpointCollection:
    """Pretrain a small vision transformer on digits and fine-tune it n times."""
    return fine_tune(folder, n, seed, partial(SmallViT, 64, 3, 2), epochs=60)


def fine_tune(
    folder: Path, n: int, seed: int, build: Callable[[], nn.Module], epochs: int
) -> CheckpointCollection:
    """Pretrain a network on digits and fine-tune it n times, as the networks of `DigitsZoo` are.

    With half of their learning rates, and more pretraining.
    """
    drawn = [_draw(seed, k) for k in range(n)]
    tunings = {f"ft{k:02d}": replace(how, lr=how.lr / 2) for k, how in enumerate(drawn)}
    return fine_tune_each(folder, tunings, seed, build, epochs)


def fine_tune_each(
    folder: Path,
    tunings: Mapping[str, FineTuning],
    seed: int,
    build: Callable[[], nn.Module],
    epochs: int,
) -> CheckpointCollection:
    """Fine-tune one pretrained start in each of these ways; what is in the folder is kept."""
    paths = {name: folder / f"{name}.safetensors" for name in tunings}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        data, start = _digits(seed), folder / "start.safetensors"
        with preserved_random_state():
            torch.manual_seed(seed)
            net = build()
        if not start.exists():
            how = FineTuning(3e-3, 1e-2, 0.0, 0.2, epochs, seed)
            write_safetensors(start, _train(net, *data["pretrain"], how))
        for name in missing:
            net.load_state_dict(CheckpointCollection([start])["start"])
            write_safetensors(paths[name], _train(net, *data["finetune"], tunings[name]))
    return CheckpointCollection(paths, module=build)


def make_rows(kind: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the right shape: digits where they are 8 x 8, noise elsewhere."""
    if KINDS[kind].image == (1, 8, 8):
        digits = load_digits()
        rows = torch.arange(n) % len(digits.target)
        images = torch.as_tensor(digits.images / 16, dtype=torch.float32)[rows, None]
        return images, torch.as_tensor(digits.target)[rows]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((n, *KINDS[kind].image), generator=generator)
    return images, torch.randint(KINDS[kind].n_classes, (n,), generator=generator)
