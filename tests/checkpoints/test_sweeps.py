"""Sweeps: where the runs are, and which checkpoints of each are taken."""

from __future__ import annotations

import logging
import os
import shutil
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError
from sksoup.__main__ import main
from sksoup.checkpoints import records
from sksoup.checkpoints.sweeps import find_runs
from sksoup.exceptions import SoupWarning

from .runs import STATE, write_folder, write_lightning, write_trainer

from_path = CheckpointCollection.from_path
LOG = {500: {"eval_loss": 0.5}, 1000: {"eval_loss": 0.3}, 1500: {"eval_loss": 0.4}}


def files(collection):
    return ["/".join(collection.path(name).parts[-2:]) for name in collection]


@pytest.fixture
def sweep(tmp_path):
    """Three runs of Trainer: two with a best in the middle, one that tracked none."""
    for k in (1, 2):
        write_trainer(tmp_path / "sweep" / f"run-{k}", LOG, best=1000)
    write_trainer(tmp_path / "sweep" / "run-10", LOG)
    return tmp_path / "sweep"


def test_one_of_each_run(sweep, caplog):
    with caplog.at_level(logging.INFO, logger="sksoup"):
        found = from_path(sweep)
    assert found.names == ("run-1", "run-2", "run-10")
    assert files(found) == [
        "run-1/checkpoint-1000", "run-2/checkpoint-1000", "run-10/checkpoint-1500",
    ]  # fmt: skip
    said = "the best of each of 3 runs, the last of 1 without a record of the best"
    assert said in repr(found)
    (line,) = [record.getMessage() for record in caplog.records]
    assert said in line
    assert str(sweep / "run-2" / "checkpoint-1000") in line
    assert "best" not in repr(found.drop("run-1"))


def test_runs_of_a_network_that_is_not_of_transformers(sweep):
    """Trainer writes no config.json for them; once, all their checkpoints were mixed."""
    expected = files(from_path(sweep))
    for config in sweep.rglob("config.json"):
        config.unlink()
    assert files(from_path(sweep)) == expected
    assert len(from_path(sweep, which="all")) == 9
    run = sweep / "run-1"
    save_file(STATE, run / "model.safetensors")  # of trainer.save_model()
    (run / "training_args.bin").write_bytes(b"pickle")
    assert files(from_path(sweep)) == expected
    other = sweep.parent / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoint-*"))
    for name in ("lr1e-5", "lr3e-5"):
        save_file(STATE, other / f"{name}.safetensors")
    assert len(from_path(other)) == 3  # files of several runs


def test_a_file_without_a_number_is_before_the_steps(sweep):
    """Such as the start in the folder of a run; once, it was taken for the last checkpoint."""
    expected = {which: files(from_path(sweep, which=which)) for which in ("best", "last")}
    for run in sweep.iterdir():
        save_file(STATE, run / "init.safetensors")
    for which, names in expected.items():
        assert files(from_path(sweep, which=which)) == names
    assert len(from_path(sweep, which="all")) == 12


def test_hidden_files_are_no_checkpoints(tmp_path):
    """As macOS writes beside each file of another file system."""
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
        (tmp_path / f"._{name}.safetensors").write_bytes(b"\0\5\26\7")
    assert from_path(tmp_path).names == from_path(tmp_path / "*").names == ("a", "b")


@pytest.mark.parametrize(("which", "n"), [("last", 3), ("all", 9)])
def test_the_last_or_all(sweep, which, n):
    found = from_path(sweep, which=which)
    assert len(found) == n
    assert files(found)[n // 3 - 1] == "run-1/checkpoint-1500"
    if which == "all":
        assert found.names[:2] == ("run-1/checkpoint-500", "run-1/checkpoint-1000")
        assert "all of each of 3 runs" in repr(found)
    else:
        assert found.names == ("run-1", "run-2", "run-10")


def test_one_run_gives_all_of_it_unless_one_is_asked_for(sweep):
    found = from_path(sweep / "run-1")
    assert found.names == ("checkpoint-500", "checkpoint-1000", "checkpoint-1500")
    assert "all of one run" in repr(found)
    assert from_path(sweep / "run-1", which="best").names == ("checkpoint-1000",)
    assert from_path(sweep / "run-1", which="last").names == ("checkpoint-1500",)
    with pytest.raises(ValueError, match=r"which='first' is unknown: expected 'best', 'last'"):
        from_path(sweep, which="first")


def test_runs_two_folders_down_and_given_one_by_one(sweep, tmp_path):
    group = tmp_path / "top" / "group"
    group.parent.mkdir()
    shutil.move(sweep, group)
    shutil.copytree(group, tmp_path / "top" / "other")
    assert from_path(tmp_path / "top").names == tuple(
        f"{g}/run-{k}" for g in ("group", "other") for k in (1, 2, 10)
    )
    listed = [group / "run-1", group / "run-2"]
    assert files(from_path(listed)) == ["run-1/checkpoint-1000", "run-2/checkpoint-1000"]
    assert from_path(f"{group}/run-?").names == from_path(listed).names == ("run-1", "run-2")


def test_a_final_model_beside_the_checkpoints(tmp_path):
    write_trainer(tmp_path / "s" / "known", LOG, best=1000, final=True)
    write_trainer(tmp_path / "s" / "unknown", LOG, final=True)
    write_folder(tmp_path / "s" / "only")
    found = from_path(tmp_path / "s")
    assert files(found) == ["known/checkpoint-1000", "s/only", "s/unknown"]
    assert files(from_path(tmp_path / "s", which="last"))[0] == "known/checkpoint-1500"
    one = from_path(tmp_path / "s" / "unknown")
    assert one.names == ("checkpoint-500", "checkpoint-1000", "checkpoint-1500")
    assert "without the final model" in repr(one)
    # the best is gone from the disk: what was saved in the end may be it
    shutil.rmtree(tmp_path / "s" / "known" / "checkpoint-1000")
    assert files(from_path(tmp_path / "s"))[0] == "s/known"


def test_lightning(tmp_path):
    for k in range(2):
        write_lightning(tmp_path / "study" / f"trial_{k}", [0.5, 0.3, 0.4])
        logs = tmp_path / "logs" / "lightning_logs" / f"version_{k}"
        write_lightning(logs / "checkpoints", [0.5, 0.7, 0.6], mode="max", last=False)
    assert files(from_path(tmp_path / "study")) == [
        "trial_0/epoch=1-step=4.ckpt", "trial_1/epoch=1-step=4.ckpt",
    ]  # fmt: skip
    logs = from_path(tmp_path / "logs")
    assert logs.names == ("version_0", "version_1")
    assert {path.split("/")[1] for path in files(logs)} == {"epoch=1-step=4.ckpt"}
    # last.ckpt is the last step once more
    last = from_path(tmp_path / "study", which="last")
    assert files(last)[0] == "trial_0/epoch=2-step=6.ckpt"
    one = from_path(tmp_path / "study" / "trial_0")
    assert one.names == ("epoch=0-step=2", "epoch=1-step=4", "epoch=2-step=6")
    # a pattern is what it says, until one of each run is asked for
    pattern = f"{tmp_path}/study/*/*.ckpt"
    assert len(from_path(pattern)) == 8
    assert files(from_path(pattern, which="best")) == files(from_path(tmp_path / "study"))


@pytest.mark.parametrize("stray", ["start.pt", "soup.safetensors"])
def test_files_beside_the_folders_of_runs_are_said_to_hide_them(tmp_path, capsys, stray):
    for k in range(2):
        write_lightning(tmp_path / "study" / f"trial_{k}", [0.5, 0.3])
        write_trainer(tmp_path / "sweep" / f"run-{k}", LOG)
    for root, name in (("study", "trial_0"), ("sweep", "run-0")):
        (tmp_path / root / "plots" / "old").mkdir(parents=True)
        assert len(from_path(tmp_path / root)) == 2
        path = tmp_path / root / stray
        torch.save(STATE, path) if stray[-3:] == ".pt" else save_file(STATE, path)
        said = f"holds 1 checkpoint and 2 folders with more \\('{stray}', '{name}'\\)"
        with pytest.warns(SoupWarning, match=said) as caught:
            assert len(from_path(tmp_path / root)) == 1
        assert f"give '{tmp_path}/{root}/*/'" in str(caught[0].message)
        assert len(from_path(f"{tmp_path}/{root}/*/")) == 2
        main(["inspect", str(tmp_path / root)])
        assert "2 folders with more" in capsys.readouterr().err


def write_trials(study, n=4):
    """The last checkpoints of trials with as many steps each, by their own names in one folder."""
    for k in range(n):
        run = write_lightning(study / f"trial_{k}", [0.5, 0.3], last=False)
        container = torch.load(run / "epoch=1-step=4.ckpt")
        container["state_dict"]["w"] += k
        (state,) = container["callbacks"].values()
        state["best_model_path"] = f"/elsewhere/trial_{k}/epoch=1-step=4.ckpt"
        shutil.rmtree(run)
        torch.save(container, study / f"trial_{k}.ckpt")
    return study


@pytest.mark.parametrize("which", [None, "all"])
def test_trials_of_one_folder_are_all_taken(tmp_path, which):
    study = write_trials(tmp_path / "study")
    assert from_path(study, which=which).names == ("trial_0", "trial_1", "trial_2", "trial_3")
    shutil.copy(study / "trial_2.ckpt", study / "last.ckpt")  # the same weights once more
    assert from_path(study, which=which).names == ("trial_0", "trial_1", "trial_2", "trial_3")


def test_the_best_is_found_among_copies_by_two_callbacks(tmp_path):
    """One keeps each epoch, the other the best by a name of its own, which sorts after it."""
    for k in range(2):
        run = write_lightning(tmp_path / "study" / f"trial_{k}", [0.5, 0.3, 0.4], last=False)
        best = "val_loss=0.30.ckpt"
        shutil.copy(run / "epoch=1-step=4.ckpt", run / best)
        for path in run.iterdir():
            container = torch.load(path)
            (state,) = container["callbacks"].values()
            state["best_model_path"] = f"/elsewhere/{best}"
            state["best_k_models"] = {f"/elsewhere/{best}": torch.tensor(0.3)}
            torch.save(container, path)
    found = from_path(tmp_path / "study", scores="recorded")
    assert files(found) == [f"trial_{k}/{best}" for k in range(2)]
    assert list(found.scores.values()) == pytest.approx([-0.3, -0.3])
    assert len(from_path(tmp_path / "study" / "trial_0")) == 3


def test_a_file_of_another_callback_may_be_older_than_the_best(tmp_path):
    """It was written before the callback with a metric noted the score of this epoch."""
    for k in range(2):
        run = write_lightning(tmp_path / "s" / f"trial_{k}", [0.5, 0.4, 0.3], last=False)
        stale = torch.load(run / "epoch=2-step=6.ckpt")
        stale["callbacks"] = torch.load(run / "epoch=1-step=4.ckpt")["callbacks"]
        torch.save(stale, run / "last.ckpt")
    found = from_path(tmp_path / "s", scores="recorded")
    assert files(found) == [f"trial_{k}/epoch=2-step=6.ckpt" for k in range(2)]
    assert list(found.scores.values()) == pytest.approx([-0.3, -0.3])


def test_weights_that_a_run_averaged_in_the_end_are_of_it(tmp_path):
    """As by StochasticWeightAveraging: of the last step, but other weights."""
    for k in range(2):
        run = write_lightning(tmp_path / "s" / f"trial_{k}", [0.5, 0.3, 0.4], last=False)
        container = torch.load(run / "epoch=2-step=6.ckpt")
        container["state_dict"]["w"] += 7
        torch.save(container, run / "final.ckpt")
    assert files(from_path(tmp_path / "s")) == [f"trial_{k}/epoch=1-step=4.ckpt" for k in range(2)]
    last = from_path(tmp_path / "s", which="last")
    assert files(last) == [f"trial_{k}/final.ckpt" for k in range(2)]


@pytest.mark.parametrize(
    ("names", "best", "last"),
    [
        (["epoch_1", "epoch_2", "epoch_10", "model_best"], "model_best", "epoch_10"),
        (["epoch_1", "epoch_2", "bestModel"], "bestModel", "epoch_2"),
        (["epoch_1", "epoch_2", "BestModel"], "BestModel", "epoch_2"),
        (["epoch_1", "epoch_2", "modelbest"], "modelbest", "epoch_2"),
        (["epoch_1", "epoch_2", "bestmodel", "lastModel"], "bestmodel", "lastModel"),
        (["checkpoint", "model_best"], "model_best", "checkpoint"),
        (["epoch_1", "epoch_2", "pretrained"], "epoch_2", "epoch_2"),
        (["loss=0.3-epoch=10", "loss=0.4-epoch=9"], "loss=0.3-epoch=10", "loss=0.3-epoch=10"),
        (["step-5", "step-40", "modelBest"], "modelBest", "step-40"),
        (["bestiary_epoch1", "bestiary_epoch2"], "bestiary_epoch2", "bestiary_epoch2"),
    ],
)
def test_the_best_and_the_last_by_the_names_of_files(tmp_path, names, best, last):
    for run in "ab":
        (tmp_path / "s" / run).mkdir(parents=True)
        for k, name in enumerate(names):
            save_file({"w": STATE["w"] + k}, tmp_path / "s" / run / f"{name}.safetensors")
    for which, name in (("best", best), (None, best), ("last", last)):
        found = from_path(tmp_path / "s", which=which)
        assert files(found) == [f"{run}/{name}.safetensors" for run in "ab"]


def test_a_choice_that_changes_nothing_is_warned_of(tmp_path):
    for run in "ab":
        for name in ("epoch_0", "epoch_1"):  # of accelerate
            write_folder(tmp_path / run / name)
    for which in ("best", "last"):
        with pytest.warns(SoupWarning, match=f"which='{which}' changes nothing: each of the 4"):
            assert len(from_path(tmp_path, which=which)) == 4
    assert len(from_path(tmp_path, which="all")) == 4


def test_one_run_and_its_start_are_no_sweep(tmp_path):
    run = write_trainer(tmp_path / "run", LOG, best=1000)
    start = write_folder(tmp_path / "start", 9)
    steps = [f"run/checkpoint-{step}" for step in LOG]
    assert files(from_path([run, start])) == [*steps, f"{tmp_path.name}/start"]
    more = write_trainer(tmp_path / "more", LOG, best=500)
    assert files(from_path([run, more, start])) == [
        "run/checkpoint-1000", "more/checkpoint-500", f"{tmp_path.name}/start",
    ]  # fmt: skip
    write_folder(tmp_path / "sweep" / "done")  # its other checkpoints were removed
    write_trainer(tmp_path / "sweep" / "run", LOG, best=1000)
    assert files(from_path(tmp_path / "sweep")) == ["sweep/done", "run/checkpoint-1000"]


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (["best_epoch3", "best_epoch7", "best_epoch12", "last"], "best_epoch12"),
        (["best_0.81", "best_0.92", "best_0.87"], "best_0.92"),
        (["best_acc", "best_loss"], "best_loss"),
        (["best", "best-v1", "best-v2"], "best-v2"),
    ],
)
def test_several_files_named_best_are_warned_of(tmp_path, names, best):
    for k, name in enumerate(names):
        save_file({"w": STATE["w"] + k}, tmp_path / f"{name}.safetensors")
    with pytest.warns(SoupWarning, match=f"files named best .* is used, '{best}.safetensors'"):
        found = from_path(tmp_path, which="best")
    assert files(found) == [f"{tmp_path.name}/{best}.safetensors"]
    if best in ("best_loss", "best-v2"):  # one without a number is no copy
        return
    save_file(STATE, tmp_path / "best_model.safetensors")  # a copy of one of them
    found = from_path(tmp_path, which="best")
    assert files(found) == [f"{tmp_path.name}/best_model.safetensors"]


def test_other_names_with_hyphens_are_in_the_order_of_names(tmp_path):
    for name in ("net", "net-old"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    assert files(from_path(tmp_path / "*"))[-1].endswith("/net.safetensors")
    torch.save({"state_dict": STATE}, tmp_path / "last.ckpt")  # a run
    torch.save({"state_dict": STATE, "x": 1}, tmp_path / "last-v1.ckpt")
    assert files(from_path(tmp_path, which="last"))[-1].endswith("/last-v1.ckpt")


def test_a_copy_that_is_named_the_best_is_found(tmp_path):
    for k in range(2):
        run = write_lightning(tmp_path / "s" / f"trial_{k}", [0.5, 0.3, 0.4], monitor=None)
        shutil.copy(run / "epoch=1-step=4.ckpt", run / "model-best.ckpt")
    assert files(from_path(tmp_path / "s")) == [f"trial_{k}/model-best.ckpt" for k in range(2)]


def test_trials_of_one_step_are_told_apart_in_linear_time(tmp_path):
    """Most of the weights may be frozen: only files that are copies are read."""
    frozen = torch.zeros(10_000)
    for k in range(6):
        state = {"frozen": frozen, "head": torch.tensor([float(min(k, 4))])}
        torch.save({"global_step": 2, "state_dict": state}, tmp_path / f"trial_{k}.ckpt")
    with patch.object(records, "content_sha256", wraps=records.content_sha256) as reads:
        assert len(from_path(tmp_path)) == 5
    assert reads.call_count == 2


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.ones(1).expand(10**10), "expected at most 100 times the size of the file"),
        (torch.ones(1).expand(10**6), "expected at most 100 times the size of the file"),
        (torch.ones(2, dtype=torch.complex64).conj(), "complex dtype"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch._neg_view(torch.ones(3)), ""),
    ],
    ids=["expanded", "small", "conjugate", "sparse", "negative"],
)
def test_odd_tensors_in_files_of_one_step(tmp_path, weight, said):
    for k in range(2):
        container = {"global_step": 2, "state_dict": {"w": weight}}
        torch.save(container, tmp_path / f"trial_{k}.ckpt")
    if said:
        with pytest.raises(CheckpointError, match=f"trial_0.ckpt' .*{said}"):
            from_path(tmp_path)
    else:
        assert from_path(tmp_path)["trial_0"]["w"].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("pattern", [False, True])
def test_the_best_of_several_runs_in_one_folder_is_not_guessed(tmp_path, capsys, which, pattern):
    study = write_trials(tmp_path / "study")
    path = f"{study}/*.ckpt" if pattern else study
    with pytest.raises(
        CheckpointError, match=r"'trial_0.ckpt' and 'trial_1.ckpt' are both of step 4 and differ"
    ):
        from_path(path, which=which)
    assert main(["inspect", str(path), "--which", which]) == 2
    assert "pass --which all, or list the files" in capsys.readouterr().err


def test_files_named_after_their_time_are_of_one_run_and_others_are_not(tmp_path):
    for run in "ab":
        (tmp_path / "timed" / run).mkdir(parents=True)
        (tmp_path / "zoos" / run).mkdir(parents=True)
        for name in ("epoch2", "epoch10"):
            save_file(STATE, tmp_path / "timed" / run / f"{name}.safetensors")
            save_file(STATE, tmp_path / "zoos" / run / f"sgd{name[5:]}.safetensors")
    assert files(from_path(tmp_path / "timed")) == [
        "a/epoch10.safetensors",
        "b/epoch10.safetensors",
    ]
    torch.save(STATE, tmp_path / "timed" / "a" / "model_best.pt")
    assert files(from_path(tmp_path / "timed"))[0] == "a/model_best.pt"
    assert from_path(tmp_path / "zoos").names == ("a/sgd2", "a/sgd10", "b/sgd2", "b/sgd10")


def test_a_list_of_paths_and_patterns(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for k in range(2):
            torch.save(STATE, tmp_path / folder / f"{folder}{k}.pt")
    (tmp_path / "a" / "notes.txt").write_text("hello")
    torch.save({}, tmp_path / "a" / "optimizer.pt")
    given = [f"{tmp_path}/a/*", tmp_path / "b", str(tmp_path / "b" / "b0.pt")]
    assert from_path(given).names == ("a0", "a1", "b0", "b1")  # b0 once
    assert from_path(iter(given)).names == ("a0", "a1", "b0", "b1")
    with pytest.raises(CheckpointError, match="at least one path or pattern"):
        from_path([])


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    torch.save(STATE, tmp_path / "a.pt")
    assert from_path("~/*.pt").names == from_path("~").names == ("a",)
    assert CheckpointCollection(["~/a.pt"]).names == ("a",)


def test_links_in_a_circle_end(tmp_path):
    write_lightning(tmp_path / "x", [0.5])
    os.symlink(tmp_path, tmp_path / "checkpoints")
    os.symlink(tmp_path, tmp_path / "around")
    found = from_path(tmp_path)
    assert len(found) == 1
    assert "one run" in repr(found)
    assert len(list(find_runs(tmp_path, (".ckpt",)))) < 100
