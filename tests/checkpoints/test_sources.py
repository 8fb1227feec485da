"""Prefixes, folders, nets, names: what users have, as one collection."""

from __future__ import annotations

import os
import pickle
import resource
import warnings

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint
from skorch.dataset import ValidSplit
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointError,
    RecipeError,
    UniformSoup,
    mix,
)
from sksoup.checkpoints.health import Health

from ..zoo import Net, Zoo, make_states, same_tensors


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


# ------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("module", [Net, Net(), None])
def test_a_prefix_is_dropped_where_that_makes_the_names_fit(tmp_path, prefix, module):
    plain, wrapped = make_states(2, seed=0)
    save_file(plain, tmp_path / "a.safetensors")
    torch.save(prefixed(wrapped, prefix), tmp_path / "b.pt")
    collection = CheckpointCollection.from_path(tmp_path, module=module)
    assert same_tensors(collection["b"], {name: wrapped[name] for name in collection.layout})


def test_a_prefix_that_all_files_have_is_dropped_for_the_module_only():
    states = [prefixed(state, "model.") for state in make_states(2, seed=0)]
    assert "head.bias" in CheckpointCollection(states, module=Net).layout
    assert "model.head.bias" in CheckpointCollection(states).layout


def test_what_wrappers_really_write(tmp_path):
    net = Net()
    torch.save(nn.DataParallel(net).state_dict(), tmp_path / "ddp.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
        torch.save(torch.compile(net).state_dict(), tmp_path / "compiled.pt")
    lightning = {"state_dict": prefixed(net.state_dict(), "model."), "hyper_parameters": {"lr": 1}}
    torch.save(lightning, tmp_path / "epoch=3.ckpt")
    collection = CheckpointCollection.from_path(tmp_path, module=Net)
    assert collection.names == ("compiled", "ddp", "epoch=3")
    assert all(same_tensors(collection[name], dict(net.state_dict())) for name in collection)


def test_a_prefix_that_belongs_to_the_module_stays():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

        def forward(self, x):
            return self.model(x)

    states = [Wrapped().state_dict() for _ in range(2)]
    for module in (Wrapped, None):
        assert list(CheckpointCollection(states, module=module).layout) == [
            "model.weight",
            "model.bias",
        ]


# ---------------------------------------------------------------------- skorch and folders


def fitted_net(**kwargs):
    torch.manual_seed(0)
    X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    y = np.arange(40) % 3
    net = NeuralNetClassifier(
        Net, criterion=nn.CrossEntropyLoss, max_epochs=2, verbose=0,
        train_split=ValidSplit(2), **kwargs,
    )  # fmt: skip
    return net.fit(X, y), X, y


def test_fitted_skorch_nets_bring_weights_and_module():
    nets = [fitted_net()[0] for _ in range(2)]
    collection = CheckpointCollection(nets)
    assert same_tensors(collection["checkpoint1"], dict(nets[1].module_.state_dict()))
    assert isinstance(collection.build_module(), Net)


def test_a_skorch_net_says_the_architecture():
    net = NeuralNetClassifier(Net, criterion=nn.CrossEntropyLoss)
    states = make_states(2, seed=0)
    before = torch.get_rng_state()
    collection = CheckpointCollection(states, module=net)
    assert isinstance(collection.build_module(), Net)
    assert torch.equal(torch.get_rng_state(), before)
    assert not hasattr(net, "module_")


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
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"not weights")
    assert CheckpointCollection.from_path(tmp_path).names == ("a",)


def test_a_folder_that_is_a_checkpoint_and_holds_more_must_be_told(tmp_path):
    for folder in (tmp_path, tmp_path / "checkpoint-5"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        save_file(make_states(1, seed=0)[0], folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 1 more, such as 'checkpoint-5': say which"):
        CheckpointCollection.from_path(tmp_path)
    found = CheckpointCollection.from_path(tmp_path / "checkpoint-*", module=Net)
    assert found.names == ("checkpoint-5",)


def test_the_same_file_twice_gets_two_names(tmp_path):
    save_file(make_states(1, seed=0)[0], tmp_path / "a.safetensors")
    save_file(make_states(1, seed=0)[0], tmp_path / "b.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    names = CheckpointCollection([a, b, a]).names
    assert names[0].endswith("a.safetensors#0")
    assert names[2].endswith("a.safetensors#2")
    assert names[1].endswith("b.safetensors")
    torch.save(make_states(1, seed=0)[0], tmp_path / "a.pt")
    assert CheckpointCollection.from_path(tmp_path).names == (
        "a.pt", "a.safetensors", "b.safetensors",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_half_precision_averages_in_float32_and_comes_back(tmp_path, dtype, suffix):
    # 2048 + 1 is not a float16 and 256 + 1 no bfloat16: sums in half precision would lose the ones
    big = 2048.0 if dtype == torch.float16 else 256.0
    values = [big, 1.0, 1.0, big + 2 * 2 ** (dtype == torch.bfloat16)]
    for k, value in enumerate(values):
        state = {"w": torch.full((3,), value, dtype=dtype)}
        path = tmp_path / f"{k}{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    mixed = mix(CheckpointCollection.from_path(tmp_path), [0.25] * 4)["w"]
    assert mixed.dtype == dtype
    assert torch.equal(mixed, torch.full((3,), sum(values) / 4).to(dtype))


# ------------------------------------------------------------------------------- laziness


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_opening_a_thousand_checkpoints_reads_headers_only(tmp_path, monkeypatch, suffix):
    """Counted by the kernel: bytes this process asked for, and its open files."""
    n, nbytes = 1000, 4_000_000
    first = tmp_path / f"ft0{suffix}"
    state = {"w": torch.zeros(nbytes // 4), "small": torch.zeros(2)}
    save_file(state, first) if suffix == ".safetensors" else torch.save(state, first)
    for k in range(1, n):
        os.link(first, tmp_path / f"ft{k}{suffix}")
    most_open = 0
    original = torch.load, safetensors.safe_open

    def counting(function):
        def call(*args, **kwargs):
            nonlocal most_open
            most_open = max(most_open, len(os.listdir("/proc/self/fd")))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "load", counting(original[0]))
    monkeypatch.setattr("sksoup.checkpoints.read.safe_open", counting(original[1]))
    files_before = len(os.listdir("/proc/self/fd"))
    before, resident = bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    collection = CheckpointCollection.from_path(tmp_path)
    pickle.dumps(UniformSoup(collection))
    repr(collection)
    assert len(collection) == n
    assert collection.names[-1] == "ft999"
    assert bytes_read() - before < n * 65_536
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 200_000  # kB of 4 GB
    assert 0 < most_open <= files_before + 3
    assert len(os.listdir("/proc/self/fd")) <= files_before + 1
    before = bytes_read()
    with collection.open("ft7") as read:
        read("small")
    assert bytes_read() - before < 65_536  # mapped: what is not asked for is not read


def bytes_read() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def test_the_average_reads_every_byte_once(tmp_path, monkeypatch):
    states = make_states(5, seed=0)
    for k, state in enumerate(states):
        save_file(state, tmp_path / f"{k}.safetensors")
    collection = CheckpointCollection.from_path(tmp_path)
    seen = []
    original = Health.see
    monkeypatch.setattr(
        Health,
        "see",
        lambda self, name, tensor, value: (
            seen.append((name, tensor)) or original(self, name, tensor, value)
        ),
    )
    for read_by in (
        lambda: mix(collection, [0.2] * 5),
        lambda: mix(collection, [0.2] * 5, out=tmp_path / "mixed"),
    ):
        seen.clear()
        read_by()
        floating = [n for n, info in collection.layout.items() if info.is_floating]
        assert len(seen) == len(set(seen))
        assert {(k, n) for k, n in seen if n in floating} == {
            (k, n) for k in collection for n in floating
        }


def test_a_file_cut_off_under_its_map_is_found_when_it_is_opened_again(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(make_states(1, seed=0)[0], path)
    collection = CheckpointCollection([path])
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CheckpointError, match="changed on disk"):
        collection["a"]


def test_tensors_beside_the_network_are_left_out_when_asked(zoo: Zoo, tmp_path):
    """A Lightning module with a weighted loss and a metric."""
    for k, state in enumerate(make_states(3, seed=0)):
        saved = {f"model.{name}": value for name, value in state.items()}
        saved |= {"criterion.weight": torch.ones(3), "train_acc.total": torch.tensor(float(k))}
        torch.save({"state_dict": saved, "epoch": k}, tmp_path / f"{k}.ckpt")
    whole = CheckpointCollection.from_path(tmp_path, module=Net)
    with pytest.raises(CheckpointError, match=r"are there, behind 'model.': .*prefix='model.'"):
        UniformSoup().fit(whole, zoo.X, zoo.y)
    part = CheckpointCollection.from_path(tmp_path, module=Net, prefix="model.")
    assert set(part.layout) == set(Net().state_dict())
    soup = UniformSoup().fit(part, zoo.X, zoo.y)
    assert soup.recipe_.verify(soup.state_dict(), part).ok
    with pytest.raises(RecipeError, match=r"with its module or prefix"):
        soup.recipe_.cook(CheckpointCollection.from_path(tmp_path))
    assert soup.recipe_.cook(pickle.loads(pickle.dumps(part))).keys() == part.layout.keys()
    with pytest.raises(CheckpointError, match=r"prefix='net.': no name in it begins so"):
        CheckpointCollection.from_path(tmp_path, prefix="net.")


def test_another_architecture_is_still_another_architecture(zoo: Zoo):
    with pytest.raises(CheckpointError, match=r"Give the architecture they were saved from"):
        UniformSoup().fit(CheckpointCollection(zoo.checkpoints, module=Other), zoo.X, zoo.y)


class Other(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.another = torch.nn.Linear(4, 3)

    def forward(self, X):
        return self.another(X)


def test_a_collection_is_opened_again_without_a_read(zoo: Zoo, tmp_path, monkeypatch):
    files = CheckpointCollection(make_states(3, seed=0)).save(tmp_path)
    prefixed = {name: {f"module.{k}": v for k, v in files[name].items()} for name in files}
    for old in (files, CheckpointCollection(prefixed, prefix="module.")):
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointCollection, "open", None)
            scores = {name: 0.1 * k for k, name in enumerate(old)}
            again = CheckpointCollection(old, module=Net, scores=scores)
        assert again.names == old.names
        assert again.path("checkpoint0") == old.path("checkpoint0")
        assert again.layout == old.layout
        best = BestCheckpoint().fit(again, zoo.X, zoo.y)
        assert best.ingredients_ == ("checkpoint2",)
    assert CheckpointCollection(again).scores == scores
    assert CheckpointCollection(again).module is not None


def test_names_do_not_lead_out_of_the_folder(tmp_path):
    states = make_states(2, seed=0)
    collection = CheckpointCollection({"a": states[0], "../b": states[1]})
    with pytest.raises(ValueError, match="would be outside"):
        collection.save(tmp_path / "zoo")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "dtypes", [(torch.float8_e4m3fn, torch.float32), (torch.uint16, torch.int64)]
)
def test_dtypes_that_do_not_mix_are_named(dtypes):
    states = [{"w": torch.zeros(2).to(dtype)} for dtype in dtypes]
    with pytest.raises(CheckpointError, match=f"'w' has dtype {dtypes[1]}, which torch can't mix"):
        CheckpointCollection(states)


def test_a_collection_is_opened_again_with_another_key_or_module(zoo: Zoo, tmp_path):
    state, ema = make_states(2, seed=0)
    torch.save({"model": state, "ema": ema}, tmp_path / "a.pt")
    old = CheckpointCollection([tmp_path / "a.pt"], key="model")
    new = CheckpointCollection(old, key="ema")
    assert torch.equal(new["a"]["head.bias"], ema["head.bias"])
    twice = [prefixed(state, "module.model."), prefixed(ema, "model.")]
    each_other = CheckpointCollection(twice)
    assert set(each_other.layout) == set(prefixed(state, "model."))
    assert set(CheckpointCollection(each_other, module=Net).layout) == set(state)
