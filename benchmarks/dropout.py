"""Dropout off or on while the coefficients are searched: why it is off.

    python -m benchmarks dropout [--seeds 0 1 2] [--checkpoints 12] [--rate 0.1]

Small vision transformers with dropout are fine-tuned on digits; MEHL-Soup+ and Learned-Soup+ search
coefficients with dropout off (the default) and on (in steps that need a gradient, by ``forward=``).
Held-out rows choose, test rows report; the loss is that of the soup, without dropout.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.metrics import log_loss
from torch import nn

from sksoup import SoupWarning
from sksoup.datasets import _digits
from sksoup.inspection import paper_systems

from .networks import SmallViT
from .zoo import fine_tune

SYSTEMS = ("Learned-Soup+", "MEHL-Soup+")


def with_dropout(module: nn.Module, X: torch.Tensor) -> Any:
    """Drop units wherever a gradient is wanted."""
    module.train(torch.is_grad_enabled())
    try:
        return module(X)
    finally:
        module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.1)
    options = parser.parse_args()
    warnings.simplefilter("ignore", SoupWarning)
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for seed in options.seeds:
        data = _digits(seed)
        with tempfile.TemporaryDirectory() as folder:
            build = partial(SmallViT, 64, 3, 2, options.rate)
            checkpoints = fine_tune(Path(folder), options.checkpoints, seed, build, 60)
            systems = paper_systems(options.checkpoints, random_state=0)
            for name in SYSTEMS:
                for dropout, forward in (("off", None), ("on", with_dropout)):
                    soup = clone(systems[name]).set_params(forward=forward)
                    soup.fit(checkpoints, *data["val"])
                    losses = [
                        log_loss(data[part][1], soup.predict_proba(data[part][0]))
                        for part in ("val", "test")
                    ]
                    accuracy = 100 * soup.score(*data["test"])
                    found.setdefault((name, dropout), []).append((*losses, accuracy))
        print(f"seed {seed} done", flush=True)
    print(f"seeds {options.seeds}, {options.checkpoints} checkpoints, dropout {options.rate}")
    print(f"{'':16}{'dropout':>8}{'held-out loss':>15}{'test loss':>11}   test accuracy, %")
    for (name, dropout), rows in found.items():
        held_out, test, accuracy = np.mean(rows, axis=0)
        spread = statistics.stdev(row[2] for row in rows) if len(rows) > 1 else 0.0
        each = " ".join(f"{row[2]:.2f}" for row in rows)
        print(f"{name:16}{dropout:>8}{held_out:15.4f}{test:11.4f}   {accuracy:.2f} +- {spread:.2f} "
              f"({each})")  # fmt: skip


if __name__ == "__main__":
    main()
