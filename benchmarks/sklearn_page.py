"""The gain of the soup on the page "scikit-learn and skorch" with other seeds than the page's.

    python -m benchmarks sklearn_page [--seeds 1 2 3 4 5 6]

Runs the first two blocks of the page, on one thread, with each seed for every ``random_state`` of
the second one: the split, the candidates and the soup.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import warnings
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch

PAGE = Path(__file__).parents[1] / "docs" / "sklearn.rst"
BLOCK = re.compile(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    pretrain, search = map(dedent, BLOCK.findall(PAGE.read_text("utf-8"))[:2])
    for seed in seeds:
        print(f"seed {seed}", flush=True)
        run([pretrain, search.replace("random_state=0", f"random_state={seed}")])


def run(blocks: list[str]) -> None:
    """Run blocks of code in an empty folder, one after the other."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        warnings.simplefilter("ignore")  # such as that the soup is the best candidate
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), found)


if __name__ == "__main__":
    main()
