"""Which defaults: variants of MEHL-Soup+ on development zoos, which no published table uses.

    python -m benchmarks paper.defaults [--folder zoos] [--kinds convnet vit] [--seeds 100 101 102]

Test accuracy of each variant; and how many held-out rows layer-wise coefficients need.
"""

from __future__ import annotations

from typing import Any

from sklearn.model_selection import train_test_split

from sksoup import GreedySoup, MEHLSoup

from ..zoo import DEVELOPMENT_SEEDS, Zoo
from . import common

VARIANTS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "lr=0.01": {"lr": 0.01},
    "lr=0.02": {"lr": 0.02},
    "lr=0.1": {"lr": 0.1},
    "lr=0.2": {"lr": 0.2},
    "normalize, lr=0.01": {"normalize": True, "lr": 0.01},
    "normalize, lr=0.05": {"normalize": True, "lr": 0.05},
    "normalize, lr=0.1": {"normalize": True, "lr": 0.1},
    "start='greedy'": {"start": "greedy"},
    "start='best'": {"start": "best"},
    "validation_fraction=0.2": {"validation_fraction": 0.2},
    "weight_decay=0.01": {"weight_decay": 0.01},
    "weight_decay=0.1": {"weight_decay": 0.1},
    "weight_decay=1": {"weight_decay": 1.0},
    "schedule='constant'": {"schedule": "constant"},
    "max_epochs=2": {"max_epochs": 2},
    "max_epochs=10": {"max_epochs": 10},
    "max_epochs=20": {"max_epochs": 20},
    "model_epochs=2": {"model_epochs": 2},
    "batch_size=32": {"batch_size": 32},
    "optimizer='sgd', lr=1": {"optimizer": "sgd", "lr": 1.0},
    "MEHL-Soup, one row": {"layerwise": False},
}
ROWS = (50, 100, 200, 400, 1000)


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    b = -(-len(zoo.checkpoints) // 4)
    base = MEHLSoup(zoo.checkpoints, layerwise=True, model_batch_size=b, random_state=seed)
    variants = {}
    for name, params in VARIANTS.items():
        soup = type(base)(**{**base.get_params(deep=False), **params}).fit(*zoo.val)
        variants[name] = [common.percent(soup, zoo.val), common.percent(soup, zoo.test)]
    rows = {}
    for n in ROWS:
        X, y = zoo.val
        if n < len(y):
            X, _, y, _ = train_test_split(X, y, train_size=n, stratify=y, random_state=seed)
        soups = {
            "Greedy-Soup": GreedySoup(zoo.checkpoints),
            "MEHL-Soup": base.__class__(**{**base.get_params(deep=False), "layerwise": False}),
            "MEHL-Soup+": base,
        }
        rows[str(n)] = {
            name: common.percent(soup.fit(X, y), zoo.test) for name, soup in soups.items()
        }
    return {"variants": variants, "rows": rows}


EXPERIMENT = common.Experiment("defaults", measure, ["convnet", "vit"], DEVELOPMENT_SEEDS)


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
