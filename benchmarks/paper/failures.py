"""One failed ingredient among 24 good ones: eleven ways to fail.

    python -m benchmarks paper.failures [--folder zoos] [--kinds convnet vit] [--seeds ...]

Held-out and test accuracy, and test log-loss, of each system on the first 24 ingredients of a zoo
and one that failed; and on the 24 alone.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

from ..zoo import N_FAILURES_ZOO, Zoo
from . import common

SYSTEMS = ("Greedy-Soup", "Learned-Soup, centered", "Centered-Soup", "Centered-Soup+")


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    if zoo.failures is None:
        raise SystemExit("Failures are made for the kinds convnet and vit.")
    healthy = zoo.checkpoints.select(zoo.checkpoints.names[:N_FAILURES_ZOO])
    found = {}
    with tempfile.TemporaryDirectory() as memory:  # so that no ingredient is ranked twice
        for failure, checkpoints in {"none": healthy, **zoo.failures()}.items():
            systems = common.systems(len(checkpoints), seed, SYSTEMS)
            systems["Greedy-Soup"].set_params(memory=memory)
            here = replace(zoo, checkpoints=checkpoints)
            found[failure] = {name: common.scores(soup, here) for name, soup in systems.items()}
    return found


EXPERIMENT = common.Experiment("failures", measure, ["convnet", "vit"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
