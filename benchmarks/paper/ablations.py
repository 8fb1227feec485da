"""The paper's ablations in kind: model batch, iterations, differences against plain weights.

    python -m benchmarks paper.ablations [--folder zoos] [--kinds convnet vit] [--seeds ...]

Test accuracy of MEHL-Soup+. Differences are compared on the plain script (`reference.mehl`, a
constant learning rate), which can do without them.
"""

from __future__ import annotations

from typing import Any

import torch

from sksoup.inspection import paper_systems

from .. import reference
from ..zoo import Zoo
from . import common

LRS = (0.05, 0.01)  # of the script; plain weights are longer than differences


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    K = len(zoo.checkpoints)
    variants: dict[str, dict[str, Any]] = {"as it is": {}}
    variants |= {f"b = K / {n}": {"model_batch_size": -(-K // n)} for n in (8, 2, 1)}
    variants |= {"2 passes over the models": {"model_epochs": 2}}
    variants |= {f"{n} inner epochs": {"max_epochs": n} for n in (2, 10)}
    found = {}
    for name, change in variants.items():
        soup = paper_systems(K, random_state=seed)["MEHL-Soup+"].set_params(**change)
        found[name] = common.percent(soup.fit(zoo.checkpoints, *zoo.val), zoo.test)
    for lr in LRS:
        for differences in (True, False):
            name = f"script, {'differences' if differences else 'plain weights'}, lr={lr}"
            found[name] = script(zoo, seed, lr, differences)
    return found


def script(zoo: Zoo, seed: int, lr: float, differences: bool) -> float:
    """Test accuracy of Algorithm 1 as a script."""
    states = list(zoo.checkpoints.values())
    module = zoo.checkpoints.build_module().eval()
    (X, y), (X_test, y_test) = (
        (torch.as_tensor(X), torch.as_tensor(y)) for X, y in (zoo.val, zoo.test)
    )
    torch.manual_seed(seed)
    K = len(states)
    soup = reference.mehl(
        module, lambda k: dict(states[k]), K, X, y, 128, b=-(-K // 4), layerwise=True, lr=lr,
        max_epochs=5, differences=differences,
    )  # fmt: skip
    module.load_state_dict(soup, strict=False)
    return round(100 * reference.accuracy(module, X_test, y_test, 128), 4)


EXPERIMENT = common.Experiment("ablations", measure, ["convnet", "vit"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
