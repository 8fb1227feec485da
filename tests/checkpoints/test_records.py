"""What training loops write: which checkpoint is best, and scores of one metric and direction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints import records

from ..zoo import Walked
from .runs import write_folder, write_lightning, write_trainer

from_path = CheckpointCollection.from_path


def scores(path, **kwargs):
    return list(from_path(path, scores="recorded", **kwargs).scores.values())


def test_a_loss_is_negated(tmp_path):
    log = {5: {"eval_loss": 0.5, "eval_acc": 0.7}, 10: {"eval_loss": 0.25, "eval_acc": 0.6}}
    for k in range(2):
        write_trainer(tmp_path / "s" / f"run-{k}", log, best=10)
    found = from_path(tmp_path / "s", scores="recorded")
    assert found.scores == {"run-0": -0.25, "run-1": -0.25}
    assert scores(tmp_path / "s" / "run-0") == [-0.5, -0.25]
    # without a best, it is the loss
    write_trainer(tmp_path / "untracked", log)
    assert scores(tmp_path / "untracked") == [-0.5, -0.25]


def test_the_direction_is_what_the_best_was_of_all(tmp_path):
    log = {5: {"eval_loss": 1.0, "eval_mine": 0.75}, 10: {"eval_loss": 1.0, "eval_mine": 0.5}}
    write_trainer(tmp_path / "most", log, best=5, metric="eval_mine")
    assert scores(tmp_path / "most") == [0.75, 0.5]
    write_trainer(tmp_path / "least", log, best=10, metric="eval_mine")
    assert scores(tmp_path / "least") == [-0.75, -0.5]
    # one run tells for all: in a single evaluation the best is both
    write_trainer(tmp_path / "s" / "one", {5: {"eval_mine": 0.5}}, best=5, metric="eval_mine")
    with pytest.raises(
        CheckpointError, match="not recorded whether a greater 'eval_mine' is better"
    ):
        scores(tmp_path / "s")
    write_trainer(tmp_path / "s" / "two", log, best=5, metric="eval_mine")
    assert scores(tmp_path / "s") == [0.5, 0.75]
    write_trainer(tmp_path / "s" / "other", log, best=10, metric="eval_mine")
    with pytest.raises(
        CheckpointError, match="not recorded whether a greater 'eval_mine' is better"
    ):
        scores(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "best"), [("eval_f1", 10), ("eval_accuracy", 10), ("eval_rmse", 5)]
)
def test_a_direction_that_contradicts_the_name_is_unknown(tmp_path, name, best):
    """Older versions of Trainer compare only the steps that they saved."""
    log = {5: {"eval_loss": 1.0, name: 0.75}, 10: {"eval_loss": 1.0, name: 0.5}}
    write_trainer(tmp_path / "s" / "one", log, best=best, metric=name)
    with pytest.raises(CheckpointError, match=f"not recorded whether a greater '{name}' is better"):
        scores(tmp_path / "s")
    write_trainer(tmp_path / "s" / "two", log, best=15 - best, metric=name)  # another run tells
    sign = -1 if name == "eval_rmse" else 1
    values = {5: 0.75, 10: 0.5}
    assert scores(tmp_path / "s") == [sign * values[best], sign * values[15 - best]]


def test_metrics_that_can_not_be_told_apart(tmp_path):
    log = {5: {"eval_acc": 0.75, "eval_f1": 0.75}, 10: {"eval_acc": 0.5, "eval_f1": 0.5}}
    write_trainer(tmp_path / "same", log, best=5, metric="eval_acc")
    assert scores(tmp_path / "same") == [0.75, 0.5]
    log[10]["eval_f1"] = 0.25
    write_trainer(tmp_path / "differ", log, best=5, metric="eval_acc")
    assert scores(tmp_path / "differ", which="best") == [0.75]
    with pytest.raises(CheckpointError, match="chosen by eval_acc or eval_f1, which differ"):
        scores(tmp_path / "differ")


def test_different_metrics_and_no_scores(tmp_path):
    log = {5: {"eval_loss": 0.5, "eval_acc": 0.7}, 10: {"eval_loss": 0.25, "eval_acc": 0.6}}
    write_trainer(tmp_path / "s" / "a", log, best=10)
    write_trainer(tmp_path / "s" / "b", log, best=5, metric="eval_acc")
    with pytest.raises(CheckpointError, match="by different metrics, eval_acc, eval_loss"):
        scores(tmp_path / "s")
    write_folder(tmp_path / "t" / "bare")
    write_trainer(tmp_path / "t" / "a", log, best=10)
    with pytest.raises(CheckpointError, match=r"1 of 2 checkpoints have no 'eval_loss', such as"):
        scores(tmp_path / "t")
    with pytest.raises(ValueError, match="scores='best' is unknown: expected a mapping"):
        from_path(tmp_path / "s", scores="best")


def test_scores_of_lightning(tmp_path):
    for k in range(2):
        write_lightning(tmp_path / "min" / f"trial_{k}", [0.5, 0.25, 0.75])
        write_lightning(tmp_path / "max" / f"trial_{k}", [0.5, 0.25], "val_acc", "max")
    assert scores(tmp_path / "min") == [-0.25, -0.25]
    assert scores(tmp_path / "min", which="last") == [-0.75, -0.75]
    assert scores(tmp_path / "max" / "trial_0") == [0.5, 0.25]
    # a file that says only which others were best
    with pytest.raises(CheckpointError, match="1 of 1 checkpoints have no 'val_acc'"):
        scores(tmp_path / "max" / "trial_0" / "last.ckpt")
    write_lightning(tmp_path / "none" / "a", [0.5], monitor=None)
    with pytest.raises(CheckpointError, match=r"ModelCheckpoint\(monitor=\.\.\.\) in each"):
        scores(tmp_path / "none")


def test_scores_that_are_no_numbers(tmp_path):
    run = write_lightning(tmp_path / "s" / "a", [0.5, 0.3], last=False)
    for odd in (torch.ones(1, 1).to_sparse(), torch.ones(2), torch.tensor([[]])):
        container = torch.load(run / "epoch=1-step=4.ckpt")
        (state,) = container["callbacks"].values()
        state["best_k_models"] = dict.fromkeys(state["best_k_models"], odd)
        torch.save(container, run / "epoch=1-step=4.ckpt")
        assert len(from_path(tmp_path / "s", which="best")) == 1
        with pytest.raises(CheckpointError, match="have no 'val_loss'"):
            scores(tmp_path / "s" / "a")


def test_the_state_of_a_run_that_is_no_state(tmp_path):
    write_trainer(tmp_path / "s" / "a", {5: {"eval_loss": 0.5}, 10: {"eval_loss": 0.2}}, best=5)
    state = tmp_path / "s" / "a" / "checkpoint-10" / "trainer_state.json"
    for text in ("[]", "{", "[" * 100_000, '{"log_history": 7}'):
        state.write_text(text)
        with pytest.raises(CheckpointError, match="is not in the format of transformers' Trainer"):
            from_path(tmp_path / "s", which="best")
    odd = {
        "log_history": [7, {"step": [], "eval_loss": "low"}, {"step": 10, "eval_loss": 1e999}],
        "best_model_checkpoint": ["x"], "best_metric": 10**400, "best_global_step": "5",
    }  # fmt: skip
    state.write_text(json.dumps(odd))
    assert from_path(tmp_path / "s", which="best").path("checkpoint-10").name == "checkpoint-10"
    state.unlink()
    assert len(from_path(tmp_path / "s", which="best")) == 1


def test_the_metrics_of_a_run_are_looked_at_once():
    """There may be a hundred thousand, and thousands of checkpoints."""

    record = records.Record(metrics=Walked(eval_a=1, eval_b=1))
    with pytest.raises(CheckpointError, match="have no 'eval_a'"):
        records.recorded_scores([(Path(f"checkpoint-{k}"), record) for k in range(50)])
    assert record.metrics.n_walks == 1
