"""Soups of language models: perplexity on the docstrings of a package that none was pretrained on.

    python -m benchmarks paper.language [--folder zoos] [--kinds ...] [--seeds ...]

A GPT-2 of 2.6 million parameters is pretrained on the docstrings of eleven packages and fine-tuned
12 times on those of torch, all weights and LoRA adapters; the held-out and test rows are cut anew
for every seed. Beside the systems: the best fine-tuning's hyper-parameters trained again on the
training and the held-out rows. Perplexity of a token, seconds of processor time.
"""

from __future__ import annotations

import math
import time
from typing import Any

from sksoup import BestCheckpoint, CheckpointCollection, DivergenceError
from sksoup.inspection import centered_systems, paper_systems

from .. import lora
from ..zoo import Zoo
from . import common

TASK: Any = "language-modeling"
BATCH = 64


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Perplexities of every system, and seconds to find it."""
    lora.quiet()
    n = len(zoo.checkpoints)
    systems = {
        **paper_systems(n, task=TASK, random_state=seed),
        **centered_systems(n, task=TASK, random_state=seed),
    }
    found = {}
    for name, soup in systems.items():
        found[name] = scores(soup.set_params(batch_size=BATCH), zoo)
    best = systems["Best checkpoint"].ingredients_[0]
    if zoo.retrain is None:
        raise ValueError("this zoo can't train again")
    begin = time.process_time()
    state = zoo.retrain(best)
    seconds = time.process_time() - begin
    alone = Zoo(CheckpointCollection([state], module=zoo.checkpoints.module), zoo.val, zoo.test)
    again = scores(BestCheckpoint(task=TASK, batch_size=BATCH), alone)
    found["best trained again"] = again and again | {"seconds": seconds}
    return {"systems": found, "best": best}


def scores(soup: Any, zoo: Zoo) -> dict[str, float] | None:
    """Fit on the held-out rows; None where the search diverged."""
    begin = time.process_time()
    try:
        soup.fit(zoo.checkpoints, *zoo.val)
    except DivergenceError:
        return None
    seconds = time.process_time() - begin
    held_out, test = (round(math.exp(-soup.score(*rows)), 4) for rows in (zoo.val, zoo.test))
    return {"held_out": held_out, "test": test, "seconds": round(seconds, 2)}


EXPERIMENT = common.Experiment("language", measure, ["language", "language-lora"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
