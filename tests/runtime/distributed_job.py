"""One rank of a job of test_distributed: python -m tests.runtime.distributed_job FOLDER CASE."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from sklearn.base import clone
from torch import distributed

from sksoup import BestCheckpoint, CheckpointCollection, RankError, SoupWarning
from sksoup.runtime.cache import Cache

from ..zoo import Net64, PlainNet

TIMEOUT = {"hangs": 20, "killed": 60}  # seconds that a rank waits for the others; otherwise 120


def fit_all(folder: Path) -> dict[str, object]:
    """Fit what `test_distributed.SOUPS` lists; tell what came out and what it cost."""
    from .test_distributed import SOUPS

    data = np.load(folder / "rows.npz")
    found: dict[str, object] = {}
    for name, soup in SOUPS.items():
        wide = name.endswith("64")
        files = CheckpointCollection.from_path(
            folder / ("zoo64" if wide else "zoo32"), module=Net64 if wide else PlainNet
        )
        weight = data["weight"] if "weighted" in name else None
        fitted = clone(soup).fit(files, data["X"], data["y"], sample_weight=weight)
        again = clone(soup).set_params(memory=folder / "memory")
        again.fit(files, data["X"], data["y"], sample_weight=weight)
        replay = clone(again).fit(files, data["X"], data["y"], sample_weight=weight)
        assert np.array_equal(replay.coef_, again.coef_)
        assert not any(vars(replay.counts_).values())
        fitted.save(folder / f"{name}.safetensors")
        found[name] = {
            "coef": fitted.coef_.tolist(),
            "scores": getattr(fitted, "individual_scores_", None),
            "path": getattr(fitted, "path_", None),
            "loss": [step for record in fitted.history_ for step in record.get("loss", [])],
            "counts": vars(fitted.counts_),
        }
    return found


def fit_with_a_fault(folder: Path, case: str) -> dict[str, object]:
    """Rank 1 is killed in the middle, or hangs; or nothing happens."""
    from .test_distributed import SOUPS

    data = np.load(folder / "rows.npz")
    files = CheckpointCollection.from_path(folder / "zoo64", module=Net64)
    soup = clone(SOUPS["MEHL+ 64"]).set_params(memory=folder / "memory")
    original, n = Cache.find, [0]

    def find(self, *key):
        n[0] += key[0] == "epoch"
        if n[0] == 4 and distributed.get_rank() == 1:
            if case == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if case == "hangs":
                signal.pause()
        return original(self, *key)

    with patch.object(Cache, "find", find):
        soup.fit(files, data["X"], data["y"])
    return {"coef": soup.coef_.tolist(), "counts": vars(soup.counts_)}


def collect_files(files: list[Path], X: object, y: object) -> CheckpointCollection:
    return CheckpointCollection(files, module=Net64)


def fit_differing(folder: Path) -> dict[str, object]:
    """What is said if rank 1 has another checkpoint, row, label or weight, or a file is missing."""
    rank, said = distributed.get_rank(), {}
    data = np.load(folder / "rows.npz")
    paths = sorted((folder / "zoo64").glob("*.safetensors"))
    missing = [folder / "none.safetensors"] * rank
    flipped = np.where(np.arange(len(data["y"])) < rank, (data["y"] + 1) % 3, data["y"])
    for name, (files, rows, y) in {
        "checkpoints": (paths[rank:], 0, data["y"]),
        "rows": (paths, rank, data["y"]),
        "labels": (paths, 0, flipped),
        "missing": ([*paths, *missing], 0, data["y"]),
    }.items():
        collect = partial(collect_files, files)
        try:
            BestCheckpoint(collect).fit(data["X"][rows:], y[rows:])
        except (RankError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def run(find: Callable[[Path, str], dict[str, object]]) -> None:
    """Join the job, write what this rank finds, or the error of a lost rank."""
    folder, case = Path(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("error")
    # with rows drawn without a seed, the best checkpoint may be the only one that is kept
    for known in ("The soup is the (best|center)", "There is one checkpoint", "(None|Only) "):
        warnings.filterwarnings("ignore", known, SoupWarning)
    warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)  # of torch.compile itself
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT.get(case, 120)))
    rank = distributed.get_rank()
    try:
        found = find(folder, case)
    except RankError as error:
        (folder / f"error{rank}.txt").write_text(str(error))
        raise
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort now and then where they are to end


if __name__ == "__main__":
    cases = {"all": fit_all, "differing": fit_differing}
    run(lambda folder, case: cases.get(case, partial(fit_with_a_fault, case=case))(folder))
