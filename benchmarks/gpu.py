"""One command for a machine with an NVIDIA GPU: its tests, and the paper's cost table at its size.

    python -m benchmarks gpu [--folder checkpoints] [--output benchmarks/results]

The tests marked ``gpu``; then 72 checkpoints of ViT-B/32's size (26 GB, written to the folder),
18 at a time, under bfloat16 autocast, against the bare module's passes and against plain scripts of
both papers, with the allocator's peak. Then the page of the results, ``docs/gpu.rst``. Everything
takes some ten minutes and no network. ``--device cpu --kind vit --checkpoints 6`` runs the same on
a processor, smaller.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import cost

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.rst"
SYSTEMS = (
    "Best checkpoint",
    "Greedy-Soup",
    "MEHL-Soup+",
    "Centered-Soup+, b",
    "greedy, full",
    "mehl+",
)
HEAD = """.. made by benchmarks/gpu.py: run make gpu

On a GPU
========

``make gpu`` runs the tests that need a GPU, then the paper's cost table at its own size: 72
checkpoints of ViT-B/32's size, 18 at a time, bfloat16 autocast. *x floor* is the time of the fit
over that of the bare module's passes and reads; *memory* is the allocator's peak above that of a
plain step, in models of float32.
"""
NOT_YET = """This was not run yet: no machine with a GPU was at hand.
"""


def page(results: Path) -> str:
    """The page, from ``gpu.json``; it says so where there is none."""
    lines = [HEAD]
    path = results / "gpu.json"
    if not path.exists():
        return "\n".join([*lines, NOT_YET])
    found = json.loads(path.read_text(encoding="utf-8"))
    options = found["options"]
    said = (f"{found['device']}, torch {found['torch']}: K = {options['checkpoints']}, b = "
            f"{options['model_batch']}, {options['rows']:,} rows in minibatches of "
            f"{options['batch_size']}, {options['epochs']} epochs, {options['kind']}, "
            f"{options['precision']}.")  # fmt: skip
    table = ["    " + line for line in cost.table(found["results"]).splitlines()]
    return "\n".join([*lines, said, "", ".. code-block:: text", "", *table, ""])


def run_tests() -> None:
    """The tests that need a GPU."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    subprocess.run(tests, cwd=ROOT, check=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps the checkpoints; default: a new one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--page-only", action="store_true", help="from the results that are there")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kind", default="clip")
    parser.add_argument("--checkpoints", type=int, default=72)
    parser.add_argument("--model-batch", type=int, default=18)
    parser.add_argument("--rows", type=int, default=2560)
    parser.add_argument("--only", nargs="+", default=list(SYSTEMS))
    options = parser.parse_args(arguments)
    if not options.page_only:
        if options.device == "cuda":
            if not torch.cuda.is_available():
                raise SystemExit(
                    "torch finds no CUDA device: run this on a machine with an NVIDIA GPU and a "
                    "build of torch for CUDA (pip install torch), or with --device cpu --kind vit."
                )
            run_tests()
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            cost.main(_arguments(options, str(options.folder or temporary)))
    options.page.write_text(page(options.output), encoding="utf-8")
    print(options.page)


def _arguments(options: argparse.Namespace, folder: str) -> list[str]:
    """Those of `benchmarks.cost`."""
    settings: dict[str, Any] = {
        "kind": options.kind, "device": options.device, "checkpoints": options.checkpoints,
        "model-batch": options.model_batch, "rows": options.rows, "epochs": 2, "prefetch": 1,
        "precision": "bf16", "folder": folder, "output": options.output / "gpu.json",
    }  # fmt: skip
    flat = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [*flat, "--only", *options.only]


if __name__ == "__main__":
    main()
