"""What each system costs, against the least it could cost and against plain scripts.

    python -m benchmarks cost [--checkpoints 72] [--model-batch 18] [--rows 256] [--kind vit|mlp]
    python -m benchmarks cost --paper        # 72 checkpoints of ViT-B/32's size, for a GPU

Every system and every reference runs in a process of its own. In the same process, between the
passes of the fit, it runs its floor: as many plain forward (and backward) passes of the bare module
on minibatches of the same size, and as many sequential reads of the files, as the method needs and
no more. Tensors are counted in a short fit of their own (those alive at once, without the module,
its gradient, activations and rows); the process's memory is measured in another, above its peak
in a plain step of the module. References start with the checkpoints in memory where they need them
all, and do not pay for reading them; their floor is that of the same passes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import platform
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from sksoup import (
    CheckpointCollection,
    SoupWarning,
)
from sksoup.inspection import centered_systems, paper_systems
from sksoup.runtime.live_tensors import LiveTensors

from . import reference, zoo

SYSTEMS = (
    "Best checkpoint", "Uniform-Soup", "Greedy-Soup", "Learned-Soup", "Learned-Soup+", "HL-Soup",
    "HL-Soup+", "MEHL-Soup", "MEHL-Soup+", "MEHL-Soup+ bf16 deltas", "Centered-Soup+",
    "Centered-Soup+, b",
)  # fmt: skip
LEGEND = """
forward, backward: passes of one model over the rows. tensors, memory: peak in models, above that of
a plain step; tensors counted one by one, memory that of the process. x reference: how many times
longer the plain scripts take, each against the floor in its own process, in the order of the rows.
"""
REFERENCES = {
    "greedy, full evaluations": "Greedy-Soup",
    "learned, sum of products": "Learned-Soup",
    "learned, stacked einsum": "Learned-Soup",
    "learned+, sum of products": "Learned-Soup+",
    "learned+, stacked einsum": "Learned-Soup+",
    "mehl+, loops": "MEHL-Soup+",
}


class Passes:
    """A callback that runs a pass of the floor after each pass of the fit.

    So both meet the same moods of the machine.
    """

    def __init__(
        self, runs: list[Callable[[], Any]], clock: Callable[[Callable[[], Any]], float]
    ) -> None:
        self.runs, self.clock = runs, clock
        self.seconds = 0.0

    def setup(self, estimator: Any, context: Any) -> None: ...

    def teardown(self, estimator: Any, context: Any) -> None: ...

    def on_fit_task_begin(self, estimator: Any, context: Any, **unused: Any) -> None: ...

    def on_fit_task_end(self, estimator: Any, context: Any, **unused: Any) -> bool:
        if context.task_name in ("epoch", "evaluation") and self.runs:
            self.seconds += self.clock(self.runs.pop())
        return False

    def finish(self, until: int = 0) -> float:
        """Run what the fit gave no occasion for, or some of it; returns the seconds of all."""
        while len(self.runs) > until:
            self.seconds += self.clock(self.runs.pop())
        return self.seconds


class Run:
    """One system or reference with everything it needs, in its own process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.paths = sorted(Path(options.folder).glob("ft*.safetensors"))[: options.checkpoints]
        kind = zoo.COST_KINDS[options.kind]
        self.collection = CheckpointCollection(self.paths, module=kind.module)
        self.module = kind.module().to(self.device).eval()
        X, y = zoo.make_rows(options.kind, options.rows)
        self.X, self.y = X.to(self.device), y.to(self.device)

    # ---------------------------------------------------------------- what is measured

    def soup(self, max_epochs: int | None = None) -> Any:
        o, K = self.options, len(self.paths)
        name = o.run.removesuffix(" bf16 deltas").removesuffix(", b")
        soup = {**paper_systems(K), **centered_systems(K)}[name]
        params = {"batch_size": o.batch_size, "device": o.device, "precision": o.precision,
                  "max_epochs": max_epochs or o.epochs}  # fmt: skip
        if name.startswith("Learned"):
            params["memory_limit"] = "1000GB"
        elif o.run.startswith("MEHL") or o.run.endswith(", b"):
            width = "bfloat16" if "bf16" in o.run else None
            params |= {"model_batch_size": o.model_batch, "prefetch": o.prefetch,
                       "delta_dtype": width}  # fmt: skip
        elif name.startswith(("HL", "Centered")):
            params |= {"model_batch_size": None, "prefetch": 0}
        known = soup.get_params(deep=False)
        return soup.set_params(**{n: value for n, value in params.items() if n in known})

    def fit(self, max_epochs: int | None = None, callback: Any = None) -> Any:
        collection = CheckpointCollection(self.paths, module=self.collection.module)
        soup = self.soup(max_epochs)
        if callback is not None:
            soup.set_callbacks(callback)
        return soup.fit(collection, self.X, self.y)

    def reference(self, max_epochs: int | None = None) -> Callable[[], Any]:
        """Give the reference, its checkpoints read where it keeps them all."""
        o, name = self.options, self.options.run
        rows = (self.X, self.y, o.batch_size)

        def load(k: int) -> reference.State:
            return load_file(self.paths[k], device=str(self.device))

        if name.startswith("mehl"):
            return lambda: reference.mehl(
                self.module, load, len(self.paths), *rows, b=o.model_batch, layerwise=True,
                lr=0.05, max_epochs=max_epochs or o.epochs,
            )  # fmt: skip
        states = [load(k) for k in range(len(self.paths))]
        if name.startswith("greedy"):
            return lambda: reference.greedy(self.module, states, *rows)
        return lambda: reference.learned(
            self.module, states, *rows, layerwise="+" in name, stacked="einsum" in name, lr=0.05,
            max_epochs=max_epochs or o.epochs,
        )  # fmt: skip

    # -------------------------------------------------------------------------- floor

    def floor(self) -> tuple[int, int, float]:
        """Epochs, evaluations, and reads of all files the method can't do without."""
        o, K = self.options, len(self.paths)
        if o.run.startswith(("Learned", "HL", "learned")):
            return o.epochs, 0, 3
        if o.run.lower().startswith("mehl"):
            return -(-K // o.model_batch) * o.epochs, 0, 3
        if o.run.startswith("Centered"):
            n_batches = -(-K // o.model_batch) if o.run.endswith(", b") else 1
            ranked = min(self.soup().ranking_rows, o.rows) / o.rows
            # all rows for the check at the end; a read per stage, a quarter of one for the center
            return n_batches * o.epochs, math.ceil(K * ranked) + 3, 4.25
        if o.run == "Best checkpoint":
            return 0, K, 2
        return (0, 0, 1) if o.run == "Uniform-Soup" else (0, 2 * K - 1, 2)

    def autocast(self) -> AbstractContextManager[Any]:
        """What the soups compute in; references, too."""
        if self.options.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def run_pass(self, backward: bool) -> None:
        """Once over the rows with the bare module."""
        size = self.options.batch_size
        with torch.set_grad_enabled(backward):
            for i in range(0, len(self.X), size):
                with self.autocast():
                    output = self.module(self.X[i : i + size]).float()
                if backward:
                    self.module.zero_grad()
                    cross_entropy(output, self.y[i : i + size]).backward()

    def read_files(self, times: float) -> None:
        buffer = np.empty(1 << 22, np.uint8)
        for path in islice(cycle(self.paths), round(times * len(self.paths))):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    # ------------------------------------------------------------------- measurements

    def seconds(self, run: Callable[[], Any]) -> float:
        self.wait()
        begin = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure_time(self) -> dict[str, Any]:
        for _ in range(3):  # warm up
            self.run_pass(backward=True)
        n_epochs, n_evaluations, n_reads = self.floor()
        n = n_epochs + n_evaluations
        runs = [partial(self.run_pass, i < n_epochs) for i in range(n)]  # run from the end
        passes = Passes(runs, self.seconds)
        if self.options.run in REFERENCES:
            run = self.reference()
            passes.finish(n // 2)
            with self.autocast():
                spent = self.seconds(run)
            floor = passes.finish()
            return {"seconds": spent, "floor_seconds": floor, "ratio_to_floor": spent / floor}
        soups: list[Any] = []
        spent = self.seconds(lambda: soups.append(self.fit(callback=passes))) - passes.seconds
        floor = passes.finish() + self.seconds(lambda: self.read_files(n_reads))
        counts = soups[0].counts_
        return {
            "seconds": spent,
            "floor_seconds": floor,
            "ratio_to_floor": spent / floor,
            "forward": counts.rows_forward / self.options.rows,
            "backward": counts.rows_backward / self.options.rows,
        }

    def measure_memory(self) -> dict[str, Any]:
        """Peak memory of the process, or of the device, above that of one plain step.

        And the tensors alive at once. One epoch over one minibatch: nothing is kept of the others.
        """
        self.X, self.y = self.X[: self.options.batch_size], self.y[: self.options.batch_size]
        learns = self.options.run in REFERENCES or self.floor()[0] > 0
        step = self.peak_bytes(lambda: self.run_pass(learns and "greedy" not in self.options.run))
        self.module.zero_grad()
        before = self.held_bytes()
        run = self.reference(1) if self.options.run in REFERENCES else lambda: self.fit(1)
        peak = self.peak_bytes(run, before)
        memory = {"memory_models": (peak - step) / self.collection.nbytes}
        return memory | ({} if self.options.run in REFERENCES else self.count_tensors(learns))

    def count_tensors(self, learns: bool) -> dict[str, Any]:
        """Tensors alive at once, in models, without the fit's module and its gradient."""
        with LiveTensors() as live:
            self.fit(1)
        own = sum(p.nbytes for p in self.module.parameters()) * (1 + learns)
        return {"tensors_models": (live.peak - own) / self.collection.nbytes}

    def held_bytes(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else anonymous_bytes()

    def peak_bytes(self, run: Callable[[], Any], before: int | None = None) -> int:
        """How far the memory held rises above what it was before."""
        before = self.held_bytes() if before is None else before
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated() - before
        peak, running = before, True

        def watch() -> None:
            nonlocal peak
            while running:
                peak = max(peak, anonymous_bytes())
                time.sleep(5e-4)

        watcher = threading.Thread(target=watch)
        watcher.start()
        run()
        running = False
        watcher.join()
        return peak - before


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def measure(options: argparse.Namespace, run: str, what: str, answer: Connection) -> None:
    """Measure one thing and send it; runs in a process of its own."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", SoupWarning)  # a greedy soup of one
    options.run = run
    keep_freed_memory(what == "time")
    try:
        answer.send(getattr(Run(options), f"measure_{what}")())
    except Exception:
        answer.send(traceback.format_exc())


def keep_freed_memory(keep: bool) -> None:
    """Have malloc keep freed blocks, or give them back to the system at once.

    Kept, time is that of the work and not of page faults, which come and go with the heap's
    layout. Given back, the process's memory is what is alive.
    """
    with suppress(OSError, AttributeError):  # not glibc: noisier times, a higher peak
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << (25 if keep else 16))  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30 if keep else 0)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 0 if keep else 1)  # M_ARENA_MAX


def child(options: argparse.Namespace, run: str, what: str) -> dict[str, Any]:
    """Measure in a process of its own, forked from one that has only imported libraries."""
    context = multiprocessing.get_context("forkserver")
    # torch imports _dynamo when the first optimizer is made, which takes a second
    libraries = ["sksoup", zoo.__name__, reference.__name__, "sklearn.datasets", "torch._dynamo"]
    context.set_forkserver_preload(libraries)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(options, run, what, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = "the process ended without a result"
    process.join()
    if isinstance(found, str):
        raise SystemExit(f"{run} ({what}) failed:\n{found}")
    return dict(found)


def table(results: dict[str, dict[str, Any]]) -> str:
    header = (
        "system", "seconds", "x floor", "forward", "backward", "tensors", "memory", "x reference",
    )  # fmt: skip
    lines = [header]
    for name, r in results.items():
        against = [
            f"{results[other]['ratio_to_floor'] / r['ratio_to_floor']:.2f}"
            for other, system in REFERENCES.items()
            if system == name.removesuffix(" bf16 deltas") and other in results
        ]
        lines.append(
            (
                name,
                f"{r['seconds']:.2f}",
                f"{r['ratio_to_floor']:.2f}",
                *(f"{r[c]:.1f}" if c in r else "" for c in ("forward", "backward")),
                *(f"{r[c]:.1f}" if c in r else "" for c in ("tensors_models", "memory_models")),
                " / ".join(against),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def named(options: argparse.Namespace) -> str:
    """The device, as its maker calls it."""
    return torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=72, help="K")
    parser.add_argument("--model-batch", type=int, default=18, help="b")
    parser.add_argument("--rows", type=int, help="N: 256, with --paper 25600")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, help="passes over the rows: 10, with --paper 5")
    parser.add_argument("--prefetch", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--kind", choices=list(zoo.COST_KINDS), default="vit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", help="where the checkpoints are or go; default: a new one")
    parser.add_argument(
        "--only", nargs="+", help="systems and references that contain one of these"
    )
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--output", type=Path, help="save the results as JSON")
    options = parser.parse_args(arguments)
    if options.paper:
        options.kind = "clip"
    options.rows = options.rows or (25_600 if options.kind == "clip" else 256)
    options.epochs = options.epochs or (5 if options.kind == "clip" else 10)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or temporary
        if not list(Path(options.folder).glob("ft*.safetensors")):
            zoo.make_checkpoints(Path(options.folder), options.kind, options.checkpoints)
        collection = CheckpointCollection(sorted(Path(options.folder).glob("ft*.safetensors")))
        print(
            f"K = {options.checkpoints}, b = {options.model_batch}, N = {options.rows}, "
            f"{collection.nbytes / 4e6:.2f}M parameters ({options.kind}), minibatches of "
            f"{options.batch_size}, {options.epochs} epochs, {options.device}, {options.threads} "
            f"threads"
        )
        results: dict[str, dict[str, Any]] = {}
        for name in (*SYSTEMS, *REFERENCES):
            if options.only and not any(part in name for part in options.only):
                continue
            r = child(options, name, "time") | child(options, name, "memory")
            results[name] = r
            print(f"  {name}: {r['seconds']:.2f} s", flush=True)
    print()
    print(table(results))
    print(LEGEND)
    if options.output:
        about = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": named(options),
        }
        document = {"options": vars(options) | {"output": None}, **about, "results": results}
        options.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
