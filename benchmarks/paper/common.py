"""What the experiments share: their arguments, one process per zoo and seed, results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from scipy.stats import t as student
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.model_selection import train_test_split

from sksoup import DivergenceError, LearnedSoup, SoupWarning
from sksoup.inspection import centered_systems, paper_systems

from .. import zoo

RESULTS = Path(__file__).parent / "results"
Measure = Callable[[zoo.Zoo, int], dict[str, Any]]
Found = dict[tuple[str, int], dict[str, Any]]  # by kind and seed: seconds, what was measured


@dataclass(frozen=True)
class Experiment:
    """What a script measures of a zoo, the zoos and the seeds."""

    script: str
    measure: Measure
    kinds: Sequence[str]
    seeds: Sequence[int] = zoo.SEEDS
    about: Mapping[str, Any] = field(default_factory=dict)  # more to be said in the results


def main(experiment: Experiment, doc: str | None) -> None:
    """Run one experiment with the arguments of the command line."""
    parser = arguments(doc)
    parser.add_argument("--kinds", nargs="+", default=experiment.kinds, choices=list(zoo.KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=experiment.seeds)
    options = parser.parse_args()
    run([replace(experiment, kinds=options.kinds, seeds=options.seeds)], options)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every script can be told."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("zoos"), help="keeps the zoos")
    parser.add_argument("--out", type=Path, default=RESULTS, help="keeps the results")
    parser.add_argument("--jobs", type=int, default=2, help="processes, with a thread each")
    return parser


def run(experiments: Sequence[Experiment], options: argparse.Namespace) -> float:
    """Make the zoos, measure them, write ``results/<script>.json`` of each experiment.

    The zoos come first, as experiments share them; then the experiments together, so that no
    process waits for the last seed of one. What was measured is kept beside the zoos: a run that
    was cut off goes on where it was. Returns the processor minutes that making the zoos took.

    The results of a kind are a list, a dict per seed in the order of the seeds.
    """
    pairs = [[(kind, seed) for kind in one.kinds for seed in one.seeds] for one in experiments]
    zoos = {(kind, zoo.KINDS[kind].seed or seed): None for some in pairs for kind, seed in some}
    (made,) = _found([("zoo", _make_only, list(zoos))], options)
    found = _found(
        [(one.script, one.measure, some) for one, some in zip(experiments, pairs, strict=True)],
        options,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for one, measured in zip(experiments, found, strict=True):
        results = kept_results(options.out / f"{one.script}.json", one) | {
            kind: [measured[kind, seed]["measured"] for seed in one.seeds] for kind in one.kinds
        }
        write(options.out, one.script, one.seeds, minutes(measured), **one.about, results=results)
    return minutes(made)


def kept_results(path: Path, experiment: Experiment) -> dict[str, Any]:
    """What was written of other zoos with the same seeds."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found["results"] if found["seeds"] == list(experiment.seeds) else {}


def write(out: Path, script: str, seeds: Sequence[int], minutes: float, **more: Any) -> None:
    """Write ``<script>.json``: the command, what it ran on, and the results."""
    result = {
        "command": f"python -m benchmarks paper.{script}",
        "seeds": seeds,
        "minutes": round(minutes, 1),
        "versions": {name: version(name) for name in ("sksoup", "torch", "scikit-learn")},
        **more,
    }
    path = out / f"{script}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {result['minutes']} minutes of processor time", flush=True)


def minutes(found: Found) -> float:
    return sum(one["seconds"] for one in found.values()) / 60


def _make_only(made: zoo.Zoo, seed: int) -> dict[str, Any]:
    return {}


def _found(
    wanted: Sequence[tuple[str, Measure, Sequence[tuple[str, int]]]], options: argparse.Namespace
) -> list[Found]:
    """What each of the scripts measured of its pairs of a kind and a seed; all side by side."""
    folder = options.folder / "measured"
    paths = [
        {(kind, seed): folder / script / f"{kind}-{seed}.json" for kind, seed in pairs}
        for script, _, pairs in wanted
    ]
    Parallel(n_jobs=options.jobs)(
        delayed(_measure)(measure, zoo.KINDS[kind], seed, options.folder, path)
        for (_, measure, _), some in zip(wanted, paths, strict=True)
        for (kind, seed), path in some.items()
        if not path.exists()
    )
    return [{pair: json.loads(path.read_text()) for pair, path in some.items()} for some in paths]


def _measure(measure: Measure, kind: zoo.Kind, seed: int, folder: Path, path: Path) -> None:
    """Measure one zoo; keep what was found, and the processor time it took."""
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


def log_loss(soup: Any, rows: tuple[Any, Any]) -> float:
    """Cross-entropy of the probabilities, which scikit-learn clips to what their dtype tells."""
    X, y = rows
    labels = soup.classes_
    return round(float(sklearn_log_loss(np.asarray(y), soup.predict_proba(X), labels=labels)), 5)


def scores(soup: Any, made: zoo.Zoo, rows: tuple[Any, Any] | None = None) -> dict[str, Any] | None:
    """Fit on the held-out rows, or on these of them; None where the search diverged."""
    rows = made.val if rows is None else rows
    try:
        soup.fit(made.checkpoints, *rows)
    except DivergenceError:
        return None
    return {
        "held_out": percent(soup, rows),
        "test": percent(soup, made.test),
        "log_loss": log_loss(soup, made.test),
    }


def systems(n_checkpoints: int, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """The systems of these names, unfitted: the papers' ten, and those with a center of their own.

    Learned-Soup is the paper's; "centered" is that with the defaults of `LearnedSoup`.
    """
    every = {
        **paper_systems(n_checkpoints, random_state=seed),
        **centered_systems(n_checkpoints, random_state=seed),
        "Learned-Soup, centered": LearnedSoup(random_state=seed),
        "Learned-Soup+, centered": LearnedSoup(layerwise=True, random_state=seed),
    }
    return {name: every[name] for name in names}


def draw_rows(rows: tuple[Any, Any], n: int, seed: int) -> tuple[Any, Any]:
    """Draw n rows, stratified by label."""
    X, y = rows
    if n >= len(y):
        return rows
    drawn, _ = train_test_split(np.arange(len(y)), train_size=n, stratify=y, random_state=seed)
    if isinstance(X, Mapping):
        return {name: values[drawn] for name, values in X.items()}, y[drawn]
    return X[drawn], y[drawn]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % confidence interval by Student's t."""
    n = len(values)
    if n < 2:
        return statistics.mean(values), float("nan")
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / np.sqrt(n)
    return statistics.mean(values), float(half)
