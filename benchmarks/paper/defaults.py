"""Which defaults: variants of MEHLSoup on development zoos, which no published table uses.

    python -m benchmarks paper.defaults [--folder zoos] [--kinds ...] [--seeds 100 101 102]

Test accuracy, test log-loss and passes over the held-out rows of each variant, on the zoos as they
are and with five ruined ingredients added; and what the weight decay does with few held-out rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sksoup import CheckpointCollection, MEHLSoup

from ..zoo import DEVELOPMENT_SEEDS, Zoo, with_noise
from . import common

VARIANTS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "center='mean'": {"center": "mean"},
    "center='top'": {"center": "top"},
    "center='best'": {"center": "best"},
    "center='greedy'": {"center": "greedy"},
    "ranking_rows=64": {"ranking_rows": 64},
    "ranking_rows=128": {"ranking_rows": 128},
    "ranking_rows=256": {"ranking_rows": 256},
    "ranking_rows=1000, all": {"ranking_rows": 1000},
    "clip_deltas=None": {"clip_deltas": None},
    "clip_deltas='median'": {"clip_deltas": "median"},
    "weight_decay=0": {"weight_decay": 0.0},
    "weight_decay=0.3": {"weight_decay": 0.3},
    "weight_decay=1": {"weight_decay": 1.0},
    "weight_decay=3": {"weight_decay": 3.0},
    "weight_decay='auto'": {"weight_decay": "auto"},
    "max_epochs=5": {"max_epochs": 5},
    "max_epochs=10": {"max_epochs": 10},
    "lr=0.02": {"lr": 0.02},
    "lr=0.05": {"lr": 0.05},
    "lr=0.1": {"lr": 0.1},
    "one number per checkpoint": {"layerwise": False},
    "model_batch_size=None": {"model_batch_size": None},
    "model_batch_size=K/4": {"model_batch_size": 4},  # parts of K
}
RUINED = (0.5, 1, 5, 10, 20)  # noise, in root mean squares of the tensors
FEW_ROWS = (50, 100, 200)


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    zoos = {"clean": zoo, "ruined": replace(zoo, checkpoints=with_ruined(zoo.checkpoints))}
    found: dict[str, Any] = {}
    for condition, one in zoos.items():
        found[condition] = {
            name: with_passes(variant(change, len(one.checkpoints), seed), one)
            for name, change in VARIANTS.items()
            if not change or (not is_default(change) and matters(condition, change))
        }
    return {**found, "rows": few_rows(zoo, seed)}


def with_ruined(checkpoints: CheckpointCollection) -> CheckpointCollection:
    """Add copies of the first five, with noise."""
    noisy = {
        f"ruined-{times:g}": with_noise(checkpoints[name], times)
        for name, times in zip(checkpoints.names, RUINED, strict=False)
    }
    return CheckpointCollection({**checkpoints, **noisy}, module=checkpoints.build_module)


def variant(change: dict[str, Any], n_checkpoints: int, seed: int) -> MEHLSoup:
    params = {"layerwise": True, "random_state": seed, **change}
    if params.get("model_batch_size") is not None:
        params["model_batch_size"] = -(-n_checkpoints // params["model_batch_size"])
    return MEHLSoup(**params)


def matters(condition: str, change: dict[str, Any]) -> bool:
    """Whether a variant is measured: with ruined ingredients, what may be ruined by them."""
    return condition == "clean" or bool({"center", "clip_deltas", "ranking_rows"} & set(change))


def is_default(change: dict[str, Any]) -> bool:
    default = MEHLSoup(layerwise=True).get_params(deep=False)
    return all(default[name] == value for name, value in change.items())


def with_passes(soup: MEHLSoup, zoo: Zoo) -> dict[str, Any] | None:
    found = common.scores(soup, zoo)
    if found is not None:
        n_rows = soup.counts_.rows_forward + soup.counts_.rows_backward
        found["passes"] = round(n_rows / len(zoo.val[1]), 2)
    return found


def few_rows(zoo: Zoo, seed: int) -> dict[str, Any]:
    K, found = len(zoo.checkpoints), {}
    for n in FEW_ROWS:
        systems = {
            **common.systems(K, seed, ("Greedy-Soup", "MEHL-Soup+", "Centered-Soup+")),
            "weight_decay=1": variant({"weight_decay": 1.0}, K, seed),
            "weight_decay='auto'": variant({"weight_decay": "auto"}, K, seed),
        }
        rows = common.draw_rows(zoo.val, n, seed)
        found[str(n)] = {name: common.scores(soup, zoo, rows) for name, soup in systems.items()}
    return found


EXPERIMENT = common.Experiment("defaults", measure, ["convnet", "vit"], DEVELOPMENT_SEEDS)


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
