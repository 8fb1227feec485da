"""The memory that the systems of `paper.shift` take, in sizes of one model.

    python -m benchmarks paper.shift_memory [--folder zoos] [--kinds ...]

Peak of the tensors alive during a fit beside the module and the held-out rows, counted one by one
by `compare_soups`. It depends on the network, the number of checkpoints and the minibatch, and
neither on the number of rows nor on the split: 256 rows of one split, in one epoch.
"""

from __future__ import annotations

from typing import Any

from sksoup.inspection import compare_soups

from ..zoo import Zoo
from . import common
from .shift import EXPERIMENT as SHIFT
from .shift import every_system

ROWS = 256


def measure(zoo: Zoo, seed: int) -> dict[str, Any]:
    rows = common.draw_rows(zoo.val, ROWS, seed)
    table = compare_soups(zoo.checkpoints, *rows, recipes=every_system(zoo, seed))
    return {result.system: result.extra_memory for result in table.results}


EXPERIMENT = common.Experiment("shift_memory", measure, SHIFT.kinds, seeds=SHIFT.seeds[:1])


def main() -> None:
    common.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    main()
