"""The programs that the pages on stopping, ranks and Dask show, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from sksoup import Recipe

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*args: str) -> str:
    """Run it to its end; what it said."""
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stop_and_resume(tmp_path):
    program = str(EXAMPLES / "fit_and_resume.py")
    first, again = (run(program, str(tmp_path / "memory")).split() for _ in range(2))
    assert int(first[0]) > 0
    assert again[0] == "0"
    assert again[1:] == first[1:]  # accuracy and coefficients


def test_several_ranks(tmp_path):
    out = str(tmp_path / "soup.safetensors")
    said = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(EXAMPLES / "fit_on_ranks.py"), out)  # fmt: skip
    assert "rank 0 of 2: 10000 rows, 84 numbers sent a step" in said  # 6 models, 14 layers
    assert "rank 1 of 2: 10000 rows, 84 numbers sent a step" in said
    assert Recipe.load(out).method == "MEHLSoup"


def test_a_dask_cluster():
    said = run(str(EXAMPLES / "fit_on_dask.py"))
    assert "same scores: True" in said
    assert "same soup: True" in said
