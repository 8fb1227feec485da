"""The networks that benchmarks fine-tune, or take for their shapes."""

from __future__ import annotations

import torch
from torch import nn


class SmallViT(nn.Module):
    """A vision transformer on grey images, 8 x 8 digits unless told otherwise.

    With a token per pixel a weight meets 65 positions; patches of 2 x 2 learn faster.
    """

    def __init__(
        self, width: int = 64, depth: int = 3, patch: int = 1, dropout: float = 0.0, side: int = 8
    ) -> None:
        super().__init__()
        self.patch, self.side = patch, side
        self.embed = nn.Linear(patch**2, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=dropout, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def features(self, X: torch.Tensor) -> torch.Tensor:
        """Images -> (n, width)."""
        images = X.reshape(-1, 1, self.side, self.side)
        pixels = nn.functional.unfold(images, self.patch, stride=self.patch)
        tokens = self.embed(pixels.transpose(1, 2))  # (n, (side / patch)^2, width)
        tokens = torch.cat([self.token.expand(len(X), -1, -1), tokens], dim=1) + self.position
        return self.norm(self.blocks(tokens)[:, 0])

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(X))


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
