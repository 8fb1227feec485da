"""How much of the package a small fit walks through: functions, files, depth, lines.

    python -m benchmarks trace [--list] [--paper]

MEHL-Soup+ on four files, two at a time, for one epoch; calls are counted by ``sys.setprofile`` in
the calling thread, lambdas and comprehensions left out. ``--list`` names them, file by file, with
how often each was called and how deep.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import sksoup
from sksoup import CheckpointCollection, MEHLSoup

ROOT = Path(sksoup.__file__).parent
UNCOUNTED = ("<lambda>", "<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>", "<module>")


class Trace:
    """Calls of the package's own functions while in force."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str], list[int]] = {}  # (file, function) -> [calls, depth]

    def __enter__(self) -> Trace:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.setprofile(None)

    def _is_ours(self, frame: FrameType) -> bool:
        code = frame.f_code
        return code.co_filename.startswith(str(ROOT)) and code.co_name not in UNCOUNTED

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not self._is_ours(frame):
            return
        depth, caller = 1, frame.f_back
        while caller:
            depth += self._is_ours(caller)
            caller = caller.f_back
        file = str(Path(frame.f_code.co_filename).relative_to(ROOT))
        found = self.calls.setdefault((file, frame.f_code.co_qualname), [0, 0])
        found[0], found[1] = found[0] + 1, max(found[1], depth)


PAPER = {"center": "mean", "clip_deltas": None, "weight_decay": 0.0}  # Algorithm 1 alone


def small_fit(**settings: Any) -> Trace:
    """Trace a fit of MEHL-Soup+ over four tiny files."""
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    X, y = torch.randn(32, 4), torch.arange(32) % 3
    with tempfile.TemporaryDirectory() as folder:
        states = [
            {name: w + 0.01 * torch.randn_like(w) for name, w in start.state_dict().items()}
            for _ in range(4)
        ]
        files = CheckpointCollection(states, module=start).save(folder)
        how = {"layerwise": True, "model_batch_size": 2, "max_epochs": 1, "random_state": 0}
        soup = MEHLSoup(**how, **settings)
        with Trace() as trace:
            soup.fit(files, X, y)
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the functions")
    parser.add_argument("--paper", action="store_true", help="the paper's form, without a center")
    options = parser.parse_args()
    calls = small_fit(**(PAPER if options.paper else {})).calls
    if options.list:
        for (file, name), (n, depth) in sorted(calls.items()):
            print(f"{file:32}{name:56}{n:6} calls, depth {depth}")
    files = {file for file, _ in calls}
    lines = sum(len(path.read_text().splitlines()) for path in ROOT.rglob("*.py"))
    print(
        f"{len(calls)} functions in {len(files)} files, at most "
        f"{max(depth for _, depth in calls.values())} deep; the package has {lines} lines"
    )


if __name__ == "__main__":
    main()
