"""Whether the background reader hides loading, on a disk as slow as we say.

    python -m benchmarks reading [--checkpoints 24] [--model-batch 6]

A simulated disk serves one file at a time at a given rate and keeps the last few files cached, as
the operating system does with a collection larger than memory. Its rate is set so that reading the
model batches takes a quarter of, as long as, and twice as long as computing on them. For each, with
and without reader, the search (all model batches; not the mean and the final mix, which have
nothing to hide behind) is compared with max(compute, read) x 1.1 + the read of one model batch.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sksoup import CheckpointCollection, MEHLSoup

from .networks import SmallViT
from .zoo import make_checkpoints, make_rows


class SlowDisk:
    """Serves files in the order they are asked for; remembers the last ``capacity`` of them."""

    def __init__(self, seconds_per_file: float, capacity: int) -> None:
        self.seconds = seconds_per_file
        self.capacity = capacity
        self._cache: OrderedDict[str, Future[None]] = OrderedDict()
        self._lock = threading.Lock()
        self._disk = ThreadPoolExecutor(1)

    def ask(self, name: str) -> Future[None]:
        """Begin to read a file that is not in the cache."""
        with self._lock:
            if name not in self._cache:
                self._cache[name] = self._disk.submit(time.sleep, self.seconds)
                while len(self._cache) > self.capacity:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(name)
            return self._cache[name]

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Have every checkpoint lie on this disk."""
        open_file = CheckpointCollection.open

        def slow_open(collection: CheckpointCollection, name: str) -> Any:
            self.ask(name).result()
            return open_file(collection, name)

        def warm(_: CheckpointCollection, name: str) -> None:
            self.ask(name)

        with (
            patch.object(CheckpointCollection, "open", slow_open),
            patch.object(CheckpointCollection, "warm", warm),
        ):
            yield
        self._disk.shutdown()


def search_seconds(fit: Callable[[], Any]) -> float:
    """Seconds of the search over model batches within a fit."""
    spent = 0.0
    descend = MEHLSoup._block_coordinate_descent

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        begin = time.perf_counter()
        found = descend(*args, **kwargs)
        spent += time.perf_counter() - begin
        return found

    with patch.object(MEHLSoup, "_block_coordinate_descent", timed):
        fit()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=24, help="K")
    parser.add_argument("--model-batch", type=int, default=6, help="b")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    K, b = options.checkpoints, options.model_batch
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoints(Path(folder), "vit", K)
        paths = sorted(Path(folder).iterdir())
        X, y = make_rows("vit", options.rows)

        def fit(prefetch: int) -> Callable[[], Any]:
            soup = MEHLSoup(
                layerwise=True, model_batch_size=b, max_epochs=options.epochs, prefetch=prefetch,
                random_state=0, device="cpu", center="mean", clip_deltas=None, weight_decay=0.0,
            )  # fmt: skip
            collection = CheckpointCollection(paths, module=SmallViT)
            return lambda: soup.fit(collection, X, y)

        search_seconds(fit(0))  # warm up
        print(f"K = {K}, b = {b}; seconds of the search, all files once")
        print("  compute     read   bound  without  prefetch=1  of bound")
        for factor in (0.25, 1.0, 2.0):
            compute = search_seconds(fit(0))
            read = factor * compute
            spent = []
            for prefetch in (0, 1):
                disk = SlowDisk(read / K, capacity=2 * b)
                with disk.mounted():
                    spent.append(search_seconds(fit(prefetch)))
            compute = (compute + search_seconds(fit(0))) / 2
            bound = 1.1 * max(compute, read) + read * b / K
            print(
                f"{compute:9.2f}{read:9.2f}{bound:8.2f}{spent[0]:9.2f}{spent[1]:12.2f}"
                f"{spent[1] / bound:10.2f}"
            )


if __name__ == "__main__":
    main()
