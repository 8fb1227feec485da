"""Soups of LoRA adapters of a pretrained text encoder.

    python -m benchmarks paper.adapters [--folder zoos] [--seeds ...]

16 adapters (peft) with drawn ranks, scales, targets, rates and epochs, all of one base; the
held-out and the test rows are cut anew for every seed. Accuracy, log-loss, seconds of processor
time, bytes. What a sceptic would do instead is in `paper.adapters_instead`.
"""

from __future__ import annotations

import time
from typing import Any

from .. import lora
from ..zoo import Zoo
from . import common

SYSTEMS = (
    "Best checkpoint", "Uniform-Soup", "Greedy-Soup", "Learned-Soup", "Learned-Soup+", "HL-Soup",
    "HL-Soup+", "MEHL-Soup", "MEHL-Soup+", "Ensemble", "Centered-Soup", "Centered-Soup+",
)  # fmt: skip


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Scores of every system, and seconds to find it."""
    lora.quiet()
    adapters = zoo.checkpoints
    found: dict[str, Any] = {}
    for name, soup in common.systems(len(adapters), seed, SYSTEMS).items():
        begin = time.process_time()
        scored = common.scores(soup, zoo)
        found[name] = scored and scored | {"seconds": time.process_time() - begin}
    paths = [path for name in adapters if (path := adapters.path(name)) is not None]
    held = sum(file.stat().st_size for path in paths for file in path.glob("*.safetensors"))
    return {"systems": found, "adapter_bytes": held, "model_bytes": adapters.nbytes}


EXPERIMENT = common.Experiment("adapters", measure, ["lora"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
