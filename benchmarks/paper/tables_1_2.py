"""Tables 1 and 2 of the paper in kind: what all systems reach and what they cost.

    python -m benchmarks paper.tables_1_2 [--folder zoos] [--kinds ...] [--seeds 10 11 12 13 14]

The papers' ten systems and `MEHLSoup` with its defaults, one number per checkpoint and one per
layer. Held-out and test accuracy and log-loss, seconds of construction (a thread each, the machine
is shared), passes over the held-out rows, and, with the first seed, the peak of live tensors beyond
the module, in models. Also Figure 1: the share of the learned coefficients outside [0, 1].
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from sksoup.inspection import centered_systems, compare_soups, paper_systems

from ..zoo import SEEDS, Zoo
from . import common

LEARNED = (
    "Learned-Soup", "Learned-Soup+", "HL-Soup", "HL-Soup+", "MEHL-Soup", "MEHL-Soup+",
    "Centered-Soup", "Centered-Soup+",
)  # fmt: skip
EDGES = np.linspace(-1.0, 1.0, 41)  # of the histogram; the rest goes to the outer bins


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    K = len(zoo.checkpoints)
    recipes = {**paper_systems(K, random_state=seed), **centered_systems(K, random_state=seed)}
    found = compare_soups(
        zoo.checkpoints, *zoo.val, *zoo.test, recipes=recipes,
        measure_memory=seed == SEEDS[0],
    )  # fmt: skip
    systems = {}
    for result in found.results:
        soup = found.soups[result.system]
        epochs = len({(r.get("outer", 0), r["epoch"]) for r in soup.history_ if "epoch" in r})
        systems[result.system] = {
            **asdict(result),
            "epochs": epochs,
            "held_out_log_loss": common.log_loss(soup, zoo.val),
            "log_loss": common.log_loss(soup, zoo.test),
        }
    coefficients = {}
    for name in LEARNED:
        coef = np.atleast_2d(found.soups[name].coef_)
        counts, _ = np.histogram(np.clip(coef, EDGES[0], EDGES[-1]), EDGES)
        coefficients[name] = {
            "outside": float(((coef < 0) | (coef > 1)).mean()),
            "least": float(coef.min()),
            "most": float(coef.max()),
            "histogram": counts.tolist(),
        }
    return {"systems": systems, "coefficients": coefficients}


EXPERIMENT = common.Experiment(
    "tables_1_2", measure, ["text", "vit", "convnet", "resnet"], about={"edges": EDGES.tolist()}
)


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
