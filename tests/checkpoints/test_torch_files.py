"""State dicts are taken out of pickles, and nothing in a pickle runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import io
import operator
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import threading
import warnings
import zipfile
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from sksoup import CheckpointCollection, CheckpointError
from sksoup.checkpoints import sources, torch_files

from .files import STATE, read_all, write_file


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict", "module", "ema", "x"])
def test_the_one_state_dict_of_a_container_is_taken(tmp_path, name, legacy):
    container = {name: STATE, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    path = write_file(tmp_path / "run.ckpt", container, legacy)
    loaded = read_all(path)
    assert list(loaded) == ["a", "b"]
    assert torch.equal(loaded["a"], STATE["a"])


def test_several_state_dicts_need_a_key(tmp_path):
    other = {"a": STATE["a"] + 1, "b": STATE["b"]}
    path = write_file(tmp_path / "run.pt", {"model": STATE, "ema": other, "step": 1})
    listed = r"run\.pt' holds several state dicts: 'model' \(2 tensors\), 'ema' \(2 tensors\)"
    with pytest.raises(CheckpointError, match=listed + r"\. Choose one, .* key='model'"):
        sources.open_checkpoint(path)
    assert torch.equal(read_all(path, "ema")["a"], other["a"])
    with pytest.raises(CheckpointError, match=r"no state dict under key='nope': it holds 'model'"):
        sources.open_checkpoint(path, "nope")
    plain = write_file(tmp_path / "plain.pt", STATE)
    with pytest.raises(CheckpointError, match="it is a plain state dict"):
        sources.open_checkpoint(plain, "ema")


def test_one_state_dict_under_many_names(tmp_path, monkeypatch):
    """A pickle holds it once: each is looked at once, and few are listed."""
    container = {f"k{i}": STATE for i in range(30_000)}
    looked = []
    is_state_dict = torch_files.is_state_dict
    monkeypatch.setattr(
        torch_files,
        "is_state_dict",
        lambda value: looked.append(id(value)) or is_state_dict(value),
    )
    path = write_file(tmp_path / "run.pt", container)
    with pytest.raises(
        CheckpointError, match=r"'k4' \(2 tensors\) and 29995 more\. Choose"
    ) as error:
        sources.open_checkpoint(path)
    assert len(str(error.value)) < 1000
    assert len(looked) <= 3  # the container, twice, and the one in it
    mixed = {f"k{i}": {"w": torch.ones(2), "n": 3} for i in range(2)} | {"model": STATE}
    many = mixed | {f"m{i}": mixed["k0"] for i in range(1000)}
    with pytest.raises(CheckpointError, match=r"together with other values in '\w+', 'k1', so it"):
        sources.open_checkpoint(write_file(tmp_path / "mixed.pt", many))


def test_single_values_with_any_stride(tmp_path):
    """Such as a column of one row."""
    state = {"w": torch.randn(1, 4)[:, 0], "x": torch.randn(3, 1, 4)[..., :1]}
    assert state["w"].stride() == (4,)
    torch.save(state, tmp_path / "a.pt")
    files, in_memory = CheckpointCollection([tmp_path / "a.pt"]), CheckpointCollection([state])
    for ckpts in (files, in_memory):
        (name,) = ckpts
        assert ckpts.content_sha256(name) == in_memory.content_sha256("checkpoint0")
        ckpts.describe()
        ckpts.save(tmp_path / f"out {name}")
        saved = CheckpointCollection.from_path(tmp_path / f"out {name}")
        assert torch.equal(saved[name]["w"], state["w"])


def test_a_state_dict_with_extra_state_is_no_container(tmp_path):
    state = {"fc.weight": torch.ones(2), "fc._extra_state": {"scale": torch.ones(1)}}
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"not a plain state dict: 'fc._extra_state' is a d"):
        sources.open_checkpoint(tmp_path / "m.pt")


def test_numbers_beside_the_state_dict_of_a_container(tmp_path):
    """As training scripts keep the best accuracy and the state of their generator."""
    saved = {"state_dict": {"w": torch.ones(2)}, "epoch": 3, "best_acc1": torch.tensor(71.2),
             "rng_state": torch.get_rng_state()}  # fmt: skip
    torch.save(saved, tmp_path / "a.pt")
    assert list(sources.open_checkpoint(tmp_path / "a.pt").header) == ["w"]


MOMENTS = {"state": {0: {"exp_avg": torch.ones(2, 2)}}, "param_groups": [{"params": [0]}]}


@pytest.mark.parametrize(
    ("key", "beside"),
    [
        ("model", {"optimizer": MOMENTS, "optimizer_state_dict": MOMENTS, "opt": MOMENTS}),
        ("state_dict", {
            "optimizer_states": [MOMENTS], "lr_schedulers": [{"last_lr": torch.ones(2)}],
            "loops": {"fit_loop": {"epoch_progress": {}, "val": {"outputs": [torch.ones(3)]}}},
            "callbacks": {"EarlyStopping{}": {"best_score": torch.ones(1), "patience": 3}},
            "hyper_parameters": {"class_weights": torch.ones(3), "lr": 0.1},
            "MixedPrecision": {"scale": torch.tensor(65536.0), "growth_interval": 2000},
        }),
        ("model", {  # fairseq
            "cfg": {"task": {"seed": 1}}, "criterion": {}, "task_state": {},
            "extra_state": {"metrics": {"default": [(0, "loss", "AverageMeter", {})]},
                            "train_iterator": {"offset": torch.ones(2)}},
            "optimizer_history": [{"num_updates": 7}], "last_optimizer_state": MOMENTS,
        }),
        ("model", {  # detectron2
            "trainer": {"hooks": {"LRScheduler": {"last": torch.ones(2)}}, "iteration": 9,
                        "_trainer": {"optimizer": MOMENTS}},
        }),
        ("model", {"rng": {"torch": torch.get_rng_state(), "python": (3, (1, 2), None)}}),
        ("model", {"best": {"epoch": 3, "accuracy": torch.tensor(0.9)}}),
        ("state_dict", {"hyper_parameters": {"class_weights": torch.ones(3)}}),
    ],
    ids=["torch", "lightning", "fairseq", "detectron2", "generators", "numbers", "weights"],
)  # fmt: skip
def test_what_training_loops_keep_beside_the_model_needs_no_key(tmp_path, key, beside):
    torch.save({key: STATE, "epoch": 3, **beside}, tmp_path / "a.pt")
    assert list(sources.open_checkpoint(tmp_path / "a.pt").header) == list(STATE)


@pytest.mark.parametrize("name", ["best_loss", "optimal", "model_by_metric", "random_start"])
def test_two_networks_need_a_key_whatever_their_names(tmp_path, name):
    for other in (STATE | {"more": torch.ones(2)}, {f"module.{n}": w for n, w in STATE.items()}):
        torch.save({"net": STATE, name: other}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=f"several state dicts: 'net' .* '{name}'"):
            sources.open_checkpoint(tmp_path / "a.pt")


def test_one_state_dict_under_many_names_is_compared_once(tmp_path):
    container = {"net": STATE} | {f"optim{i}": STATE for i in range(1_000)}
    torch.save(container, tmp_path / "a.pt")
    with (
        patch.object(torch_files, "_is_network", wraps=torch_files._is_network) as looks,
        pytest.raises(CheckpointError, match="several state dicts: 'net'"),
    ):
        sources.open_checkpoint(tmp_path / "a.pt")
    assert looks.call_count == 1


def test_the_two_state_dicts_of_timm_need_a_key(tmp_path):
    saved = {"epoch": 3, "state_dict": STATE, "state_dict_ema": STATE, "optimizer": MOMENTS}
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"several state dicts: 'state_dict' .* 'state_dict_"):
        sources.open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"epoch": 3}, "'epoch' is a int, expected a tensor"),
        ([torch.ones(1)], "holds a list, expected a state dict"),
        ({}, "holds no tensors"),
    ],
)
def test_a_pickle_that_is_not_a_state_dict(tmp_path, content, match):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=match):
        CheckpointCollection([tmp_path / "odd.pt"])


def test_zip_that_is_no_checkpoint(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme", "hello")
    (tmp_path / "archive.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"archive\.pt' can't be read"):
        CheckpointCollection([tmp_path / "archive.pt"])


class Odd:
    """Stands for a class that is not installed where the checkpoint is opened."""

    def __init__(self, note):
        self.note = note


def test_harmless_foreign_classes_become_inert(tmp_path, monkeypatch):
    container = {
        "state_dict": STATE,
        "args": argparse.Namespace(lr=0.1, odd=Odd("x")),
        "best": np.float64(0.5),
        "when": np.arange(3),
    }
    path = write_file(tmp_path / "run.pt", container)
    monkeypatch.setattr(Odd, "__init__", None)  # would raise if it were called
    assert torch.equal(read_all(path)["a"], STATE["a"])


class Named(collections.namedtuple("Named", "state")):
    """A tuple with names."""


class Settings(dict):
    """As configurations often are."""


class Easy(dict):
    """With attributes of the same names, as configurations often have."""

    def __init__(self, **items):
        super().__init__(items)
        for name, value in items.items():
            setattr(self, name, value)


class Attributes(dict):
    """Its attributes are its items."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__ = self


class Items(list):
    """As others keep sequences."""


class Both:
    """Filled as a list and as a dict."""

    def __reduce__(self):
        return Both, (), None, iter([1]), iter([("a", 1)])


HISTORY = collections.defaultdict(list, loss=[0.1])
NET = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


@pytest.mark.parametrize(
    "beside",
    [
        HISTORY,
        collections.deque([0.1], maxlen=3),
        datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC),
        datetime.timedelta(1),
        re.compile("x"),
        frozenset([1]),
        range(3),
        torch.optim.Adam,
        int,
        functools.partial(torch.optim.Adam, lr=0.1),
        operator.itemgetter(1),
        nn.functional.relu,
        nn.functional.gelu,
        os.path.join,  # not called, and not even this function
        {"criterion": nn.CrossEntropyLoss(weight=torch.ones(2))},
        {"args": {"net": NET}},
        {"torch": torch.__version__},
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_is_kept_beside_the_weights_does_not_matter(tmp_path, beside):
    path = write_file(tmp_path / "run.pt", {"state_dict": STATE, "more": beside})
    assert torch.equal(read_all(path)["a"], STATE["a"])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (NET, r"more than tensors \(Sequential\)"),
        ({"model": NET}, "'model' is a Sequential, expected a tensor"),
        ({"model": NET, "ema": STATE}, "tensors together with other values in 'model'"),
        ({"model": {"net": NET}, "ema": STATE}, "tensors together with other values in 'model'"),
        ({"backbone": Odd(STATE), "head": STATE}, "other values in 'backbone'"),
        ({"backbone": Named(STATE), "head": STATE}, "other values in 'backbone'"),
        ({"lossless_encoder": Odd(STATE), "head": STATE}, "other values in 'lossless_encoder'"),
        ({"backbone": nn.BatchNorm1d(2, affine=False), "head": STATE}, "values in 'backbone'"),
    ],
)
def test_a_whole_module_is_not_overlooked(tmp_path, content, match):
    path = write_file(tmp_path / "run.pt", content)
    with pytest.raises(CheckpointError, match=match):
        sources.open_checkpoint(path)


@pytest.mark.parametrize(
    "config",
    [
        Settings(lr=1, more=Settings(x=[1])),
        Items([1, 2]),
        Settings(),
        Items(),
        Easy(device="cpu", data="x", name="n"),
        Attributes(device="cpu", size=1, x=[1]),
        Both(),
    ],
)
def test_configs_that_are_dicts_or_lists_of_a_class_of_their_own(tmp_path, config):
    if config and type(config) is Settings:
        config.note = "its state"
    path = write_file(tmp_path / "run.pt", {"model": STATE, "config": config, "epoch": 3})
    assert torch.equal(read_all(path)["a"], STATE["a"])
    path = write_file(tmp_path / "whole.pt", Settings(STATE))
    assert torch.equal(read_all(path)["a"], STATE["a"])


@pytest.mark.parametrize("hidden", ["get", "keys"])
def test_a_dict_of_a_class_of_its_own_does_not_hide_methods(tmp_path, hidden):
    state = Settings(STATE)
    setattr(state, hidden, 1)
    path = write_file(tmp_path / "run.pt", state)
    assert torch.equal(read_all(path)["a"], STATE["a"])
    assert not sources.open_checkpoint(path).is_plain


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("function", [os.rmdir, shutil.rmtree, pathlib.Path.rmdir])
def test_a_container_with_a_payload_is_refused(tmp_path, legacy, function):
    canary = tmp_path / "canary"
    canary.mkdir()

    class Payload:
        def __reduce__(self):
            return function, (canary,)

    path = write_file(tmp_path / "run.pt", {"state_dict": STATE, "hooks": [Payload()]}, legacy)
    with pytest.raises(CheckpointError, match=r"run\.pt' can't be read: it holds more than"):
        sources.open_checkpoint(path)
    assert canary.exists()


class _Payload:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, kind):
    path, canary = tmp_path / "evil.pt", tmp_path / "canary"
    payload = {"w": torch.ones(1), "x": _Payload(canary)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps({"x": _Payload(canary)}, protocol=2))
    else:
        write_file(path, payload, legacy=kind == "legacy")
    with pytest.raises(CheckpointError, match=r"evil\.pt' can't be read"):
        CheckpointCollection([path])
    assert not canary.exists()


@pytest.mark.parametrize(
    ("module", "is_read"),
    [
        ("builtins", False),
        ("os", False),
        ("torch", False),
        ("subprocess", False),
        ("shutil", False),
        ("runpy", False),
        ("numpy.testing", True),
        ("argparse", True),
    ],
)
def test_no_placeholder_runs_anything(tmp_path, monkeypatch, module, is_read):
    """Even where a name is let through, what it stands for does nothing."""
    ran = []

    class Stand:
        def __setstate__(self, state):
            ran.append(state)

    saved = Stand()
    saved.command = "touch"
    Stand.__module__, Stand.__qualname__ = module, "Stand"
    monkeypatch.setattr(f"{module}.Stand", Stand, raising=False)
    path = write_file(tmp_path / "run.pt", {"state_dict": STATE, "x": saved})
    if is_read:
        assert torch.equal(read_all(path)["a"], STATE["a"])
    else:
        with pytest.raises(CheckpointError, match=r"more than tensors \((\w+\.)?Stand\)"):
            read_all(path)
    assert not ran
    torch.load(path, weights_only=False)
    assert ran  # by torch itself


def test_containers_are_read_by_many_threads_and_no_warning_is_lost(tmp_path):
    paths = [tmp_path / f"{k}.pt" for k in range(2)]
    for path in paths:
        torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1)}, path)
    before, errors = list(warnings.filters), []

    def read(path):
        try:
            for _ in range(60):
                with sources.open_checkpoint(path).open() as one:
                    one("w")
        except CheckpointError as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(path,)) for path in paths * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert warnings.filters == before


def test_files_of_another_pickle_protocol_are_read_in_silence(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=3)
    code = (
        "import sys, pathlib, warnings; import torch, sklearn, skorch, safetensors, joblib;"
        "before = list(warnings.filters);"
        "import sksoup.checkpoints.sources as f; assert warnings.filters == before;"
        "print(list(f.open_checkpoint(pathlib.Path(sys.argv[1])).header))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.pt"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("['w']\n", "")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"Save it again, without pickle_protocol="):
        sources.open_checkpoint(tmp_path / "b.pt")


class Scaled(torch.Tensor):
    """A kind of tensor of another package, whose values may have another meaning."""


def test_tensors_of_other_classes_are_refused_by_name(tmp_path):
    torch.save({"w": torch.ones(2).as_subclass(Scaled)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"dense tensors \([\w.]+test_torch_files\.Scaled\)"):
        sources.open_checkpoint(tmp_path / "a.pt")
