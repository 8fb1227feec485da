"""Prefixes of wrappers are dropped where that makes the names fit."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, RecipeError, UniformSoup

from ..zoo import Net, Zoo, make_states, same_tensors


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


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


def test_tensors_beside_the_network_are_left_out_when_asked(zoo: Zoo, tmp_path):
    """A Lightning module with a weighted loss and a metric."""
    for k, state in enumerate(make_states(3, seed=0)):
        saved = {f"model.{name}": value for name, value in state.items()}
        saved |= {"criterion.weight": torch.ones(3), "train_acc.total": torch.tensor(float(k))}
        torch.save({"state_dict": saved, "epoch": k}, tmp_path / f"{k}.ckpt")
    whole = CheckpointCollection.from_path(tmp_path, module=Net)
    with pytest.raises(CheckpointError, match=r"after the prefix 'model.'. .*prefix='model.'"):
        UniformSoup().fit(whole, zoo.X, zoo.y)
    part = CheckpointCollection.from_path(tmp_path, module=Net, prefix="model.")
    assert set(part.layout) == set(Net().state_dict())
    soup = UniformSoup().fit(part, zoo.X, zoo.y)
    assert soup.recipe_.verify(soup.state_dict(), part).ok
    with pytest.raises(RecipeError, match=r"with the same module or prefix"):
        soup.recipe_.cook(CheckpointCollection.from_path(tmp_path))
    assert soup.recipe_.cook(pickle.loads(pickle.dumps(part))).keys() == part.layout.keys()
    with pytest.raises(CheckpointError, match=r"prefix='net.': no tensor name starts with it"):
        CheckpointCollection.from_path(tmp_path, prefix="net.")


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
