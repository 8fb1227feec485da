"""Table 3 of the paper in kind: the best ingredients removed; and fewer ingredients at all.

    python -m benchmarks paper.table_3 [--folder zoos] [--kinds convnet vit] [--seeds ...]

Test accuracy of the best checkpoint, Greedy-Soup, MEHL-Soup+ and Centered-Soup+ without the n that
score best on the held-out rows; and with the first n of the zoo, the curve of fine-tuning cost.
"""

from __future__ import annotations

import tempfile
from typing import Any

from sksoup import BestCheckpoint, CheckpointCollection

from ..zoo import Zoo
from . import common

REMOVED = (0.0, 1 / 8, 1 / 4, 1 / 2)  # parts of the zoo
SYSTEMS = ("Best checkpoint", "Greedy-Soup", "MEHL-Soup+", "Centered-Soup+")
KEPT = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    checkpoints, names = zoo.checkpoints, zoo.checkpoints.names
    K = len(names)
    with tempfile.TemporaryDirectory() as memory:
        best = BestCheckpoint(memory=memory).fit(checkpoints, *zoo.val)
        scores = best.individual_scores_
        ranked = sorted(names, key=lambda name: -scores[name])

        def soups(some: CheckpointCollection) -> dict[str, float]:
            systems = common.systems(len(some), seed, SYSTEMS)
            for name in ("Best checkpoint", "Greedy-Soup"):
                systems[name].set_params(memory=memory)
            return {
                name: common.percent(soup.fit(some, *zoo.val), zoo.test)
                for name, soup in systems.items()
            }

        removed = {}
        for part in REMOVED:
            n = round(part * K)
            removed[str(n)] = soups(checkpoints.drop(ranked[:n]) if n else checkpoints)
        kept = {}
        for part in KEPT:
            n = round(part * K)
            kept[str(n)] = removed["0"] if n == K else soups(checkpoints.select(names[:n]))
    return {"removed": removed, "kept": kept, "scores": list(scores.values())}


EXPERIMENT = common.Experiment("table_3", measure, ["convnet", "vit"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
