"""Several processes by torch.distributed: a measured step, what is sent, and what more would give.

    python -m benchmarks ranks [--ranks 1 2] [--turns 3]

MEHL-Soup+ on small vision transformers under torchrun, a thread for each rank; the jobs take turns.
Then a model of larger jobs, from counts: a step is a forward/backward of the rank's rows, two
passes over the b deltas (over b / n in shards), and an all-reduce of b x L numbers (in shards the
weights are gathered twice and the gradient is scattered, 3 D numbers one way), against an
all-reduce of D for ordinary data-parallel training. What a device does per second is assumed, to be
changed by the options.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from sksoup import CheckpointCollection, MEHLSoup

from .networks import SmallViT
from .zoo import make_checkpoints, make_rows

B, N, BATCH = 6, 512, 256
ROOT = Path(__file__).parents[1]  # where ranks start, to find this package


@dataclass(frozen=True)
class Cost:
    """Seconds of a step: what rows take, what a pass over deltas takes, how fast numbers travel."""

    rows: float  # forward/backward of the whole minibatch on one device
    deltas: float  # combine and project over all b deltas
    latency: float  # of an all-reduce, for each rank
    bandwidth: float  # bytes per second between ranks

    def send(self, n: int, numbers: float) -> float:
        """A ring all-reduce of float32 numbers."""
        return 0.0 if n == 1 else n * self.latency + 2 * (n - 1) / n * 4 * numbers / self.bandwidth

    def step(self, n: int, coefs: float, size: float, sharded: bool = False) -> float:
        # to gather or to scatter is half of an all-reduce
        sent = self.send(n, coefs) + (1.5 * self.send(n, size) if sharded else 0)
        return self.rows / n + self.deltas / (n if sharded else 1) + sent

    def data_parallel(self, n: int, size: float) -> float:
        """A step of ordinary training."""
        return self.rows / n + self.send(n, size)


def job(folder: Path) -> None:
    """One rank: seconds per step, once warm."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    files = CheckpointCollection.from_path(folder / "vit", module=SmallViT)
    X, y = make_rows("vit", N)
    soup = MEHLSoup(
        layerwise=True,
        model_batch_size=B,
        max_epochs=1,
        batch_size=BATCH,
        random_state=0,
        center="mean",
        clip_deltas=None,
        weight_decay=0.0,
    )
    soup.fit(files, X, y)
    distributed.barrier()
    begin = time.perf_counter()
    soup.set_params(max_epochs=5).fit(files, X, y)
    took = time.perf_counter() - begin
    n_steps = sum(len(record["loss"]) for record in soup.history_)
    if distributed.get_rank() == 0:
        found = {
            "seconds": took / n_steps,
            "sent": soup.counts_.n_reduced / n_steps,
            "coef": soup.coef_[:2].tolist(),
        }
        (folder / "found.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def run(folder: Path, n: int) -> dict[str, float]:
    """Run a job of n ranks."""
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={n}", "--module", "benchmarks.ranks", "--job", str(folder),
        ],
        check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads((folder / "found.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--flops", type=float, default=2e14, help="a device reaches, per second")
    parser.add_argument("--memory-bandwidth", type=float, default=3e12, help="bytes per second")
    parser.add_argument("--bandwidth", type=float, default=5e10, help="between ranks")
    parser.add_argument("--latency", type=float, default=1e-5, help="of an all-reduce, per rank")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(Path(options.job))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoints(Path(folder) / "vit", "vit", 2 * B)
        turns = [[run(Path(folder), n) for n in options.ranks] for _ in range(options.turns)]
        size = CheckpointCollection.from_path(Path(folder) / "vit").nbytes / 4
    print(
        f"measured: small vision transformer, b = {B}, minibatches of {BATCH}, gloo, a thread each"
    )
    print("ranks   ms per step   speed-up   numbers sent per step   of D")
    for k, n in enumerate(options.ranks):
        found = [turn[k] for turn in turns]
        ms = 1000 * statistics.median(one["seconds"] for one in found)
        faster = statistics.median(turn[0]["seconds"] / turn[k]["seconds"] for turn in turns)
        sent = found[0]["sent"]
        print(f"{n:5}{ms:14.1f}{faster:11.2f}{sent:24,.0f}{sent / size:7.2%}")
    D, b, n_layers, rows, positions = 87e6, 18, 152, 2048, 50
    cost = Cost(
        rows=6 * D * positions * rows / options.flops,
        deltas=2 * b * D * 4 / options.memory_bandwidth,
        latency=options.latency,
        bandwidth=options.bandwidth,
    )
    print(f"computed: ViT-B/32, D = {D:.0f}, b = {b}, L = {n_layers}, minibatches of {rows}; "
          f"{options.flops:.0e} flop/s, memory {options.memory_bandwidth:.0e} B/s, "
          f"network {options.bandwidth:.0e} B/s, latency {options.latency:.0e} s")  # fmt: skip
    print("ranks   ms per step   speed-up      with shards   data-parallel training")
    coefs = b * n_layers
    for n in (1, 2, 8, 64):
        step, sharded = cost.step(n, coefs, D), cost.step(n, coefs, D, sharded=True)
        training = cost.data_parallel(n, D)
        print(f"{n:5}{1000 * step:14.2f}{cost.step(1, coefs, D) / step:11.2f}"
              f"{cost.step(1, coefs, D) / sharded:17.2f}"
              f"{cost.data_parallel(1, D) / training:25.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
