"""Folders are checkpoints, or hold some."""

from __future__ import annotations

import pytest
from safetensors.torch import save_file
from skorch.callbacks import Checkpoint

from sksoup import CheckpointCollection, CheckpointError, mix
from sksoup.checkpoints.folders import find_weights

from ..zoo import Net, make_states, same_tensors
from .files import STATE, fitted_net


def test_a_peft_folder_is_its_adapter_and_nothing_else(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a PEFT adapter and no weights"):
        find_weights(tmp_path)
    save_file(STATE, tmp_path / "adapter_model.safetensors")
    assert find_weights(tmp_path) == tmp_path / "adapter_model.safetensors"
    save_file(STATE, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"and .model\.safetensors., too"):
        find_weights(tmp_path)


@pytest.mark.parametrize("safetensors", [False, True])
def test_skorch_checkpoint_folders(tmp_path, safetensors):
    for run in ("run2", "run10"):
        callback = Checkpoint(dirname=tmp_path / run, use_safetensors=safetensors,
                              f_optimizer=None, f_criterion=None)  # fmt: skip
        fitted_net(callbacks=[callback])
    collection = CheckpointCollection.from_path(tmp_path, module=Net)
    assert collection.names == ("run2", "run10")
    one = CheckpointCollection.from_path(tmp_path / "run2", module=Net)
    assert same_tensors(one["run2"], collection["run2"])
    assert mix(collection, [0.5, 0.5]).keys() == collection.layout.keys()


def test_what_training_loops_leave_beside_the_weights_is_left_out(tmp_path):
    save_file(make_states(1, seed=0)[0], tmp_path / "a.safetensors")
    for name in (
        "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "optimizer_1.bin",
        "sampler.bin", "sampler_1.bin", "dl_state_dict.bin",
    ):  # fmt: skip
        (tmp_path / name).write_bytes(b"not weights")
    assert CheckpointCollection.from_path(tmp_path).names == ("a",)


def test_a_folder_that_is_a_checkpoint_and_holds_more_must_be_told(tmp_path):
    for folder in (tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        save_file(make_states(1, seed=0)[0], folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 1 more, such as 'other'. Choose"):
        CheckpointCollection.from_path(tmp_path)
    # both remedies
    assert len(CheckpointCollection([tmp_path], module=Net)) == 1
    assert CheckpointCollection.from_path(f"{tmp_path}/*/", module=Net).names == ("other",)
