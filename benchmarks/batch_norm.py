"""All ten systems on a ResNet with BatchNorm, its statistics mixed or measured anew.

    python benchmarks/batch_norm.py [--seeds 0 1 2] [--checkpoints 16]

A small residual network is pretrained on digits and fine-tuned from there on shifted, noisy ones,
with random hyper-parameters; held-out rows choose, test rows report. Every system that makes a soup
is fitted under both policies.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path

import zoos
from sklearn.base import clone

from sksoup import SoupWarning
from sksoup.datasets import _digits
from sksoup.inspection import paper_systems


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=15, help="of pretraining")
    options = parser.parse_args()
    warnings.simplefilter("ignore", SoupWarning)  # a greedy soup of one
    scores: dict[tuple[str, str], list[float]] = {}
    for seed in options.seeds:
        data = _digits(seed)
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = zoos.fine_tune(
                Path(folder), options.checkpoints, seed, zoos.SmallResNet, options.epochs
            )
            for name, system in paper_systems(options.checkpoints, random_state=0).items():
                for policy in ("average", "recalibrate"):
                    soup = clone(system)
                    if "batch_norm" in soup.get_params():
                        soup.set_params(batch_norm=policy)
                    elif policy != "average":
                        continue
                    soup.fit(checkpoints, *data["val"])
                    found = 100 * soup.score(*data["test"])
                    scores.setdefault((name, policy), []).append(found)
        print(f"seed {seed} done", flush=True)
    print(f"test accuracy, %; seeds {options.seeds}, {options.checkpoints} checkpoints")
    names = list(dict.fromkeys(name for name, _ in scores))
    print(f"{'':18}" + "".join(f"{policy:>36}" for policy in ("average", "recalibrate")))
    for name in names:
        cells = []
        for policy in ("average", "recalibrate"):
            found = scores.get((name, policy))
            if found is None:
                cells.append("")
                continue
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            each = " ".join(f"{score:.2f}" for score in found)
            cells.append(f"{statistics.mean(found):.2f} +- {spread:.2f} ({each})")
        print(f"{name:18}" + "".join(f"{cell:>36}" for cell in cells).rstrip())


if __name__ == "__main__":
    main()
