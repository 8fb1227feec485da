"""SHA-256 of what every system gives: the same lines before and after a change of structure.

    python -m benchmarks bits [--folder FOLDER]

Fits all systems on the digits zoo (24 checkpoints, seed 0; MEHL-Soup with b = 6), recalibrated
BatchNorm on residual networks, fits that are stopped and resumed, and fits on two ranks; prints the
digests of ``coef_`` and of ``state_dict()``. The lines depend on the processor and on torch's
build, so compare two runs on one machine, with the same ``--folder`` for the zoos.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from torch import distributed

from sksoup import CheckpointCollection
from sksoup.datasets import make_digits_checkpoints
from sksoup.inspection import centered_systems, paper_systems

from .networks import SmallResNet
from .zoo import fine_tune


class Stop:
    """A callback that stops a fit after some of its steps."""

    def __init__(self, after: int) -> None:
        self.remaining = after

    def setup(self, estimator: Any, context: Any) -> None: ...

    def teardown(self, estimator: Any, context: Any) -> None: ...

    def on_fit_task_begin(self, estimator: Any, context: Any, **unused: Any) -> None: ...

    def on_fit_task_end(self, estimator: Any, context: Any, **unused: Any) -> bool:
        self.remaining -= context.task_name in ("epoch", "evaluation")
        if self.remaining < 0:
            raise KeyboardInterrupt
        return False


def digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(str(part).encode() if isinstance(part, str) else part)
    return found.hexdigest()


def show(name: str, soup: Any) -> None:
    coef = np.ascontiguousarray(soup.coef_)
    print(f"{name:32}coef  {digest(f'{coef.shape}', coef.tobytes())}", flush=True)
    if hasattr(soup, "module_"):
        parts = [
            part
            for tensor, w in soup.state_dict().items()
            for part in (f"{tensor}{w.dtype}{tuple(w.shape)}", w.numpy().tobytes())
        ]
        print(f"{name:32}state {digest(*parts)}", flush=True)


def resumed(soup: Any, after: int, *args: Any) -> Any:
    """Fit with a memory, stop, and fit again."""
    with tempfile.TemporaryDirectory() as memory:
        stopped = clone(soup).set_params(memory=memory).set_callbacks(Stop(after))
        try:
            stopped.fit(*args)
        except KeyboardInterrupt:
            return clone(soup).set_params(memory=memory).fit(*args)
    raise RuntimeError("the fit was not stopped")


def on_ranks(folder: Path) -> None:
    """One rank of two; rank 0 prints."""
    distributed.init_process_group("gloo")
    zoo = make_digits_checkpoints(folder / "digits", 24, random_state=0)
    systems = paper_systems(24)
    shards = clone(systems["MEHL-Soup+"]).set_params(shard="auto")
    for name, soup in {
        **{name: systems[name] for name in ("Greedy-Soup", "Learned-Soup+", "MEHL-Soup+")},
        "MEHL-Soup+, shards": shards,
    }.items():
        soup.fit(zoo.checkpoints, zoo.X_val, zoo.y_val)
        if distributed.get_rank() == 0:
            show(f"{name}, two ranks", soup)
    distributed.destroy_process_group()


def everything(folder: Path) -> None:
    zoo = make_digits_checkpoints(folder / "digits", 24, random_state=0)
    digits = zoo.checkpoints, zoo.X_val, zoo.y_val
    systems = paper_systems(24)
    for name, system in {**systems, **centered_systems(24)}.items():
        show(name, clone(system).fit(*digits))
    for name, options in {
        "validation_fraction": {"validation_fraction": 0.2},
        "center=best": {"center": "best"},
        "center=greedy": {"center": "greedy"},
        "normalize": {"normalize": True, "lr": 0.01},
        "bf16 deltas": {"delta_dtype": "bfloat16"},
        "sgd, accumulate": {"optimizer": "sgd", "accumulate": 2, "schedule": "constant"},
    }.items():
        show(f"MEHL-Soup+, {name}", clone(systems["MEHL-Soup+"]).set_params(**options).fit(*digits))
    for name, after in {"Greedy-Soup": 30, "Learned-Soup+": 3, "MEHL-Soup+": 8}.items():
        show(f"{name}, resumed", resumed(systems[name], after, *digits))
    streamed = clone(systems["Learned-Soup"]).set_params(memory_limit="3MB", max_epochs=1)
    show("Learned-Soup, streamed", streamed.fit(*digits))
    with_batch_norm = fine_tune(folder / "resnet", 6, 0, SmallResNet, epochs=2)
    rows = zoo.X_val[:300], zoo.y_val[:300]
    systems = paper_systems(6)  # b = 2
    for name in ("Uniform-Soup", "Greedy-Soup", "Learned-Soup+", "MEHL-Soup+"):
        for policy in ("average", "recalibrate", "auto"):
            fitted = clone(systems[name]).set_params(batch_norm=policy)
            fitted.fit(CheckpointCollection(with_batch_norm), *rows)
            show(f"{name}, {policy}", fitted)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the zoos are kept; default: a new one")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.rank:
            on_ranks(folder)
            return
        everything(folder)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", "2", "--no-python", sys.executable, "-m", "benchmarks.bits",
                   "--rank", "--folder", folder.resolve()]  # fmt: skip
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])


if __name__ == "__main__":
    main()
