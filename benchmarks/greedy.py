"""Greedy-Soup against the plain script: rows evaluated, time, and whether the soup is the same.

    python -m benchmarks greedy [--seeds 0 1 2] [--zoos convnet transformer]
    python -m benchmarks greedy --kept 24 200 2000

Two zoos of real fine-tunings on digits: 24 convnets and 16 vision transformers. Ours and the
reference (`reference.greedy`, 2K - 1 full evaluations) take turns; a ratio is the median over the
turns. "x script" reads a checkpoint's file when its turn comes, as the published script does and as
we do, "x in memory" has all K checkpoints in memory beforehand; "known scores" is ours with scores
that are known against the script. "second stage" is the part of the candidates' rows
that were evaluated, "least" what no exact method can do without: all rows of a candidate that is
kept, and of a rejected one as many wrong rows as the soup has, and one more. "soup" tells whether
full evaluation by sksoup, and the reference with its running mean, kept the same ingredients.

With ``--kept``: opens of files and time per checkpoint, for K tiny checkpoints that are all kept.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from sksoup import CheckpointCollection, GreedySoup
from sksoup.datasets import make_digits_checkpoints
from sksoup.runtime.live_tensors import LiveTensors

from . import reference
from .zoo import fine_tune_vits


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def least_rows(path: list[dict[str, Any]], n: int) -> int:
    """Rows that the candidates on a path need at least."""
    rows, soup = 0, path[0]["score"]
    for tried in path[1:]:
        rows += n if tried["kept"] else round(n * (1 - soup)) + 1
        soup = tried["score"] if tried["kept"] else soup
    return rows


class Files(Sequence[dict[str, torch.Tensor]]):
    """State dicts, each read from its file whenever it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return load_file(self.paths[index])


def compare(checkpoints: CheckpointCollection, X: Any, y: Any, turns: int) -> dict[str, Any]:
    names, states = checkpoints.names, list(checkpoints.values())
    files = Files([checkpoints.path(name) for name in names])
    module = checkpoints.build_module().eval()
    rows, labels = torch.as_tensor(X), torch.as_tensor(y)
    soup = GreedySoup().fit(checkpoints, X, y)
    full = GreedySoup(early_rejection=False).fit(checkpoints, X, y)
    known = CheckpointCollection(
        {name: checkpoints.path(name) for name in names},
        module=checkpoints.build_module,
        scores=soup.individual_scores_,
    )
    _, kept = reference.greedy(module, states, rows, labels, 128)
    ratios, ratios_known, ratios_in_memory = [], [], []
    for _ in range(turns):
        script = seconds(lambda: reference.greedy(module, files, rows, labels, 128))
        in_memory = seconds(lambda: reference.greedy(module, states, rows, labels, 128))
        ours = seconds(lambda: GreedySoup().fit(checkpoints, X, y))
        ratios.append(ours / script)
        ratios_in_memory.append(ours / in_memory)
        ratios_known.append(seconds(lambda: GreedySoup().fit(known, X, y)) / script)
    with LiveTensors() as live:
        GreedySoup().fit(checkpoints, X, y)
    return {
        "held_out": soup.score(X, y),
        "kept": len(soup.ingredients_),
        "second_stage": soup.n_rows_evaluated_ / full.n_rows_evaluated_,
        "least": least_rows(soup.path_, len(y)) / full.n_rows_evaluated_,
        "ratio": statistics.median(ratios),
        "ratio_known": statistics.median(ratios_known),
        "ratio_in_memory": statistics.median(ratios_in_memory),
        "same": soup.ingredients_ == full.ingredients_,
        "same_as_reference": soup.ingredients_ == tuple(names[k] for k in kept),
        "memory": (live.peak - rows.nbytes) / checkpoints.nbytes,
    }


def all_kept(folder: Path, n: int) -> tuple[int, float, float]:
    """Opens, seconds of a fit, and of opening the collection, for n files that are all kept."""
    torch.manual_seed(0)

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

    start, X, y = build().state_dict(), torch.randn(64, 8), torch.arange(64) % 3
    folder.mkdir()
    for k in range(n):
        state = {name: w + 0.01 * torch.randn_like(w) for name, w in start.items()}
        save_file(state, folder / f"{k}.safetensors")
    begin = time.perf_counter()
    files = CheckpointCollection.from_path(folder, module=build)
    opening, opened, original = time.perf_counter() - begin, 0, CheckpointCollection.open

    def counting(self: CheckpointCollection, name: str) -> Any:
        nonlocal opened
        opened += 1
        return original(self, name)

    with patch.object(CheckpointCollection, "open", counting):
        taken = seconds(lambda: GreedySoup(min_improvement=-1.0).fit(files, X, y))
    return opened, taken, opening


def print_all_kept(sizes: list[int]) -> None:
    print("    K  opens  per checkpoint  fit, s  ms per checkpoint  opening the collection, s")
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            opened, taken, opening = all_kept(Path(folder) / str(n), n)
            print(
                f"{n:5}  {opened:5}  {opened / n:14.2f}  {taken:6.2f}  {1e3 * taken / n:17.2f}  "
                f"{opening:25.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--zoos", nargs="+", default=["convnet", "transformer"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--kept", type=int, nargs="+", metavar="K")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.kept:
        print_all_kept(options.kept)
        return
    print(
        "zoo          seed  held-out  kept  second stage  least  x script  known scores  "
        "x in memory  soup: full, reference  models"
    )
    with tempfile.TemporaryDirectory() as folder:
        for zoo in options.zoos:
            for seed in options.seeds:
                here = Path(folder) / f"{zoo}{seed}"
                digits = make_digits_checkpoints(random_state=seed)
                checkpoints = digits.checkpoints
                if zoo == "transformer":
                    checkpoints = fine_tune_vits(here, 16, seed)
                r = compare(checkpoints, digits.X_val, digits.y_val, options.turns)
                print(
                    f"{zoo:12} {seed:4}  {r['held_out']:8.1%}  {r['kept']:4}  "
                    f"{r['second_stage']:12.1%}  {r['least']:5.1%}  {r['ratio']:8.2f}  "
                    f"{r['ratio_known']:12.2f}  {r['ratio_in_memory']:11.2f}  "
                    f"{'same' if r['same'] else 'DIFFERS':>10}, "
                    f"{'same' if r['same_as_reference'] else 'differs':9} {r['memory']:7.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
