"""Folders that hold failures: a fifth of the ingredients fine-tuned at a hundred times the rate.

    python -m benchmarks paper.diverged [--folder zoos] [--kinds diverged] [--seeds ...]

Test accuracy of each recipe on all 20 ingredients, what fitting warns of, and the accuracy without
the ingredients it names.
"""

from __future__ import annotations

import warnings
from typing import Any

from sksoup import BestCheckpoint, GreedySoup, MEHLSoup, UniformSoup

from ..zoo import FAILED, Zoo
from . import common


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    plus = {"layerwise": True, "model_batch_size": len(zoo.checkpoints) // 4, "random_state": seed}
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
            test[name] = common.percent(soup.fit(zoo.checkpoints, *zoo.val), zoo.test)
        if name == "MEHL-Soup+":
            said = " ".join(str(warning.message) for warning in caught)
    named = [name for name in zoo.checkpoints if repr(name) in said]
    rest = zoo.checkpoints.drop(named) if named else zoo.checkpoints
    soup = MEHLSoup(**plus).fit(rest, *zoo.val)
    test["MEHL-Soup+ without those named"] = common.percent(soup, zoo.test)
    return {"test": test, "named": named, "failed": list(FAILED), "warning": said}


EXPERIMENT = common.Experiment("diverged", measure, ["diverged"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
