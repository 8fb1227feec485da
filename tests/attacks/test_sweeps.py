"""Folders of a sweep that a walk would not come out of."""

from __future__ import annotations

import json
import os
import subprocess
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints import modules, records, sweeps


def test_links_to_the_folder_above_are_not_followed(tmp_path):
    sweep = tmp_path / "sweep"  # so that what is above it holds nothing else
    inner = sweep / "run"
    inner.mkdir(parents=True)
    for i in range(6):
        (sweep / f"a{i}").symlink_to(".")
    for name in ("version_1", "checkpoints", "lightning_logs"):
        (sweep / name).symlink_to(".")
    (inner / "up").symlink_to("..")
    with (
        patch.object(sweeps, "find_runs", wraps=sweeps.find_runs) as looks,
        pytest.raises(CheckpointError, match="No checkpoints"),
    ):
        CheckpointCollection.from_path(sweep)
    assert looks.call_count == 1  # of what is below: run


def test_many_metrics_of_many_steps_are_read_once(tmp_path):
    run = tmp_path / "run0"
    for step in (1, 2):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        save_file({"w": torch.ones(3) * step}, folder / "model.safetensors")
    log = [{"step": 2, **{f"eval_{i}": 1.0 for i in range(2000)}}]
    log += [{"step": step} for step in range(10, 2000)]
    state = {"log_history": log, "best_metric": 1.0, "best_global_step": 2}
    (run / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    with (
        patch.object(records, "_direction", wraps=records._direction) as looks,
        pytest.raises(CheckpointError, match="recorded"),
    ):
        CheckpointCollection.from_path(tmp_path, module=lambda: None, scores="recorded")
    assert looks.call_count == 2000
    assert {type(arg) for call in looks.call_args_list for arg in call.args[1:]} == {
        float
    }  # no steps


def test_links_beside_checkpoints_are_not_followed_again_and_again(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b").mkdir()
    for i in range(60):
        (tmp_path / f"up{i}").symlink_to(".")
        (tmp_path / "b" / f"up{i}").symlink_to("../b")
    with patch.object(sweeps, "find_runs", wraps=sweeps.find_runs) as looks:
        assert len(CheckpointCollection.from_path(tmp_path)) == 1
    assert looks.call_count < 10


@pytest.fixture
def deep(tmp_path):
    """A folder with so many folders in each other that Python's search fails."""
    root, here = tmp_path / "deep", os.getcwd()
    root.mkdir()
    os.chdir(root)
    for _ in range(1200):
        os.mkdir("a")
        os.chdir("a")
    os.chdir(here)
    yield root
    subprocess.run(["rm", "-r", root], check=True)  # pytest could not


def test_folders_nested_too_deeply_are_an_error(deep):
    with pytest.raises(CheckpointError, match="nested too deeply"):
        CheckpointCollection.from_path(deep.parent / "**" / "*.pt")
    with pytest.raises(CheckpointError, match=r"deep' can't be searched: RecursionError"):
        list(modules.module_files(deep))
    with (
        patch.object(modules, "MOST_FILES", 100),
        pytest.raises(CheckpointError, match="more than 100 files and folders"),
    ):
        list(modules.module_files(deep))


def test_a_pattern_that_finds_nothing_does_not_follow_links(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(".")
    (tmp_path / "notes.txt").write_text("")
    with patch.object(os, "scandir", wraps=os.scandir) as looks:
        with pytest.raises(CheckpointError, match=r"no name in .* matches '\*\*'"):
            CheckpointCollection.from_path(tmp_path / "**" / "*.pt")
        with pytest.raises(CheckpointError, match=r"it matches 'notes\.txt'; expected"):
            CheckpointCollection.from_path(tmp_path / "**" / "*.txt")
    assert looks.call_count < 20


def test_patterns_that_find_parts_of_one_run_are_of_one_run(tmp_path):
    for name in ("epoch1", "epoch2", "epoch10_best"):
        torch.save({"w": torch.ones(2)}, tmp_path / f"{name}.pt")
    (tmp_path / "link").symlink_to(tmp_path)
    patterns = [tmp_path / "epoch[0-9].pt", tmp_path / "link" / "*best.pt", tmp_path / "*1*.pt"]
    for given in (patterns, patterns[::-1]):
        assert CheckpointCollection.from_path(given, which="best").names == ("epoch10_best",)
    assert len(CheckpointCollection.from_path(patterns)) == 3
    assert len(CheckpointCollection.from_path([tmp_path, tmp_path / "link"])) == 3
