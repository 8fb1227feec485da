"""What a config.json holds, without what acts."""

from __future__ import annotations

import json
import math
import os
from unittest.mock import patch

import pytest
import torch

from sksoup import CheckpointError
from sksoup.checkpoints import hub_config
from sksoup.checkpoints.hub_config import MANY, read_config
from sksoup.checkpoints.protocol import TensorInfo


def test_infinite_floats_are_read_as_transformers_writes_them(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"limit": [0.0, {"__float__": "Infinity"}], "other": {"__float__": 3}}')
    config = read_config(path, {})
    assert config == {"limit": [0.0, math.inf], "other": {"__float__": 3}}


def test_as_many_parts_as_the_weights_have_are_allowed(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"num_labels": MANY + 1}))
    with pytest.raises(CheckpointError, match=r"config\.json' can't be built: 'num_labels'"):
        read_config(path, {})
    header = {"head.weight": TensorInfo((MANY + 1, 4), torch.float32)}
    assert read_config(path, header) == {"num_labels": MANY + 1}


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("name", hub_config.OTHER_CONFIGS)
def test_links_to_another_config_are_parsed_once(tmp_path, link, name):
    (tmp_path / "shared").write_text(json.dumps({"labels": [name]}))
    for k in range(5):
        (tmp_path / f"{k}").mkdir()
        (tmp_path / f"{k}" / "config.json").write_text("{}")
        link(tmp_path / "shared", tmp_path / f"{k}" / name)
    with patch.object(hub_config, "read_text", wraps=hub_config.read_text) as read:
        for k in range(5):
            hub_config.refuse_other_weights(tmp_path / f"{k}")
    assert [call.args[0].name for call in read.call_args_list].count(name) == 1
