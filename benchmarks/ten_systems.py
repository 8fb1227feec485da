"""All ten systems on the digits zoo, over several seeds: mean and spread of the test accuracy.

Each seed makes its own split of the digits, its own pretrained start and its own fine-tunings.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from sksoup.datasets import make_digits_checkpoints
from sksoup.inspection import compare_soups, paper_systems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-checkpoints", type=int, default=24)
    options = parser.parse_args()
    scores: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            zoo = make_digits_checkpoints(Path(folder), options.n_checkpoints, random_state=seed)
            comparison = compare_soups(
                zoo.checkpoints,
                zoo.X_val,
                zoo.y_val,
                zoo.X_test,
                zoo.y_test,
                recipes=paper_systems(options.n_checkpoints, random_state=seed),
            )
        print(f"seed {seed}\n{comparison}\n", flush=True)
        for result in comparison.results:
            scores.setdefault(result.system, []).append(100 * result.test)
    print(f"test accuracy, %, over {options.seeds} seeds: mean, standard deviation, each seed")
    for system, values in scores.items():
        each = "  ".join(f"{value:.2f}" for value in values)
        print(f"{system:16s} {np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}   {each}")


if __name__ == "__main__":
    main()
