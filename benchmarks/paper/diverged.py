"""Folders that hold failures: a fifth of the ingredients fine-tuned at a hundred times the rate.

    python -m benchmarks paper.diverged [--folder zoos] [--kinds diverged] [--seeds ...]

Test accuracy of each recipe on all 20 ingredients, what fitting MEHL-Soup+ warns of, and its
accuracy without the ingredients that the warning names. Centered-Soup+ is compared with Greedy-Soup
test row by test row.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from sksoup.inspection import paper_systems

from ..zoo import FAILED, Zoo
from . import common

SYSTEMS = (
    "Best checkpoint", "Uniform-Soup", "Greedy-Soup", "Learned-Soup", "Learned-Soup+",
    "Learned-Soup, centered", "Learned-Soup+, centered", "HL-Soup+", "MEHL-Soup+", "Ensemble",
    "Centered-Soup", "Centered-Soup+",
)  # fmt: skip
CENTERS = ("greedy", "best", "top", "mean")


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    systems = common.systems(len(zoo.checkpoints), seed, SYSTEMS)
    plus = systems["Centered-Soup+"].get_params(deep=False)
    recipes = {**systems, **{
        f"Centered-Soup+ center={center!r}": type(systems["Centered-Soup+"])(
            **{**plus, "center": center}
        )
        for center in CENTERS if center != plus["center"]
    }}  # fmt: skip
    test, said = {}, ""
    for name, soup in recipes.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = common.scores(soup, zoo)
        test[name] = None if found is None else found["test"]
        if name == "MEHL-Soup+":
            said = " ".join(str(warning.message) for warning in caught)
    named = [name for name in zoo.checkpoints if repr(name) in said]
    rest = zoo.checkpoints.drop(named) if named else zoo.checkpoints
    soup = paper_systems(len(rest), random_state=seed)["MEHL-Soup+"].fit(rest, *zoo.val)
    test["MEHL-Soup+ without those named"] = common.percent(soup, zoo.test)
    over_greedy = by_rows(systems["Centered-Soup+"], systems["Greedy-Soup"], zoo)
    return {"test": test, "named": named, "failed": list(FAILED), "warning": said,
            "over_greedy": over_greedy}  # fmt: skip


def by_rows(one: Any, other: Any, zoo: Zoo) -> dict[str, float]:
    """Difference in points and its standard error, paired by test row."""
    X, y = zoo.test
    correct = [np.asarray(soup.predict(X)) == np.asarray(y) for soup in (one, other)]
    differences = 100 * np.subtract(*(c.astype(float) for c in correct))
    return {"mean": float(differences.mean()),
            "standard_error": float(differences.std(ddof=1) / math.sqrt(len(y)))}  # fmt: skip


EXPERIMENT = common.Experiment("diverged", measure, ["diverged"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
