"""Jobs of several processes (gloo, on the CPU): what one process finds, in less time for each."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    mix,
)
from sksoup.data.rows import resolve_device
from sksoup.recipes import validation
from sksoup.runtime.distributed import share

from ..zoo import Net, Net64, PaperLearned, PaperMEHL, PlainNet, make_states, make_zoo

SOUPS = {
    "best 32": BestCheckpoint(),
    "greedy 64": GreedySoup(batch_size=25),
    "greedy all 32": GreedySoup(min_improvement=-1.0, batch_size=25),
    "greedy split 32": GreedySoup(ranking_fraction=0.5, random_state=0),
    "learned 64": PaperLearned(max_epochs=2, batch_size=25, random_state=0),
    "learned+ 32": PaperLearned(layerwise=True, max_epochs=2, batch_size=25, random_state=0),
    # 61 rows in minibatches of 20: the last has one row, and one rank has none
    "MEHL 64": PaperMEHL(model_batch_size=2, max_epochs=2, batch_size=20, random_state=0),
    "MEHL+ 64": PaperMEHL(
        layerwise=True, model_batch_size=2, max_epochs=2, batch_size=20, random_state=0
    ),
    "MEHL+ weighted 64": PaperMEHL(
        layerwise=True, model_batch_size=2, max_epochs=1, batch_size=20, random_state=0,
        accumulate=2,
    ),
    "MEHL unseeded 64": PaperMEHL(model_batch_size=2, max_epochs=1, batch_size=20),
    "learned unseeded 32": PaperLearned(max_epochs=1, batch_size=20),
    "greedy split unseeded 32": GreedySoup(ranking_fraction=0.5),
    "MEHL+ 32": PaperMEHL(
        layerwise=True, model_batch_size=2, max_epochs=2, batch_size=20, random_state=0
    ),
    "centered 64": MEHLSoup(
        layerwise=True, model_batch_size=2, max_epochs=2, batch_size=20, random_state=0,
        ranking_rows=30,
    ),
    "centered learned 64": LearnedSoup(max_epochs=2, batch_size=25, random_state=0),
    "centered on greedy 64": MEHLSoup(center="greedy", max_epochs=1, random_state=0),
}  # fmt: skip
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """Five nets in each precision and 61 rows."""
    zoo = make_zoo(5, seed=1, dtype=torch.float64, batch_norm=False)
    zoo.checkpoints.save(tmp_path / "zoo64")
    states = make_states(5, 1, batch_norm=False)
    CheckpointCollection(states, module=PlainNet).save(tmp_path / "zoo32")
    X = np.concatenate([zoo.X, zoo.X[:1] + 0.1])
    y = np.concatenate([zoo.y, zoo.y[:1]])
    weight = 0.5 + np.arange(61) % 3
    np.savez(tmp_path / "rows.npz", X=X, y=y, weight=weight)
    return tmp_path


def start(
    folder: Path, case: str, n_ranks: int, job: str = "distributed_job"
) -> list[subprocess.Popen[str]]:
    """Start the ranks as torchrun would, without its supervision of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n_ranks)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", f"tests.runtime.{job}", str(folder), case],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed memory goes back at once
            preexec_fn=small_stacks,
        )
        for rank in range(n_ranks)
    ]  # fmt: skip


def small_stacks() -> None:
    """Threads take a megabyte of data, not eight."""
    resource.setrlimit(resource.RLIMIT_STACK, (2**20, resource.getrlimit(resource.RLIMIT_STACK)[1]))


def wait(ranks: list[subprocess.Popen[str]]) -> list[str]:
    try:
        return [process.communicate(timeout=150)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def fit_alone(folder: Path, name: str):
    data = np.load(folder / "rows.npz")
    wide = name.endswith("64")
    files = CheckpointCollection.from_path(
        folder / ("zoo64" if wide else "zoo32"), module=Net64 if wide else PlainNet
    )
    weight = data["weight"] if "weighted" in name else None
    return files, clone(SOUPS[name]).fit(files, data["X"], data["y"], sample_weight=weight)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_find_what_one_process_finds(folder, n_ranks):
    ranks = start(folder, "all", n_ranks)
    said = wait(ranks)
    assert [process.returncode for process in ranks] == [0] * n_ranks, "\n".join(said)
    found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(n_ranks)]
    for name in SOUPS:
        files, alone = fit_alone(folder, name)
        for other in found[1:]:  # the same bits on every rank
            for what in ("coef", "scores", "path", "loss"):
                assert other[name][what] == found[0][name][what]
        if "unseeded" in name:
            continue
        coef = np.array(found[0][name]["coef"])
        assert found[0][name]["scores"] == getattr(alone, "individual_scores_", None)
        if getattr(alone, "path_", None) is not None:
            assert found[0][name]["path"] == alone.path_
        loss = [step for record in alone.history_ for step in record.get("loss", [])]
        if name.endswith("64"):
            np.testing.assert_allclose(coef, alone.coef_, rtol=0, atol=1e-8)
            np.testing.assert_allclose(found[0][name]["loss"], loss, rtol=0, atol=1e-8)
        else:
            within = 1e-4 * (1 + np.abs(alone.coef_).max())
            np.testing.assert_allclose(coef, alone.coef_, rtol=0, atol=within)
            mixed, expected = mix(files, coef, layers=alone.layers_), alone.state_dict()
            for tensor, value in expected.items():
                off = (mixed[tensor] - value).norm() / value.norm()
                assert off <= 1e-4, (name, tensor)
        assert (folder / f"{name}.safetensors").exists()  # written once, by rank 0
        _assert_shared_out(name, [other[name]["counts"] for other in found], alone)


def _assert_shared_out(name, counts, alone):
    """The ranks together evaluate the rows once; a step sends b x L numbers."""
    rows = [c["rows_forward"] for c in counts]
    if name.startswith("centered"):  # every rank compares the soup on all rows
        assert sum(c["rows_backward"] for c in counts) == alone.counts_.rows_backward
        return
    if not name.startswith("greedy"):  # which looks ahead
        assert sum(rows) == alone.counts_.rows_forward
        assert sum(c["rows_backward"] for c in counts) == alone.counts_.rows_backward
    assert max(rows) < alone.counts_.rows_forward
    assert alone.counts_.n_reduced == 0
    n_layers = 1 if alone.coef_.ndim == 1 else len(alone.coef_)
    n_steps = sum(len(record["loss"]) for record in alone.history_ if "loss" in record)
    if name.startswith("MEHL"):
        sent = sum(len(r["loss"]) * len(r["models"]) * n_layers for r in alone.history_)
        assert [c["n_reduced"] for c in counts] == [sent] * len(counts)
    elif name.startswith("learned"):
        width = 5 * n_layers + 1  # and the temperature
        assert [c["n_reduced"] for c in counts] == [n_steps * width] * len(counts)
    else:
        assert [c["n_reduced"] for c in counts] == [0] * len(counts)


@pytest.mark.parametrize("case", ["killed", "hangs"])
def test_a_rank_that_is_lost_ends_the_job_and_memory_resumes_it(folder, case):
    ranks = start(folder, case, 2)
    said = ranks[0].communicate(timeout=150)[0]
    ranks[1].kill()
    wait(ranks)
    assert ranks[0].returncode == 1
    message = (folder / "error0.txt").read_text()
    assert "Rank 0 of 2 lost the others" in message
    assert "with memory= it resumes where it stopped" in message
    assert "RankError" in said
    assert not (folder / "found0.json").exists()
    again = start(folder, "none", 2)
    said = wait(again)
    assert [process.returncode for process in again] == [0, 0], "\n".join(said)
    found = json.loads((folder / "found0.json").read_text())
    _, alone = fit_alone(folder, "MEHL+ 64")
    np.testing.assert_allclose(found["coef"], alone.coef_, rtol=0, atol=1e-8)
    assert found["counts"]["rows_backward"] < alone.counts_.rows_backward / 2


def test_equal_labels_are_equal_whichever_of_them_are_one_object(monkeypatch):
    given = []
    monkeypatch.setattr(validation, "refuse_differing", given.append)
    one, checkpoints = date(2026, 1, 1), CheckpointCollection([{"w": torch.ones(2)}])
    for labels in ([one, one], [one, date(2026, 1, 1)], [one, date(2026, 1, 2)]):
        validation.check_ranks(checkpoints, np.zeros((2, 3)), np.array(labels, object), None)
    assert given[0] == given[1] != given[2]


def test_ranks_that_do_not_fit_the_same_are_an_error_on_each(folder):
    ranks = start(folder, "differing", 2)
    said = wait(ranks)
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    here, other = (json.loads((folder / f"found{k}.json").read_text()) for k in range(2))
    for name, what in {
        "checkpoints": "checkpoints: (", "rows": "numbers of rows: 61 and 60.",
        "labels": "labels or weights: '",
    }.items():  # fmt: skip
        assert here[name] == other[name]
        assert here[name].startswith(f"RankError: Ranks 0 and 1 of 2 have different {what}")
    assert here["missing"].startswith("RankError: Rank 1 of 2 stopped with CheckpointError: ")
    assert "none.safetensors" in here["missing"]
    assert other["missing"].startswith("CheckpointError: ")


@pytest.mark.parametrize("n", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_cover_all_rows_once(monkeypatch, n, size):
    monkeypatch.setattr("sksoup.runtime.distributed.world_size", lambda: size)
    covered = []
    lengths = []
    for rank in range(size):
        monkeypatch.setattr("sksoup.runtime.distributed.rank", lambda rank=rank: rank)
        covered += list(range(n))[share(n)]
        lengths.append(len(range(n)[share(n)]))
    assert covered == list(range(n))
    assert max(lengths) - min(lengths) <= 1


def test_batch_statistics_are_not_shared_out(monkeypatch):
    monkeypatch.setattr("sksoup.recipes.validation.world_size", lambda: 2)
    zoo = make_zoo(3, seed=0)
    assert isinstance(zoo.checkpoints.build_module(), Net)
    with pytest.raises(ValueError, match=r"split between the ranks.*Use batch_norm='auto'"):
        MEHLSoup(batch_norm="recalibrate").fit(zoo.checkpoints, zoo.X, zoo.y)


def test_rank_0_writes(monkeypatch, tmp_path):
    zoo = make_zoo(3, seed=0)
    soup = GreedySoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    monkeypatch.setattr("sksoup.recipes.export.process_rank", lambda: 1)
    soup.save(tmp_path / "soup.safetensors", card=True)
    soup.save_pretrained(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sksoup.recipes.export.process_rank", lambda: 0)
    soup.save(tmp_path / "soup.safetensors")
    assert (tmp_path / "soup.safetensors").exists()


def test_ranks_of_a_machine_take_a_gpu_each(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setattr("sksoup.data.rows.world_size", lambda: 4)
    assert resolve_device("auto") == torch.device("cuda:3")
    assert resolve_device("cpu") == torch.device("cpu")
