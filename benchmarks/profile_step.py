"""Where the milliseconds of a fit go: each part of a step, and the reads around the steps.

    python -m benchmarks profile_step [--kind vit|mlp|clip] [--checkpoints 72] [--model-batch 18]

Times the parts of a real fit of MEHL-Soup+ (on CUDA with a synchronisation around each, which
costs a little). Where a weight is used once per row, as in a plain MLP, a step is bound by the
memory that combine and project read; the last line compares them with a plain pass over as many
bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from sksoup import CheckpointCollection, MEHLSoup
from sksoup.engine.deltas import ModelBatch
from sksoup.engine.descent import Descent
from sksoup.engine.objective import Objective

from . import zoo

PARTS = (
    (ModelBatch, "combine", "combine: W = start + coef @ deltas"),
    (Objective, "forward", "forward"),
    (Objective, "loss_and_backward", "criterion and backward"),
    (ModelBatch, "project", "project: deltas @ gradient"),
    (AdamW, "step", "optimizer"),
)


class Clock:
    """Seconds spent in each part; what a part calls is not counted twice."""

    def __init__(self, device: torch.device) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inside = [0.0]
        self._device = device

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def wrap(self, owner: Any, name: str, label: str) -> Callable[[], None]:
        """Time every call of ``owner.name``; returns how to undo it."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begin = self._now()
            try:
                return original(*args, **kwargs)
            finally:
                elapsed = self._now() - begin
                self.spent[label] += elapsed - self._inside.pop()
                self.calls[label] += 1
                self._inside[-1] += elapsed

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, original)


def bandwidth_seconds(n_bytes: int, device: torch.device) -> float:
    """Time to read that many bytes once, at the rate of a large matrix-vector product."""
    rows = torch.ones((64, 1 << 20), device=device)  # 256 MB, beyond every cache
    ones = torch.ones(1 << 20, device=device)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        torch.mv(rows, ones)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best * n_bytes / rows.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=list(zoo.COST_KINDS), default="vit")
    parser.add_argument("--checkpoints", type=int, default=72, help="K")
    parser.add_argument("--model-batch", type=int, default=18, help="b")
    parser.add_argument("--rows", type=int, default=640, help="N")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--delta-dtype", default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    kind, device = zoo.COST_KINDS[options.kind], torch.device(options.device)
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        zoo.make_checkpoints(Path(folder), options.kind, options.checkpoints)
        collection = CheckpointCollection(sorted(Path(folder).iterdir()), module=kind.module)
        X, y = (rows.to(device) for rows in zoo.make_rows(options.kind, options.rows))
        soup = MEHLSoup(
            layerwise=True, model_batch_size=options.model_batch, max_epochs=options.epochs,
            batch_size=options.batch_size, delta_dtype=options.delta_dtype, random_state=0,
            prefetch=0, device=options.device, center="mean", clip_deltas=None, weight_decay=0.0,
        )  # fmt: skip
        soup.fit(collection.select(collection.names[:2]), X[:128], y[:128])  # warm up
        undo = [clock.wrap(*part) for part in PARTS]
        undo.append(clock.wrap(Descent, "run", "rest of the step"))
        undo.append(clock.wrap(ModelBatch, "load", "reading the model batches"))
        undo.append(clock.wrap(MEHLSoup, "fit", "rest of the fit: mean, mix, scores"))
        soup.fit(collection, X, y)
        for restore in undo:
            restore()
    n_steps = clock.calls["optimizer"]
    steps = [label for _, _, label in PARTS] + ["rest of the step"]
    in_steps = sum(clock.spent[label] for label in steps)
    print(f"{options.kind}: {n_steps} steps of {in_steps / n_steps * 1e3:.2f} ms")
    for label in steps:
        share = clock.spent[label] / in_steps
        print(f"  {label:36}{clock.spent[label] / n_steps * 1e3:9.3f} ms {share:7.1%}")
    total = sum(clock.spent.values())
    print(f"the whole fit: {total:.2f} s, {in_steps / total:.1%} of it in steps")
    for label in ("reading the model batches", "rest of the fit: mean, mix, scores"):
        print(f"  {label:36}{clock.spent[label]:9.3f} s  {clock.spent[label] / total:7.1%}")
    size = sum(p.numel() for p in kind.module().parameters())
    width = 2 if options.delta_dtype == "bfloat16" else 4
    floor = bandwidth_seconds(2 * options.model_batch * size * width, device)
    ours = sum(clock.spent[label] for label in (steps[0], steps[3])) / n_steps
    print(
        f"combine and project read {2 * options.model_batch * size * width / 1e6:.1f} MB per step: "
        f"{ours * 1e3:.3f} ms, {ours / floor:.2f} x a plain pass over them"
    )


if __name__ == "__main__":
    main()
