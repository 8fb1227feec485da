"""Soups of LoRA adapters of a pretrained text encoder, and what a sceptic would do instead.

    python -m benchmarks paper.adapters [--folder zoos] [--seeds ...]

16 adapters (peft) with drawn ranks, scales, targets, rates and epochs, all of one base; the
held-out and the test rows are cut anew for every seed. Beside the systems: the best adapter's
hyper-parameters trained again on the training and the held-out rows; the mean of the factors A and
B; peft's own "cat" with equal weights. Accuracy, log-loss, seconds of processor time, bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sksoup import BestCheckpoint, CheckpointCollection

from .. import lora
from ..zoo import Zoo
from . import common

SYSTEMS = (
    "Best checkpoint", "Uniform-Soup", "Greedy-Soup", "Learned-Soup", "Learned-Soup+", "HL-Soup",
    "HL-Soup+", "MEHL-Soup", "MEHL-Soup+", "Ensemble", "Centered-Soup", "Centered-Soup+",
)  # fmt: skip


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Scores of every system and baseline; seconds to find and make each."""
    lora.quiet()
    adapters, test = zoo.checkpoints, {}
    found: dict[str, Any] = {}
    for name, soup in common.systems(len(adapters), seed, SYSTEMS).items():
        begin = time.process_time()
        scored = common.scores(soup, zoo)
        found[name] = scored and scored | {"seconds": time.process_time() - begin}
        test[name] = soup
    best = test["Best checkpoint"].ingredients_[0]
    folder = _folder(adapters)
    paths = [path for name in adapters if (path := adapters.path(name)) is not None]
    assert zoo.retrain is not None
    baselines: Mapping[str, Callable[[], Mapping[str, torch.Tensor]]] = {
        "best trained again": lambda: zoo.retrain(best),  # type: ignore[misc]
        "mean of the factors": lambda: lora.mean_of_factors(folder, paths),
        "peft's cat": lambda: lora.combined_by_peft(folder, paths),
    }
    for name, make in baselines.items():
        begin = time.process_time()
        state = make()
        seconds = time.process_time() - begin
        alone = Zoo(CheckpointCollection([state], module=adapters.module), zoo.val, zoo.test)
        scored = common.scores(BestCheckpoint(), alone)
        found[name] = scored and scored | {"seconds": seconds}
    gap = max(
        float((test["Uniform-Soup"].state_dict()[name] - value).abs().max())
        for name, value in state.items()
    )
    return {
        "systems": found, "best": best, "cat_differs_from_uniform_by": gap,
        "adapter_bytes": sum(
            file.stat().st_size for path in paths for file in path.glob("*.safetensors")
        ),
        "model_bytes": adapters.nbytes,
    }  # fmt: skip


def _folder(adapters: CheckpointCollection) -> Path:
    path = adapters.path(adapters.names[0])
    assert path is not None
    return path.parent


EXPERIMENT = common.Experiment("adapters", measure, ["lora"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
