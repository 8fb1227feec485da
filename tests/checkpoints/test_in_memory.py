"""State dicts in memory are copies."""

from __future__ import annotations

import hashlib

import pytest
import torch

from sksoup import CheckpointCollection, CheckpointError

from ..zoo import Net


def test_memory_checkpoints_are_copies():
    net = Net()
    collection = CheckpointCollection([net])
    with torch.no_grad():
        net.head.weight.zero_()
    assert collection["checkpoint0"]["head.weight"].any()
    collection["checkpoint0"]["head.weight"].zero_()
    assert collection["checkpoint0"]["head.weight"].any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.bits8])
def test_dtypes_that_no_file_holds_are_refused(dtype):
    """Once a file was written of the first that could not be opened again."""
    with pytest.raises(CheckpointError, match=rf"'w' has dtype {dtype}, expected one of .*float32"):
        CheckpointCollection([{"w": torch.ones(2, dtype=torch.uint8).view(dtype)}])


def test_sparse_tensors_are_refused():
    with pytest.raises(CheckpointError, match="sparse"):
        CheckpointCollection([{"w": torch.eye(2).to_sparse()}])


def test_names_that_could_be_taken_for_values_have_digests_of_their_own():
    values = torch.tensor([65, 66, 67, 68], dtype=torch.uint8)
    apart = {"a": values, "b": values}
    joined = {"a:torch.uint8:(4,);ABCDb": values}
    digests = [CheckpointCollection({"m": state}).sha256("m") for state in (apart, joined)]
    assert len(set(digests)) == 2
    stream = b"a:torch.uint8:(4,);ABCDb:torch.uint8:(4,);ABCD"
    assert digests[0] == hashlib.sha256(stream).hexdigest()  # as in recipes of older versions
