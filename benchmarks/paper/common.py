"""What the experiments share: their arguments, one process per zoo and seed, results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from joblib import Parallel, delayed
from scipy.stats import t as student

from sksoup import SoupWarning

RESULTS = Path(__file__).parent / "results"
Measure = Callable[[zoo.Zoo, int], dict[str, Any]]


def arguments(doc: str | None, kinds: Sequence[str], seeds: Sequence[int]) -> argparse.Namespace:
    """What every experiment can be told."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("zoos"), help="keeps the zoos")
    parser.add_argument("--out", type=Path, default=RESULTS, help="keeps the results")
    parser.add_argument("--kinds", nargs="+", default=list(kinds), choices=list(zoo.KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--name", default=Path(sys.argv[0]).stem, help="of the results")
    parser.add_argument("--jobs", type=int, default=2, help="processes, with a thread each")
    return parser.parse_args()


def run(measure: Measure, options: argparse.Namespace, **about: Any) -> None:
    """Measure every zoo and seed; write ``results/<script>.json``.

    The results of a kind are a list, a dict per seed in the order of the seeds. What was measured
    is kept beside the zoos, so that a run that was cut off goes on where it was.
    """
    script = Path(sys.argv[0])
    kept = {
        (kind, seed): options.folder / "measured" / script.stem / f"{kind}-{seed}.json"
        for kind in options.kinds
        for seed in options.seeds
    }
    Parallel(n_jobs=options.jobs)(
        delayed(_measure)(measure, zoo.KINDS[kind], seed, options.folder, path)
        for (kind, seed), path in kept.items()
        if not path.exists()
    )
    found = {pair: json.loads(path.read_text()) for pair, path in kept.items()}
    result = {
        "command": f"python benchmarks/paper/{script.name}",
        "seeds": options.seeds,
        "minutes": round(sum(one["seconds"] for one in found.values()) / 60, 1),
        "versions": {name: version(name) for name in ("sksoup", "torch", "scikit-learn")},
        **about,
        "results": {
            kind: [found[kind, seed]["measured"] for seed in options.seeds]
            for kind in options.kinds
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {result['minutes']} minutes of processor time")


def _measure(measure: Measure, kind: zoo.Kind, seed: int, folder: Path, path: Path) -> None:
    """Measure one zoo; keep what was found, and the processor time it took, the zoo's included."""
    begin = time.process_time()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)
        measured = measure(kind.make(folder, kind.n, seed), seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    seconds = time.process_time() - begin
    part.write_text(json.dumps({"seconds": seconds, "measured": measured}))
    part.replace(path)


def percent(soup: Any, rows: tuple[Any, Any]) -> float:
    return round(100 * float(soup.score(*rows)), 4)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % confidence interval by Student's t."""
    n = len(values)
    if n < 2:
        return statistics.mean(values), float("nan")
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / np.sqrt(n)
    return statistics.mean(values), float(half)
