"""The papers' own experiment: 72 published CLIP ViT-B/32 fine-tuned on ImageNet.

    python -m benchmarks paper.clip_imagenet --checkpoints soups --imagenet imagenet --out clip
    python -m benchmarks paper.clip_imagenet --try clip-try   # random weights, generated images

``soups`` holds model_0.pt ... model_71.pt of github.com/mlfoundations/model-soups (release v0.0.2,
33 GB), ``imagenet`` the folders train and val of ILSVRC 2012 with a folder per class. The held-out
rows have to be those that no fine-tuning saw: give that repository's imagenet_98_idxs.npy by
--held-out. Images are decoded once, to arrays of bytes under --out (held-out 4 GB, test 7.5 GB).
Interrupted, it goes on where it was. docs/clip.rst has the commands one by one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sksoup import CheckpointCollection
from sksoup.inspection import paper_systems

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PAPER = {"Best checkpoint": 80.38, "Uniform-Soup": 79.97, "Greedy-Soup": 81.03,
         "Learned-Soup": 80.88, "Learned-Soup+": 81.39, "HL-Soup": 81.14, "HL-Soup+": 81.45,
         "MEHL-Soup": 81.20, "MEHL-Soup+": 81.62, "Ensemble": 81.19}  # fmt: skip


# ------------------------------------------------------------------ the model


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A pre-norm transformer block, its tensors named as in OpenAI's CLIP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = self.ln_1(x)
        x = x + self.attn(normal, normal, normal, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    def __init__(self, size: int, patch: int, width: int, depth: int, n_features: int) -> None:
        super().__init__()
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        n_tokens = (size // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(n_tokens, width))
        self.proj = nn.Parameter(scale * torch.randn(width, n_features))
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(
            *(Block(width, width // 64) for _ in range(depth))
        )
        self.ln_post = nn.LayerNorm(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.conv1(images).flatten(2).transpose(1, 2)  # (n, tokens, width)
        first = self.class_embedding.expand(len(images), 1, -1)
        tokens = self.ln_pre(torch.cat([first, tokens], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer.resblocks(tokens)[:, 0]) @ self.proj


class ClipClassifier(nn.Module):
    """CLIP's image tower and a linear head on unit features, as the published files hold it.

    They also hold what is left of the text tower, which no image passes through.
    """

    def __init__(
        self, size: int = 224, patch: int = 32, width: int = 768, depth: int = 12,
        n_features: int = 512, n_classes: int = 1000, n_words: int = 49408,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = nn.Module()
        self.model.visual = VisionTransformer(size, patch, width, depth, n_features)
        self.model.positional_embedding = nn.Parameter(torch.zeros(77, n_features))
        self.model.text_projection = nn.Parameter(torch.zeros(n_features, n_features))
        self.model.logit_scale = nn.Parameter(torch.zeros(()))
        self.model.token_embedding = nn.Embedding(n_words, n_features)
        self.model.ln_final = nn.LayerNorm(n_features)
        self.classification_head = nn.Linear(n_features, n_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.model.visual(images)
        return self.classification_head(features / features.norm(dim=-1, keepdim=True))


class FromBytes:
    """Call a module with images (n, 3, size, size) in bytes: a quarter of the memory."""

    def __call__(self, module: nn.Module, X: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(MEAN, device=X.device).view(3, 1, 1)
        std = torch.tensor(STD, device=X.device).view(3, 1, 1)
        return module((X.float() / 255 - mean) / std)


# ------------------------------------------------------------------- the data


def list_images(folder: Path) -> tuple[list[Path], np.ndarray]:
    """All images in folders of their classes, in the order of torchvision's ImageFolder."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise SystemExit(f"{folder} has no folders: expected one per class, such as n01440764.")
    paths, labels = [], []
    for label, one in enumerate(classes):
        found = sorted(p for p in one.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg", ".png"))
        paths += found
        labels += [label] * len(found)
    return paths, np.asarray(labels)


def decode(path: Path, size: int) -> np.ndarray:
    """(3, size, size) bytes: the shorter side resized, bicubic, and the center cut out."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    cut = image.crop((left, top, left + size, top + size))
    return np.asarray(cut).transpose(2, 0, 1)


def decoded(
    name: str, paths: Sequence[Path], labels: np.ndarray, size: int, out: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Images as a memory-mapped array, decoded the first time."""
    target = out / f"{name}.npy"
    if not target.exists():
        images = np.lib.format.open_memmap(
            target.with_suffix(".part"), "w+", np.uint8, (len(paths), 3, size, size)
        )
        for start in range(0, len(paths), 1024):
            some = paths[start : start + 1024]
            images[start : start + len(some)] = Parallel(n_jobs=-1, prefer="threads")(
                delayed(decode)(path, size) for path in some
            )
            print(f"  {name}: {start + len(some):,} of {len(paths):,} images", flush=True)
        images.flush()
        target.with_suffix(".part").rename(target)
    images = np.load(target, mmap_mode="c")
    if len(images) != len(labels):
        raise SystemExit(f"{target} holds {len(images)} images, expected {len(labels)}: delete it.")
    return images, labels


def held_out_rows(labels: np.ndarray, index: Path | None) -> np.ndarray:
    """Rows of the training images to choose by: the published ones, else 26 of each class."""
    if index is None:
        print("No --held-out: 26 of each class are drawn. The published fine-tunings were trained "
              "on most of them, so that scores on them are optimistic.")  # fmt: skip
        rng = np.random.default_rng(0)
        classes = (np.flatnonzero(labels == label) for label in np.unique(labels))
        return np.sort(np.concatenate([rng.permutation(rows)[:26] for rows in classes]))
    flags = np.load(index)
    if len(flags) != len(labels):
        raise SystemExit(f"{index} is for {len(flags):,} images, found {len(labels):,}.")
    return np.flatnonzero(flags)


# --------------------------------------------------------------- the experiment


def run(
    checkpoints: CheckpointCollection,
    val: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    options: argparse.Namespace,
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    systems = paper_systems(len(checkpoints), random_state=0)
    for name in options.systems or systems:
        soup = systems[name]
        params = {"forward": FromBytes(), "batch_size": options.batch_size,
                  "device": options.device, "memory": str(options.out / "memory"),
                  "precision": options.precision, "max_epochs": options.max_epochs}  # fmt: skip
        if options.as_published and name.startswith(("HL", "MEHL")):
            params |= {"normalize": True, "lr": 0.01}
        soup.set_params(**{k: v for k, v in params.items() if k in soup.get_params()})
        begin = time.perf_counter()
        soup.fit(checkpoints, *val)
        seconds = time.perf_counter() - begin
        results[name] = {
            "held_out": 100 * soup.score(*val),
            "test": 100 * soup.score(*test),
            "paper": PAPER[name],
            "seconds": seconds,
            "passes": soup.counts_.rows_forward / len(val[1]),
        }
        print(f"{name:16} held-out {results[name]['held_out']:6.2f}  test "
              f"{results[name]['test']:6.2f}  paper {PAPER[name]:6.2f}  {seconds:8.1f} s",
              flush=True)  # fmt: skip
        if name != "Ensemble":
            soup.save(options.out / f"{name}.safetensors")
            soup.report(options.out / f"{name}.html")
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def make_try(folder: Path, n: int, **size: int) -> None:
    """Random weights around one start, and images of noise, as the real ones lie in folders."""
    if (folder / "imagenet").exists():
        return
    torch.manual_seed(0)
    start = ClipClassifier(**size).state_dict()
    soups, rng = folder / "soups", np.random.default_rng(0)
    soups.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        moved = ("visual", "classification_head")
        state = {
            name: w + 0.02 * torch.randn_like(w) if any(m in name for m in moved) else w.clone()
            for name, w in start.items()
        }
        if k % 2:  # the published files are .pt
            save_file(state, soups / f"model_{k}.safetensors")
        else:
            torch.save(state, soups / f"model_{k}.pt")
    for part, each in (("train", 8), ("val", 4)):
        for label in range(4):
            here = folder / "imagenet" / part / f"n{label:08d}"
            here.mkdir(parents=True, exist_ok=True)
            for i in range(each):
                shape = (int(rng.integers(180, 300)), int(rng.integers(180, 300)), 3)
                noise = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(noise).save(here / f"{i}.JPEG")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, help="folder of model_0.pt ...")
    parser.add_argument("--imagenet", type=Path, help="folder with train and val")
    parser.add_argument("--held-out", type=Path, help="imagenet_98_idxs.npy")
    parser.add_argument("--out", type=Path, default=Path("clip"))
    parser.add_argument("--systems", nargs="+", choices=list(PAPER), help="by default all ten")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-epochs", type=int, default=5)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--as-published", action="store_true",
                        help="unit deltas and lr 0.01, as in the authors' code")  # fmt: skip
    parser.add_argument("--try", dest="try_in", type=Path, metavar="FOLDER",
                        help="4 random checkpoints and 48 generated images instead")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="with --try: a tiny tower")
    options = parser.parse_args(arguments)
    if options.try_in is None and not (options.checkpoints and options.imagenet):
        parser.error("give --checkpoints and --imagenet, or --try")
    return options


SMALL = {"size": 32, "patch": 16, "width": 64, "depth": 2, "n_features": 16, "n_classes": 4,
         "n_words": 10}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    size: dict[str, int] = SMALL if options.small else {}
    if options.try_in is not None:
        make_try(options.try_in, 4, **size)
        options.checkpoints = options.try_in / "soups"
        options.imagenet = options.try_in / "imagenet"
        options.out = options.try_in / "out"
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoints = CheckpointCollection.from_path(
        options.checkpoints, module=lambda: ClipClassifier(**size)
    )
    print(checkpoints.describe())
    paths, labels = list_images(options.imagenet / "train")
    rows = held_out_rows(labels, options.held_out)
    pixels = size.get("size", 224)
    val = decoded("held-out", [paths[i] for i in rows], labels[rows], pixels, options.out)
    test = decoded("test", *list_images(options.imagenet / "val"), pixels, options.out)
    return run(checkpoints, val, test, options)


if __name__ == "__main__":
    main()
