"""Seconds and memory of opening, describing and mixing many tensors, and many files.

    python -m benchmarks scale [--tensors 20000 200000] [--files 500 5000]

Three checkpoints of many tensors of four numbers, in safetensors and by torch.save, and many files
of four small tensors. Each line is a process of its own; the last column is the growth from the
line before, as a power of the growth in size: 1 is straight, 2 is a square.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, mix

FEW_FILES, FEW_TENSORS = 3, 4


def write_files(folder: Path, n_files: int, n_tensors: int, suffix: str) -> None:
    """Checkpoints near to each other, of small tensors."""
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(n_tensors, 4, generator=rng)
    for k in range(n_files):
        values = start + 0.01 * torch.randn(n_tensors, 4, generator=rng)
        state = {f"layer.{i}.weight": value.clone() for i, value in enumerate(values)}
        path = folder / f"ft{k}{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)


def measure(folder: str) -> list[float]:
    """Seconds to open, describe and mix what is in a folder, and MiB at most."""
    spent: list[float] = []

    def timed(work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = work()
        spent.append(time.perf_counter() - begin)
        return found

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    collection = timed(lambda: CheckpointCollection.from_path(folder))
    timed(lambda: str(collection.describe()))
    K = len(collection)
    timed(lambda: mix(collection, np.full(K, 1 / K)))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [*spent, (after - before) / 1024]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=int, nargs="*", default=[20_000, 200_000])
    parser.add_argument("--files", type=int, nargs="*", default=[500, 5_000])
    options = parser.parse_args()
    groups = [(n, FEW_FILES, n, suffix) for suffix in (".safetensors", ".pt")
              for n in options.tensors]  # fmt: skip
    groups += [(n, n, FEW_TENSORS, ".safetensors") for n in options.files]
    print("   files  tensors  format         open  describe     mix     MiB   power")
    last: tuple[Any, ...] = ()
    for size, n_files, n_tensors, suffix in groups:
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), n_files, n_tensors, suffix)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                *seconds, memory = pool.apply(measure, [folder])
        line = f"{n_files:8,}{n_tensors:9,}  {suffix:12}"
        line += f"{seconds[0]:7.2f}{seconds[1]:10.2f}{seconds[2]:8.2f}{memory:8.0f}"
        kind = (suffix, n_files == size)
        if last and last[0] == kind:
            line += f"{math.log(sum(seconds) / last[2]) / math.log(size / last[1]):8.2f}"
        print(line, flush=True)
        last = kind, size, sum(seconds)


if __name__ == "__main__":
    main()
