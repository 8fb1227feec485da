"""Few held-out rows: what is left of each system with 50 to 1,000 of them.

    python -m benchmarks paper.few_rows [--folder zoos] [--kinds convnet vit] [--seeds ...]

Test accuracy and test log-loss of systems fitted on rows that are drawn from the held-out ones,
stratified by label; all systems of a seed have the same rows.
"""

from __future__ import annotations

from typing import Any

from ..zoo import Zoo
from . import common

ROWS = (50, 100, 200, 400, 1000)
SYSTEMS = ("Best checkpoint", "Greedy-Soup", "MEHL-Soup+", "Centered-Soup", "Centered-Soup+")


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    found = {}
    for n in ROWS:
        rows = common.draw_rows(zoo.val, n, seed)
        systems = common.systems(len(zoo.checkpoints), seed, SYSTEMS)
        found[str(n)] = {name: common.scores(soup, zoo, rows) for name, soup in systems.items()}
    return found


EXPERIMENT = common.Experiment("few_rows", measure, ["convnet", "vit"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
