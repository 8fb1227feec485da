"""What ``memory=`` costs while a search runs, and what a replay costs.

    python -m benchmarks resume [--turns 5] [--checkpoints 24]

MEHL-Soup+ and Greedy-Soup on small vision transformers (for greedy 16 real fine-tunings): fits with
a fresh memory and without one take turns in one process; then a finished fit is replayed. "of the
fit" is the median over the turns of the seconds spent finding and keeping, as part of the fit they
belong to; "x without" is the ratio of whole fits, which the machine's noise blurs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sklearn.base import clone

from sksoup import CheckpointCollection, GreedySoup, MEHLSoup
from sksoup.datasets import _digits
from sksoup.runtime.cache import Cache
from sksoup.runtime.entries import SUFFIX

from .networks import SmallViT
from .zoo import fine_tune_vits, make_checkpoints, make_rows


class Timed:
    """Sums the seconds that `Cache` takes."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def wrap(self, method: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin
                self.calls += 1

        return timed


def seconds(soup: Any, *args: Any) -> float:
    begin = time.perf_counter()
    soup.fit(*args)
    return time.perf_counter() - begin


def measure(name: str, soup: Any, turns: int, *args: Any) -> None:
    seconds(clone(soup), *args)  # warm up
    shares, ratios, replays = [], [], []
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as memory:
            timed = Timed()
            kept = clone(soup).set_params(memory=memory)
            plain = seconds(clone(soup), *args)
            names = ("find", "keep", "within")
            patches = [patch.object(Cache, n, timed.wrap(getattr(Cache, n))) for n in names]
            for one in patches:
                one.start()
            whole = seconds(kept, *args)
            for one in patches:
                one.stop()
            shares.append(timed.seconds / whole)
            ratios.append(whole / plain)
            again = clone(kept)
            replays.append(seconds(again, *args) / plain)
            size = sum(path.stat().st_size for path in Path(memory).rglob(f"*{SUFFIX}"))
            n = len(list(Path(memory).rglob(f"*{SUFFIX}")))
            passes = again.counts_.n_forward + again.counts_.n_backward
    print(
        f"{name:12}{100 * statistics.median(shares):11.2f} %{statistics.median(ratios):14.3f}"
        f"{statistics.median(replays):10.3f}{passes:9}{n:9}{size:12,}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--checkpoints", type=int, default=24)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("              of the fit   x without   replay   passes  entries       bytes")
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoints(Path(folder) / "vit", "vit", options.checkpoints)
        files = CheckpointCollection.from_path(Path(folder) / "vit", module=SmallViT)
        X, y = make_rows("vit", 256)
        soup = MEHLSoup(
            layerwise=True,
            model_batch_size=6,
            max_epochs=5,
            batch_size=128,
            random_state=0,
            center="mean",
            clip_deltas=None,
            weight_decay=0.0,
        )
        measure("MEHL-Soup+", soup, options.turns, files, X, y)
        tuned = fine_tune_vits(Path(folder) / "tuned", 16, 0)
        measure("Greedy-Soup", GreedySoup(), options.turns, tuned, *_digits(0)["val"])


if __name__ == "__main__":
    main()
