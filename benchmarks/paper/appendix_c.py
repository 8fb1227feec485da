"""Appendix C of the paper in kind: BatchNorm's statistics mixed, measured anew, or the better.

    python -m benchmarks paper.appendix_c [--folder zoos] [--kinds resnet] [--seeds ...]

Test accuracy of every system that makes a soup, under each policy.
"""

from __future__ import annotations

from typing import Any

from sksoup.inspection import paper_systems

from ..zoo import Zoo
from . import common


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {}
    for name, soup in paper_systems(len(zoo.checkpoints), random_state=seed).items():
        if "batch_norm" not in soup.get_params():
            continue
        found[name] = {}
        for policy in ("average", "recalibrate", "auto"):
            soup.set_params(batch_norm=policy).fit(zoo.checkpoints, *zoo.val)
            found[name][policy] = common.percent(soup, zoo.test)
    return found


EXPERIMENT = common.Experiment("appendix_c", measure, ["resnet"])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
