"""Folders of a sweep that a walk would not come out of."""

from __future__ import annotations

import json
import os
import subprocess
import weakref
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError, SoupWarning
from sksoup.checkpoints import folders, hub_config, modules, records, shards, sweeps
from sksoup.checkpoints.peft_config import PeftConfig


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


def test_what_links_of_many_runs_lead_to_is_searched_once(tmp_path):
    """To warn of runs below; such as a large data set beside each run."""
    (tmp_path / "data").mkdir()
    for k in range(20):
        run = tmp_path / "sweep" / f"run{k}"
        run.mkdir(parents=True)
        save_file({"w": torch.ones(2)}, run / "w.safetensors")
        (run / "data").symlink_to("../../data")
        (run / "logs").mkdir()
        (run / "logs" / "more").symlink_to("../../../more")
    (tmp_path / "more").mkdir()
    with patch.object(sweeps, "list_files", wraps=sweeps.list_files) as listed:
        assert len(CheckpointCollection.from_path(tmp_path / "sweep")) == 20
    assert listed.call_count == 43  # the sweep, each run with its logs, the data, and more
    save_file({"w": torch.ones(2)}, tmp_path / "data" / "w.safetensors")
    with pytest.warns(SoupWarning, match=r"holds 1 checkpoint and 1 folder with more") as caught:
        CheckpointCollection.from_path(tmp_path / "sweep")
    assert len(caught) == 20


def test_an_invalid_list_of_modules_is_parsed_once_for_all_links_to_it(tmp_path):
    (tmp_path / "modules.json").write_text("[{}")
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    for k in range(5):
        (tmp_path / f"f{k}").mkdir()
        (tmp_path / f"f{k}" / "modules.json").symlink_to("../modules.json")
    with patch.object(modules.json, "loads", wraps=json.loads) as parsed:
        assert len(CheckpointCollection.from_path(tmp_path / "w.safetensors")) == 1
        for k in range(5):
            with pytest.raises(CheckpointError, match=rf"f{k}/modules.json' can't be read: .*JSON"):
                modules.module_folders(tmp_path / f"f{k}")
    assert parsed.call_count == 1


def test_links_to_folders_in_each_other_are_all_warned_of(tmp_path):
    (tmp_path / "more" / "sub").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, tmp_path / "more" / "sub" / "w.safetensors")
    for name in ("a", "b"):
        run = tmp_path / "sweep" / name
        run.mkdir(parents=True)
        save_file({"w": torch.ones(2)}, run / "w.safetensors")
        (run / "all").symlink_to("../../more")
    (tmp_path / "sweep" / "a" / "last").symlink_to("../../more/sub")
    with pytest.warns(SoupWarning, match="holds 1 checkpoint and") as caught:
        CheckpointCollection.from_path(tmp_path / "sweep")
    assert ["2 folders with more" in str(each.message) for each in caught] == [True, False]


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


@pytest.mark.parametrize("is_linked", [True, False])
def test_checkpoints_in_each_other_are_searched_once(tmp_path, is_linked):
    """With two links up, each level was searched twice, to the most that a path may hold."""
    folder = tmp_path
    for k in range(4 if is_linked else 250):
        save_file({"w": torch.ones(2)}, folder / "w.safetensors")
        if is_linked and k:
            (folder / "up").symlink_to("..")
        folder = folder / "a"
        folder.mkdir()
    with (
        patch.object(sweeps, "find_runs", wraps=sweeps.find_runs) as looks,
        pytest.warns(SoupWarning, match="holds 1 checkpoint and 1 folder with more") as warned,
    ):
        assert len(CheckpointCollection.from_path(tmp_path)) == 1
    assert looks.call_count < 5
    assert len(warned) == 1


def test_links_beside_checkpoints_are_not_followed_again_and_again(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b").mkdir()
    for i in range(60):
        (tmp_path / f"up{i}").symlink_to(".")
        (tmp_path / "b" / f"up{i}").symlink_to("../b")
    with patch.object(sweeps, "find_runs", wraps=sweeps.find_runs) as looks:
        assert len(CheckpointCollection.from_path(tmp_path)) == 1
    assert looks.call_count < 10


@pytest.mark.parametrize("levels", ["", "below"])
@pytest.mark.parametrize("is_pattern", [True, False])
def test_links_that_match_a_pattern_are_searched_once(tmp_path, levels, is_pattern):
    """Also where each leads there through a folder of its own."""
    real = tmp_path / "real"
    (real / "x").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, real / "x" / "a.safetensors")
    for i in range(30):
        folder = tmp_path / "all" / f"l{i}"
        folder.parent.mkdir(exist_ok=True)
        if levels:
            folder.mkdir()
            folder = folder / "up"
        folder.symlink_to(real)
    (tmp_path / "all" / "z").symlink_to(real)
    found = tmp_path / "all" / "*" if is_pattern else sorted((tmp_path / "all").iterdir())
    with patch.object(sweeps, "list_files", wraps=sweeps.list_files) as looks:
        assert len(CheckpointCollection.from_path(found)) == 1
    # z is searched again, as one level more below it counts
    assert looks.call_count == (30 + 2 + 2 if levels else 2)


def test_links_to_nothing_are_an_error(tmp_path):
    (tmp_path / "all" / "empty").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "all" / f"l{i}").symlink_to("empty" if i else ".")
    for given in (tmp_path / "all", tmp_path / "all" / "*", [tmp_path / "all", tmp_path]):
        with pytest.raises(CheckpointError, match="No checkpoints"):
            CheckpointCollection.from_path(given)


def test_a_run_is_found_though_a_link_came_there_with_no_level_left(tmp_path):
    run = tmp_path / "b" / "x" / "y"
    run.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, run / "w.safetensors")
    (tmp_path / "a" / "x").mkdir(parents=True)
    (tmp_path / "a" / "x" / "link").symlink_to(run.parent)
    (tmp_path / "a" / "link").symlink_to(run.parent)
    assert len(CheckpointCollection.from_path(tmp_path / "*")) == 1


def test_a_folder_that_is_given_twice(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "link").symlink_to(".")
    found = CheckpointCollection.from_path([tmp_path, tmp_path / "link", tmp_path / "l*"])
    assert found.names == ("a",)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match="No checkpoints"):
        CheckpointCollection.from_path([tmp_path, tmp_path])


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
    with pytest.raises(CheckpointError, match=r"deep' can't be used: .* 50 folders deep"):
        list(modules.module_files(deep))
    with pytest.raises(CheckpointError, match="more than 40 files and folders"):
        list(modules.files_below(deep, 40))


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


def test_folders_that_may_not_be_read_are_left_out(tmp_path, monkeypatch):
    for name in ("run1", "run2"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2)}, tmp_path / name / "a.safetensors")
    closed = tmp_path / "lost+found"
    closed.mkdir(mode=0)
    access = os.access  # root may read all
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    with pytest.warns(SoupWarning, match=r"1 folder can't be read, such as .*lost\+found"):
        assert len(CheckpointCollection.from_path(tmp_path)) == 2


def test_the_best_step_is_known_if_the_last_one_has_no_state(tmp_path):
    for run in ("run1", "run2"):
        log = []
        for step, loss in ((100, 0.1), (200, 0.5), (300, 0.9)):
            folder = tmp_path / run / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            save_file({"w": torch.ones(2) * step}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
            log.append({"step": step, "eval_loss": loss})
            best = {"best_metric": 0.1, "best_model_checkpoint": "out/checkpoint-100"}
            state = {"log_history": log, "global_step": step, **best}
            if step < 300:
                (folder / "trainer_state.json").write_text(json.dumps(state))
    found = CheckpointCollection.from_path(tmp_path)
    assert [found.path(name).name for name in found] == ["checkpoint-100"] * 2
    # a state in the folder, written before the run was resumed
    older = {**best, "best_model_checkpoint": "out/checkpoint-200", "global_step": 150}
    for step, expected in ((150, "checkpoint-100"), (250, "checkpoint-200")):
        for run in ("run1", "run2"):
            state = {"log_history": log, **older, "global_step": step}
            (tmp_path / run / "trainer_state.json").write_text(json.dumps(state))
        found = CheckpointCollection.from_path(tmp_path)
        assert [found.path(name).name for name in found] == [expected] * 2


def test_containers_of_lightning_are_not_kept(tmp_path, monkeypatch):
    alive = weakref.WeakSet()

    class Container(dict):
        pass

    def read(path):
        assert len(alive) <= 1  # that of the file before
        container = Container(global_step=int(path.stem[-1]), callbacks={})
        alive.add(container)
        return container

    Container.__hash__ = object.__hash__
    monkeypatch.setattr(records, "read_container", read)
    files = [tmp_path / f"epoch{k}.ckpt" for k in range(5)]
    monkeypatch.setattr(records, "_versions", lambda files, steps: {})
    records.read_lightning(files)
    assert not alive


def test_files_of_a_run_are_not_compared_each_with_each(tmp_path, monkeypatch):
    compared = []

    class Version(tuple):
        __hash__ = tuple.__hash__

        def __eq__(self, other):
            compared.append(other)
            return tuple.__eq__(self, other)

    container = {"global_step": 0, "callbacks": {}}
    monkeypatch.setattr(records, "read_container", lambda path: container)
    monkeypatch.setattr(
        records, "_versions", lambda files, steps: {name: Version((0, 0)) for name in steps}
    )
    records.read_lightning([tmp_path / f"{k}.ckpt" for k in range(100)])
    assert len(compared) <= 100


def test_optimizers_and_criteria_of_skorch_with_a_prefix_are_no_checkpoints(tmp_path):
    for name in ("ep_params_1", "ep_params_2", "focal_criterion"):
        torch.save({"w": torch.ones(2)}, tmp_path / f"{name}.pt")
    for name in ("ep_optimizer", "ep_criterion", "ep_optimizer_2"):
        torch.save({}, tmp_path / f"{name}.pt")
    names = CheckpointCollection.from_path(tmp_path).names
    assert sorted(names) == ["ep_params_1", "ep_params_2", "focal_criterion"]
    varied = ("ft_params_lr1", "ft_optimizer_adamw", "ft_criterion_focal")  # what a run changed
    for name in varied:
        (tmp_path / "varied").mkdir(exist_ok=True)
        torch.save({"w": torch.ones(2)}, tmp_path / "varied" / f"{name}.pt")
    assert sorted(CheckpointCollection.from_path(tmp_path / "varied").names) == sorted(varied)


def test_hard_links_to_a_checkpoint_count_once(tmp_path):
    """As timm keeps its best and its last checkpoint."""
    for epoch in (3, 4):
        torch.save({"w": torch.ones(2) * epoch}, tmp_path / f"checkpoint-{epoch}.pth.tar")
    os.link(tmp_path / "checkpoint-3.pth.tar", tmp_path / "model_best.pth.tar")
    os.link(tmp_path / "checkpoint-4.pth.tar", tmp_path / "last.pth.tar")
    found = CheckpointCollection.from_path(tmp_path)
    assert sorted(found[name]["w"][0].item() for name in found) == [3, 4]
    best = CheckpointCollection.from_path(tmp_path, which="best")
    assert [best[name]["w"][0].item() for name in best] == [3]


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="only Linux resolves a path at once")
def test_links_through_many_folders_are_resolved_at_once(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "w.data")
    inner = tmp_path.joinpath("x", *["a"] * 200)
    inner.mkdir(parents=True)
    (tmp_path / "w.link").symlink_to(inner.joinpath(*[".."] * 201, "w.data"))
    runs = tmp_path / "runs"
    runs.mkdir()
    for k in range(5):
        (runs / f"m{k}.safetensors").symlink_to("../w.link")
    with patch.object(os, "lstat", wraps=os.lstat) as looks:
        assert CheckpointCollection.from_path(runs).names == ("m0",)
    assert looks.call_count < 100


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_links_to_one_file_are_read_once(tmp_path, link):
    """An archive of a few files may hold thousands of links to them."""
    weights = {"a": torch.zeros(2), "b": torch.ones(2)}
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"state_dict": weights, "global_step": 3, "callbacks": {}}, run / "epoch=0.ckpt")
    for k in range(1, 9):
        link(run / "epoch=0.ckpt", run / f"epoch={k}.ckpt")
    with patch.object(records, "read_container", wraps=records.read_container) as containers:
        assert CheckpointCollection.from_path(run).path("epoch=0") == run / "epoch=0.ckpt"
    assert containers.call_count == 1

    model = tmp_path / "model"
    model.mkdir()
    save_file(weights, model / "0.safetensors")
    for k in range(1, 9):
        link(model / "0.safetensors", model / f"{k}.safetensors")
    index = model / "0.safetensors.index.json"
    listed = {name: f"{k}.safetensors" for k, name in enumerate("abcdefghi")}
    index.write_text(json.dumps({"weight_map": listed}))
    with (
        patch.object(shards, "SafetensorsFile", wraps=shards.SafetensorsFile) as opened,
        pytest.raises(CheckpointError, match="holds 'b', which the index does not list there"),
    ):
        CheckpointCollection([index])
    assert opened.call_count == 1
    for k in range(1, 9):
        link(index, model / f"{k}.safetensors.index.json")
    with patch.object(folders, "weight_map", wraps=folders.weight_map) as maps:
        folders.list_files(model, [".safetensors"])
    assert maps.call_count == 1


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_the_configuration_that_adapters_share_is_kept_once(tmp_path, link):
    (tmp_path / "shared").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    for k in range(3):
        (tmp_path / f"{k}").mkdir()
        link(tmp_path / "shared", tmp_path / f"{k}" / "adapter_config.json")
    first, *others = (PeftConfig.read(tmp_path / f"{k}") for k in range(3))
    assert all(one.fields is first.fields for one in others)
    assert others[-1].where == repr(str(tmp_path / "2"))


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_record_and_a_config_that_runs_share_are_parsed_once(tmp_path, link):
    state = {"log_history": [{"step": 4, "eval_loss": 0.5}], "global_step": 4}
    (tmp_path / "state").write_text(json.dumps(state))
    (tmp_path / "config").write_text("{}")
    for k in range(5):
        step = tmp_path / "sweep" / f"run{k}" / "checkpoint-4"
        step.mkdir(parents=True)
        save_file({"w": torch.full((2,), float(k))}, step / "model.safetensors")
        link(tmp_path / "state", step / "trainer_state.json")
        link(tmp_path / "config", step / "config.json")
    with (
        patch.object(records, "read_text", wraps=records.read_text) as states,
        patch.object(hub_config, "read_text", wraps=hub_config.read_text) as configs,
    ):
        found = CheckpointCollection.from_path(tmp_path / "sweep", scores="recorded")
    assert [*found.scores.values()] == [-0.5] * 5
    assert (states.call_count, configs.call_count) == (1, 1)
