"""Every table of the page, from nothing: the zoos, the experiments on them, the page.

    python -m benchmarks paper.everything [--folder zoos]

All but the experiments that chose the defaults, which have zoos of their own (`paper.defaults`).
"""

from __future__ import annotations

import time

from . import (
    ablations,
    adapters,
    adapters_instead,
    appendix_c,
    common,
    diverged,
    failures,
    few_rows,
    language,
    table_3,
    tables_1_2,
)

EXPERIMENTS = [
    module.EXPERIMENT
    for module in (
        tables_1_2,
        table_3,
        ablations,
        appendix_c,
        diverged,
        failures,
        few_rows,
        adapters,
        adapters_instead,
        language,
    )
]


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    begin = time.perf_counter()
    minutes = common.run(EXPERIMENTS, options)
    elapsed = (time.perf_counter() - begin) / 60
    print(f"{elapsed:.1f} minutes, {minutes:.1f} of processor time for the zoos")


if __name__ == "__main__":
    main()
