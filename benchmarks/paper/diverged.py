"""Folders that hold failures: a fifth of the ingredients fine-tuned at a hundred times the rate.

    python benchmarks/paper/diverged.py [--folder zoos] [--kinds convnet] [--seeds ...]

Test accuracy of each recipe on all 20 ingredients, what fitting warns of, and the accuracy without
the ingredients it names.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import zoo
from zoos import fine_tune_each

from sksoup import BestCheckpoint, GreedySoup, MEHLSoup, UniformSoup
from sksoup.datasets import DigitsConvNet, _digits, _draw

K, FAILED = 20, ("ft03", "ft08", "ft13", "ft18")


def failing(folder: Path, n: int, seed: int) -> zoo.Zoo:
    tunings = {f"ft{k:02d}": _draw(seed, k) for k in range(n)}
    for name in FAILED:
        tunings[name] = replace(tunings[name], lr=100 * tunings[name].lr)
    here, data = folder / f"diverged-{seed}", _digits(seed)
    checkpoints = fine_tune_each(here, tunings, seed, DigitsConvNet, 8)
    return zoo.Zoo(checkpoints, data["val"], data["test"])


def measure(found: zoo.Zoo, seed: int) -> dict[str, Any]:
    plus = {"layerwise": True, "model_batch_size": K // 4, "random_state": seed}
    recipes = {
        "Best checkpoint": BestCheckpoint(),
        "Uniform-Soup": UniformSoup(),
        "Greedy-Soup": GreedySoup(),
        "MEHL-Soup+": MEHLSoup(**plus),
        "MEHL-Soup+ start='greedy'": MEHLSoup(start="greedy", **plus),
        "MEHL-Soup+ start='best'": MEHLSoup(start="best", **plus),
    }
    test = {}
    for name, soup in recipes.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            test[name] = common.percent(soup.fit(found.checkpoints, *found.val), found.test)
        if name == "MEHL-Soup+":
            said = " ".join(str(warning.message) for warning in caught)
    named = [name for name in found.checkpoints if repr(name) in said]
    rest = found.checkpoints.drop(named) if named else found.checkpoints
    soup = MEHLSoup(**plus).fit(rest, *found.val)
    test["MEHL-Soup+ without those named"] = common.percent(soup, found.test)
    return {"test": test, "named": named, "failed": list(FAILED), "warning": said}


zoo.KINDS["diverged"] = zoo.Kind("convolutional network, a fifth diverged", K, failing)
EXPERIMENT = common.Experiment("diverged", measure, ["diverged"])

if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__)
