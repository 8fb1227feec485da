"""All systems under distribution shift: clean rows, shifted ones, their mean and the worst.

    python -m benchmarks paper.shift [--folder zoos] [--kinds ...] [--seeds 10 11 12]

Beside the papers' ten systems and the two with a center of their own: Model Stock, the pruned soup
and WiSE-FT of Centered-Soup+, half of the way from the start and where the held-out rows like it
best. Held-out rows stay clean. Accuracy, log-loss and calibration error (15 bins of equal width) on
each test set; seconds of processor time and passes of the fit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from sksoup import DivergenceError, ModelStockSoup, PrunedSoup
from sksoup.inspection import centered_systems, interpolation_path, paper_systems

from ..zoo import Zoo
from . import common

CENTERED = "Centered-Soup+"
BINS = 15


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Scores of every system on every test set."""
    if zoo.shifted is None:
        raise ValueError("this zoo has no shifted rows")
    tests, systems = {"clean": zoo.test, **zoo.shifted()}, every_system(zoo, seed)
    found: dict[str, Any] = {}
    for name, soup in systems.items():
        begin = time.process_time()
        try:
            soup.fit(zoo.checkpoints, *zoo.val)
        except DivergenceError:
            found[name] = None
            continue
        found[name] = described(soup, time.process_time() - begin, tests, zoo)
    path = interpolation_path(zoo.start, systems[CENTERED], *zoo.val)
    for name, t in (("WiSE-FT, t = 0.5", 0.5), ("WiSE-FT, best t", path.best_t)):
        soup = systems[CENTERED].interpolate(zoo.start, t)
        found[name] = described(soup, found[CENTERED]["seconds"], tests, zoo) | {"t": t}
    return {"systems": found, "path": {"t": path.t.tolist(), "held_out": path.scores.tolist()}}


def every_system(zoo: Zoo, seed: int) -> dict[str, Any]:
    """All systems, unfitted, but for WiSE-FT, which begins with a fitted soup."""
    if zoo.start is None:
        raise ValueError("this zoo has no start")
    n = len(zoo.checkpoints)
    return {
        **paper_systems(n, random_state=seed),
        **centered_systems(n, random_state=seed),
        "Pruned-Soup": PrunedSoup(),
        "Model Stock": ModelStockSoup(start=zoo.start),
    }


def described(
    soup: Any, seconds: float, tests: Mapping[str, tuple[Any, Any]], zoo: Zoo
) -> dict[str, Any]:
    n = len(zoo.val[1])
    counts = getattr(soup, "counts_", None)
    return {
        "held_out": common.percent(soup, zoo.val),
        "tests": {name: scores(soup, *rows) for name, rows in tests.items()},
        "seconds": round(seconds, 1),
        "forward": counts.rows_forward / n if counts else 0.0,
        "backward": counts.rows_backward / n if counts else 0.0,
        "n_ingredients": int(np.atleast_2d(soup.coef_).any(axis=0).sum()),
    }


def scores(soup: Any, X: Any, y: Any) -> dict[str, float]:
    """From one pass: accuracy in per cent, log-loss, calibration error."""
    probability, y = np.asarray(soup.predict_proba(X), dtype=np.float64), np.asarray(y)
    labels = np.asarray(soup.classes_)
    right = labels[probability.argmax(axis=1)] == y
    own = probability[np.arange(len(y)), np.searchsorted(labels, y)]
    least = np.finfo(np.float32).eps  # as scikit-learn clips float32
    return {
        "accuracy": round(100 * float(right.mean()), 3),
        "log_loss": round(float(-np.log(own.clip(least)).mean()), 5),
        "calibration": round(calibration_error(probability.max(axis=1), right), 5),
    }


def calibration_error(confidence: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    """Expected calibration error: |confidence - accuracy| of each bin, by its share of rows."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(right))


EXPERIMENT = common.Experiment(
    "shift",
    measure,
    ["photos", "photos-vit", "convnet", "vit", "resnet", "text"],
    seeds=(10, 11, 12),
)


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
