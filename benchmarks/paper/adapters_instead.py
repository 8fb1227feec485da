"""What a sceptic would do with LoRA adapters instead of a soup of them.

    python -m benchmarks paper.adapters_instead [--folder zoos] [--seeds ...]

On the zoo of `paper.adapters`: the hyper-parameters of the adapter that is best on the held-out
rows, trained again on the training and the held-out rows; the mean of the factors A and B, as
peft's "linear" combines them; peft's own "cat" with equal weights, and how far its weights are from
those of Uniform-Soup, which it should be. Accuracy, log-loss, seconds of processor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sksoup import BestCheckpoint, CheckpointCollection, UniformSoup

from .. import lora
from ..zoo import Zoo
from . import common


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Scores of every baseline, and seconds to make it."""
    lora.quiet()
    adapters, retrain = zoo.checkpoints, zoo.retrain
    if retrain is None:
        raise ValueError("this zoo can't train again")
    best = BestCheckpoint().fit(adapters, *zoo.val).ingredients_[0]
    paths = [path for name in adapters if (path := adapters.path(name)) is not None]
    folder: Path = paths[0].parent
    baselines: Mapping[str, Callable[[], Mapping[str, torch.Tensor]]] = {
        "best trained again": lambda: retrain(best),
        "mean of the factors": lambda: lora.mean_of_factors(folder, paths),
        "peft's cat": lambda: lora.combined_by_peft(folder, paths),
    }
    found: dict[str, Any] = {}
    for name, make in baselines.items():
        begin = time.process_time()
        state = make()
        seconds = time.process_time() - begin
        alone = Zoo(CheckpointCollection([state], module=adapters.module), zoo.val, zoo.test)
        scored = common.scores(BestCheckpoint(), alone)
        found[name] = scored and scored | {"seconds": seconds}
    uniform = UniformSoup().fit(adapters, *zoo.val).state_dict()
    gap = max(float((uniform[name] - value).abs().max()) for name, value in state.items())
    return {"systems": found, "best": best, "cat_differs_from_uniform_by": gap}


EXPERIMENT = common.Experiment("adapters_instead", measure, ["lora"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
