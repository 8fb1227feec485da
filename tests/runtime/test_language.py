"""Language models in jobs of several ranks, and fits that are stopped and started again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from sklearn.base import clone

from sksoup import CheckpointCollection, GreedySoup, MEHLSoup
from sksoup.runtime.cache import Cache

from ..language import build, checkpoints, texts

pytestmark = pytest.mark.filterwarnings("ignore::sksoup.SoupWarning")
TASK = "language-modeling"
SOUPS = {
    "greedy": GreedySoup(task=TASK, batch_size=7),
    "mehl": MEHLSoup(
        task=TASK, layerwise=True, model_batch_size=2, max_epochs=2, batch_size=7, random_state=0
    ),
}


def gpt2():
    return build("gpt2")


@pytest.fixture
def files(tmp_path) -> CheckpointCollection:
    saved = checkpoints("gpt2").save(tmp_path / "zoo")
    return CheckpointCollection(saved, module=gpt2)


@pytest.mark.parametrize("name", SOUPS)
def test_a_fit_that_was_stopped_goes_on_with_the_same_bits(tmp_path, files, name):
    X, y = texts("gpt2")
    plain = clone(SOUPS[name]).fit(files, X, y)
    soup = clone(SOUPS[name]).set_params(memory=tmp_path / "memory")
    keep, kept = Cache.keep, []

    def stop(self, value, *key, everywhere=False):
        keep(self, value, *key, everywhere=everywhere)
        kept.append(key)
        if len(kept) == 5:
            raise KeyboardInterrupt

    with patch.object(Cache, "keep", stop), pytest.raises(KeyboardInterrupt):
        soup.fit(files, X, y)
    again = clone(soup).fit(files, X, y)
    assert np.array_equal(again.coef_, plain.coef_)
    assert again.counts_.n_forward < plain.counts_.n_forward
    replayed = clone(soup).fit(files, X, y)
    assert np.array_equal(replayed.coef_, plain.coef_)
    assert not any(vars(replayed.counts_).values())


JOB = """
import json, os, sys, warnings
from pathlib import Path
import torch
from torch import distributed
warnings.simplefilter("ignore")
torch.set_num_threads(1)
distributed.init_process_group("gloo")
from sksoup import CheckpointCollection
from sklearn.base import clone
from tests.language import texts
from tests.runtime.test_language import SOUPS, gpt2
folder = Path(sys.argv[1])
files = CheckpointCollection.from_path(folder / "zoo", module=gpt2)
X, y = texts("gpt2")
found = {name: clone(soup).fit(files, X, y).coef_.tolist() for name, soup in SOUPS.items()}
if distributed.get_rank() == 0:
    (folder / "found.json").write_text(json.dumps(found))
distributed.barrier()
os._exit(0)  # gloo's threads abort now and then where they are to end
"""


def test_two_ranks_find_what_one_process_finds(tmp_path, files):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, str(tmp_path)], cwd=Path(__file__).parents[2], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=150)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said
    found = json.loads((tmp_path / "found.json").read_text())
    X, y = texts("gpt2")
    for name, soup in SOUPS.items():
        alone = clone(soup).fit(files, X, y)
        assert np.array(found[name]) == pytest.approx(alone.coef_, abs=1e-4)
