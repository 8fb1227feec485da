"""Held-out rows that are read by index, against the floor: walking the loader, and stepping.

    python -m benchmarks held_out [--rows 3000] [--workers 0] [--turns 3]

Images of 3 x 64 x 64 bytes in a file, of which none is kept. The floor is one walk for the labels
and, for each epoch, a walk in a random order with a forward and a backward pass of each minibatch;
the fit is MEHL-Soup's search in the paper's form. Both in one process, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sksoup import CheckpointCollection, MEHLSoup
from sksoup.data import loaders

EPOCHS, BATCH, K = 3, 128, 4


class Images(Dataset[Any]):
    """Images in a file of bytes, as floats, and their labels."""

    def __init__(self, path: Path) -> None:
        self.images = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[index].copy()).float() / 255, index % 10


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def floor(rows: Images, n_workers: int) -> float:
    """Seconds to walk for the labels, then to walk and step."""
    begin, net = time.perf_counter(), build().eval()
    labels = torch.cat([y for _, y in DataLoader(rows, batch_size=256, num_workers=n_workers)])
    for epoch in range(EPOCHS):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        parts: Any = [part.tolist() for part in order.split(BATCH)]
        loader = DataLoader(rows, batch_sampler=parts, num_workers=n_workers)
        for (X, _), part in zip(loader, parts, strict=True):
            net.zero_grad(set_to_none=False)
            nn.functional.cross_entropy(net(X), labels[part]).backward()
    return time.perf_counter() - begin


def fit(rows: Images, n_workers: int) -> float:
    """Seconds of a fit that keeps no row."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = build().state_dict()
        states = [{n: w + 0.01 * torch.randn_like(w) for n, w in start.items()} for _ in range(K)]
    ckpts = CheckpointCollection(states, module=build)
    soup = MEHLSoup(center="mean", clip_deltas=None, weight_decay=0, max_epochs=EPOCHS,
                    batch_size=BATCH, model_batch_size=K, random_state=0)  # fmt: skip
    begin = time.perf_counter()
    soup.fit(ckpts, DataLoader(rows, num_workers=n_workers, batch_size=256))
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaders.free_bytes = lambda device: 0  # no row is kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        rng = np.random.default_rng(0)
        np.save(path, rng.integers(0, 256, (options.rows, 3, 64, 64), dtype=np.uint8))
        rows = Images(path)
        fit(rows, options.workers)  # torch imports its compiler once
        turns = [(floor(rows, options.workers), fit(rows, options.workers))
                 for _ in range(options.turns)]  # fmt: skip
    ratio = statistics.median(took / least for least, took in turns)
    least = statistics.median(least for least, _ in turns)
    print(f"{options.rows} rows, {EPOCHS} epochs, {options.workers} workers")
    print(f"floor {least:.2f} s, the fit takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
