"""Every table of the page, from nothing: the zoos, the experiments on them, the page.

    python -m benchmarks paper.everything [--folder zoos] [--kinds ...]

All but the experiments that chose the defaults, which have zoos of their own (`paper.defaults`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from . import (
    ablations,
    adapters,
    adapters_instead,
    amounts,
    appendix_c,
    common,
    diverged,
    failures,
    few_rows,
    language,
    shift,
    shift_memory,
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
        shift,
        shift_memory,
        amounts,
    )
]


def of_kinds(kinds: Sequence[str]) -> list[common.Experiment]:
    """The experiments on these zoos."""
    chosen = [
        replace(one, kinds=[kind for kind in one.kinds if kind in kinds]) for one in EXPERIMENTS
    ]
    return [one for one in chosen if one.kinds]


def main() -> None:
    parser = common.arguments(__doc__)
    kinds = list(dict.fromkeys(kind for one in EXPERIMENTS for kind in one.kinds))
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, help="zoos")
    options = parser.parse_args()
    begin = time.perf_counter()
    minutes = common.run(of_kinds(options.kinds), options)
    elapsed = (time.perf_counter() - begin) / 60
    print(f"{elapsed:.1f} minutes, {minutes:.1f} of processor time for the zoos")


if __name__ == "__main__":
    main()
