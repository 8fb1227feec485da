"""Averaging at its floor: `mix` and `save` against a plain read + one accumulate + write.

    python -m benchmarks average [--checkpoints 16] [--parameters 25e6] [--dtype float32]

Both sides average the same files in one process, in turns, after a first round that is not counted;
the files are in the page cache. The floor does the least anyone could: it reads each file into one
buffer, adds it to one accumulator (for half precision: converts it first), and writes the result.
It checks nothing. Hashing for a recipe is left out on both sides and shown apart. Memory is
anonymous memory (the page cache is not counted), above what the process held before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, mix

WIDTH = 1000


def make_checkpoints(folder: Path, n: int, n_parameters: int, dtype: torch.dtype) -> list[Path]:
    """Files of square-ish matrices around one start, as a transformer's."""
    rows = max(1, n_parameters // (WIDTH * 40))
    generator = torch.Generator().manual_seed(0)
    start = {f"layer{i}.weight": torch.randn(rows, WIDTH, generator=generator) for i in range(40)}
    paths = []
    for k in range(n):
        paths.append(folder / f"ft{k:02d}.safetensors")
        save_file(
            {
                name: (w + 0.01 * torch.randn(w.shape, generator=generator)).to(dtype)
                for name, w in start.items()
            },
            paths[-1],
        )
    return paths


def floor(paths: list[Path], out: Path, dtype: torch.dtype) -> None:
    buffer = np.empty(paths[0].stat().st_size, np.uint8)
    total = None
    for path in paths:
        with path.open("rb") as file:
            file.readinto(buffer)
        header = int.from_bytes(buffer[:8].tobytes(), "little") + 8
        w = torch.from_numpy(buffer[header:]).view(dtype).float()
        if total is None:
            total = w / len(paths)
        else:
            total.add_(w, alpha=1 / len(paths))
    with out.open("wb") as file:
        file.write(total.to(dtype).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def average(paths: list[Path], out: Path) -> None:
    save_file(mix(CheckpointCollection(paths), [1 / len(paths)] * len(paths)), out)
    with out.open("rb+") as file:
        os.fsync(file.fileno())


def average_on_disk(paths: list[Path], out: Path) -> None:
    mix(CheckpointCollection(paths), [1 / len(paths)] * len(paths), out=out)


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def measure(run: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and peak of anonymous memory above that at the start (sampled each millisecond)."""
    before, peak, running = anonymous_bytes(), 0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous_bytes())
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    running = False
    watcher.join()
    return seconds, peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--parameters", type=float, default=25e6)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to put the files; default: a new one")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        paths = make_checkpoints(root, options.checkpoints, int(options.parameters), dtype)
        model = CheckpointCollection(paths[:1]).nbytes
        seconds: dict[str, list[float]] = {"floor": [], "mix and save": [], "mix(out=)": []}
        memory = dict.fromkeys(seconds, 0)
        for turn in range(options.rounds + 1):
            for side, run in {
                "floor": lambda: floor(paths, root / "floor.bin", dtype),
                "mix and save": lambda: average(paths, root / "average.safetensors"),
                "mix(out=)": lambda turn=turn: average_on_disk(paths, root / f"average{turn}"),
            }.items():
                spent, peak = measure(run)
                if turn:
                    seconds[side].append(spent)
                    memory[side] = max(memory[side], peak)
        begin = time.perf_counter()
        collection = CheckpointCollection(paths)
        for name in collection:
            collection.sha256(name)
        hashing = time.perf_counter() - begin
    result = {
        "checkpoints": len(paths),
        "bytes": model * len(paths),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "hashing_to_floor": hashing / statistics.median(seconds["floor"]),
    }
    for side in seconds:
        ratios = [a / b for a, b in zip(seconds[side], seconds["floor"], strict=True)]
        result[side] = {
            "seconds": round(statistics.median(seconds[side]), 4),
            "ratio_to_floor": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 2) for ratio in ratios],
            "peak_models": round(memory[side] / model, 2),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
