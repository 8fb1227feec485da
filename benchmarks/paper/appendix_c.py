"""Appendix C of the paper in kind: BatchNorm's statistics mixed, measured anew, or the better.

    python benchmarks/paper/appendix_c.py [--folder zoos] [--kinds resnet] [--seeds ...]

Test accuracy of every system that makes a soup, under each policy.
"""

from __future__ import annotations

from typing import Any

import common
import zoo

from sksoup.inspection import paper_systems


def measure(zoo: zoo.Zoo, seed: int) -> dict[str, Any]:
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

if __name__ == "__main__":
    common.main(EXPERIMENT, __doc__)
