"""How many held-out rows, how many ingredients: what a soup of photographs gains with fewer.

    python -m benchmarks paper.amounts [--folder zoos] [--seeds 10 11 12]

Test accuracy with 50 to 2,000 held-out rows and all ingredients, and with 1,000 rows and the first
3 to 24 ingredients of the zoo.
"""

from __future__ import annotations

from typing import Any

from ..zoo import Zoo
from . import common

ROWS = (50, 100, 200, 500, 1000, 2000)
INGREDIENTS = (3, 6, 12, 18, 24)
SYSTEMS = ("Best checkpoint", "Greedy-Soup", "Centered-Soup", "Centered-Soup+")


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    names = zoo.checkpoints.names
    rows = {
        str(n): accuracies(zoo, len(names), common.draw_rows(zoo.more or zoo.val, n, seed), seed)
        for n in ROWS
    }
    ingredients = {str(n): accuracies(zoo, n, zoo.val, seed) for n in INGREDIENTS}
    return {"rows": rows, "ingredients": ingredients}


def accuracies(zoo: Zoo, n: int, rows: tuple[Any, Any], seed: int) -> dict[str, float]:
    """Of soups of the first n ingredients, fitted on these rows."""
    some = zoo.checkpoints.select(zoo.checkpoints.names[:n])
    return {
        name: common.percent(soup.fit(some, *rows), zoo.test)
        for name, soup in common.systems(n, seed, SYSTEMS).items()
    }


EXPERIMENT = common.Experiment("amounts", measure, ["photos"], seeds=(10, 11, 12))


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
