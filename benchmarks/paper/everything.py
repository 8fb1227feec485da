"""Every table of the page, from nothing: the zoos, the experiments on them, the page.

    python benchmarks/paper/everything.py [--folder zoos]

All but the experiments that chose the defaults, which have zoos of their own (`defaults.py`).
"""

from __future__ import annotations

import time

import ablations
import appendix_c
import common
import diverged
import table_3
import tables_1_2
import zoo

EXPERIMENTS = [
    module.EXPERIMENT for module in (tables_1_2, table_3, ablations, appendix_c, diverged)
]

if __name__ == "__main__":
    options = common.arguments(__doc__).parse_args()
    from_nothing = not (options.folder / "measured").exists()
    begin = time.perf_counter()
    minutes = common.run(EXPERIMENTS, options)
    elapsed = (time.perf_counter() - begin) / 60
    print(f"{elapsed:.1f} minutes, {minutes:.1f} of processor time for the zoos")
    if from_nothing:
        common.write(options.out, "everything", zoo.SEEDS, minutes, elapsed=round(elapsed, 1),
                     jobs=options.jobs)  # fmt: skip
