"""Adapters that PEFT would load otherwise, on other bases, or that take too long."""

from __future__ import annotations

import copy
import json
import os
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, SoupWarning, mix

from ..adapters import build, peft_model, save_adapters

PREFIX = "base_model.model."


def adapter(folder: Path, k: int = 1, **fields) -> Path:
    """A folder that peft writes, and some fields of its configuration changed."""
    peft_model(k).save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def rewritten(folder: Path, **tensors) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **{PREFIX + n: t for n, t in tensors.items()}}, path)
    return folder


def opened(folder: Path) -> CheckpointCollection:
    return CheckpointCollection([folder], module=build)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"target_modules": ["conv1d"]}, "not in its 'target_modules'"),
        ({"target_modules": "conv.*"}, "not in its 'target_modules'"),
        ({"exclude_modules": ["lin"]}, "its 'exclude_modules' leaves out"),
        ({"exclude_modules": "li."}, "its 'exclude_modules' leaves out"),
    ],
)
def test_factors_that_peft_would_not_load_are_refused(tmp_path, fields, error):
    with pytest.raises(CheckpointError, match=error):
        opened(adapter(tmp_path / "a", **fields))


@pytest.mark.parametrize("targets", ["all-linear", ".*(lin|conv1d)", "(?:lin|conv1d)", None])
def test_targets_may_be_said_in_any_way(tmp_path, targets):
    assert len(opened(adapter(tmp_path / "a", target_modules=targets))) == 1


@pytest.mark.parametrize("layers", [[0], 0])
def test_layers_that_peft_would_leave_alone_are_refused(tmp_path, layers):
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in "ab"]
    net = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
    fields = {"target_modules": ["q"], "modules_to_save": None, "rank_pattern": {}}
    peft_model(0, copy.deepcopy(net), **fields).save_pretrained(str(tmp_path / "a"))
    assert len(CheckpointCollection([tmp_path / "a"], module=net)) == 1
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_to_transform": layers}))
    with pytest.raises(CheckpointError, match=r"'layers\.1\.q', not in its 'layers_to_transform'"):
        CheckpointCollection([tmp_path / "a"], module=net)


def test_a_pair_of_another_kind_of_layer_is_refused(tmp_path):
    folder = rewritten(
        adapter(tmp_path / "a"),
        **{"lin.lora_embedding_A": torch.ones(4, 8), "lin.lora_embedding_B": torch.ones(12, 4)},
    )
    with pytest.raises(CheckpointError, match="is not what PEFT loads for 'lin'"):
        opened(folder)


def test_a_whole_tensor_of_integers_is_refused(tmp_path):
    folder = rewritten(adapter(tmp_path / "a"), **{"norm.weight": torch.ones(72).int()})
    with pytest.raises(CheckpointError, match=r"'norm.weight' is torch.int32, and torch.float32"):
        opened(folder)


def test_factors_of_one_byte_are_widened(tmp_path):
    folder = adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    small = {n: t.to(torch.float8_e4m3fn) if "lora_" in n else t for n, t in state.items()}
    save_file({n: t.float() if "lora_" in n else t for n, t in small.items()}, path)
    expected = mix(opened(folder), [1.0])
    save_file(small, path)
    torch.testing.assert_close(mix(opened(folder), [1.0]), expected, rtol=0, atol=0)


def test_ranks_beyond_any_matrix_are_refused(tmp_path):
    folder = adapter(tmp_path / "a", r=5000, target_modules=["lin"])
    path = folder / "adapter_model.safetensors"
    factors = {"lora_A.weight": torch.ones(5000, 8), "lora_B.weight": torch.ones(12, 5000)}
    save_file({f"{PREFIX}lin.{n}": t for n, t in factors.items()}, path)
    with pytest.raises(CheckpointError, match=r"rank 5,000, and the matrix has 12 x 8"):
        opened(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        "(?i:[" + "".join(f"{chr(c)}-{chr(c + 1)}" for c in range(0x4E00, 0x6E00, 3)) + "])",
        "(" + ".?" * 19 + ")X",
        "a" * 501,
        "(?=lin)",
    ],
    ids=["ranges", "options", "long", "lookahead"],
)
def test_patterns_that_take_long_are_refused(tmp_path, pattern):
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match="may take too long to match"):
        opened(adapter(tmp_path / "a", rank_pattern={pattern: 3}))
    opened(adapter(tmp_path / "b", target_modules=pattern))  # which PEFT alone has to match
    assert time.perf_counter() - begin < 10


@pytest.fixture
def bases(tmp_path):
    """Two bases of one architecture, and an adapter of each."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, num_labels=2,
    )  # fmt: skip
    for seed, name in enumerate("AB"):
        torch.manual_seed(seed)
        folder = tmp_path / f"base{name}"
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
        base = transformers.BertForSequenceClassification.from_pretrained(folder)
        how = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, that peft calls
            peft.get_peft_model(base, how).save_pretrained(str(tmp_path / "ads" / f"ad{name}"))
    return tmp_path


def test_adapters_of_different_bases_are_refused(bases):
    with pytest.raises(CheckpointError, match="adapters of one base only can be mixed"):
        CheckpointCollection.from_path(bases / "ads")
    assert len(CheckpointCollection([bases / "ads" / "adB"])) == 1
    with pytest.warns(SoupWarning, match="name several bases, such as"):
        CheckpointCollection.from_path(bases / "ads", module=bases / "baseA")


def test_one_base_may_be_named_in_two_ways(bases):
    os.symlink(bases / "baseA", bases / "link")
    path = bases / "ads" / "adB" / "adapter_config.json"
    fields = json.loads(path.read_text()) | {"base_model_name_or_path": str(bases / "link")}
    path.write_text(json.dumps(fields))
    assert len(CheckpointCollection.from_path(bases / "ads")) == 2
    fields["base_model_name_or_path"] = "/elsewhere/baseA"
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="which is not on this machine"):
        CheckpointCollection.from_path(bases / "ads")
    assert len(CheckpointCollection.from_path(bases / "ads", module=bases / "baseA")) == 2


def test_links_do_not_hang_a_pattern_that_finds_nothing(tmp_path):
    for link in ("a", "b"):
        os.symlink(tmp_path, tmp_path / link)
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match="No checkpoints found"):
        CheckpointCollection.from_path(tmp_path / "**" / "*.safetensors")
    assert time.perf_counter() - begin < 10


def test_what_peft_writes_is_opened(tmp_path):
    save_adapters(tmp_path)
    assert len(CheckpointCollection.from_path(tmp_path, module=build)) == 4
