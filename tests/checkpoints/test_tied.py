"""Tied weights stored by all of their names, beside checkpoints that store them once."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointError,
    ModelStockSoup,
    Recipe,
    UniformSoup,
    mix,
)
from sksoup.checkpoints import tied
from sksoup.checkpoints.tied import drop_copies
from sksoup.inspection import interpolation_path

from ..zoo import Walked, around, same_tensors

transformers = pytest.importorskip("transformers")

HEAD, WORDS = "lm_head.weight", "transformer.wte.weight"
X = {"input_ids": torch.arange(30).reshape(6, 5) % 40}


def gpt2(**kwargs):
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0,
        eos_token_id=1, **kwargs,
    ))  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return [*around(gpt2(), 3)]


@pytest.fixture
def runs(models, tmp_path):
    for k, model in enumerate(models):
        model.save_pretrained(tmp_path / f"runs/run{k}")
    return tmp_path / "runs"


def once(model):
    """A state dict in which tied weights are stored once."""
    return {name: value for name, value in model.state_dict().items() if name != HEAD}


def uniform(*checkpoints):
    return UniformSoup(task="language-modeling").fit(CheckpointCollection(*checkpoints), X)


def verified(soup):
    return soup.recipe_.verify(soup.state_dict(), soup.checkpoints_).ok


def test_the_start_of_folders_may_be_a_module_a_state_dict_or_a_file(runs, tmp_path):
    start = gpt2()
    start.save_pretrained(tmp_path / "start")
    torch.save(start.state_dict(), tmp_path / "start.pt")
    torch.save(nn.DataParallel(start).state_dict(), tmp_path / "ddp.pt")
    copied = {name: value.clone() for name, value in start.state_dict().items()}
    folders = CheckpointCollection.from_path(runs)
    soup = UniformSoup(task="language-modeling").fit(folders, X)
    stock = ModelStockSoup(start=tmp_path / "start", task="language-modeling").fit(folders, X)
    wise = soup.interpolate(tmp_path / "start", 0.5)
    path = interpolation_path(tmp_path / "start", soup, X, None, t=2)
    for form in (start, start.state_dict(), copied, tmp_path / "start.pt", tmp_path / "ddp.pt"):
        again = soup.interpolate(form, 0.5)
        assert HEAD not in again.checkpoints_.layout
        assert same_tensors(again.state_dict(), wise.state_dict())
        assert verified(again)
        assert np.array_equal(interpolation_path(form, soup, X, None, t=2).scores, path.scores)
        again = ModelStockSoup(start=form, task="language-modeling").fit(folders, X)
        assert same_tensors(again.state_dict(), stock.state_dict())
        assert verified(again)


def test_soups_of_modules_may_start_from_a_folder(models, runs):
    soup = uniform(models)
    assert HEAD in soup.layers_
    wise = soup.interpolate(runs / "run0", 0.5)
    assert HEAD in soup.layers_
    assert HEAD not in wise.layers_
    assert verified(wise)
    same = soup.interpolate(models[0], 0.5).state_dict()
    assert same_tensors(wise.state_dict(), {name: same[name] for name in wise.layers_})
    path = interpolation_path(runs / "run0", soup, X, None, t=3)
    assert path.scores[1] == pytest.approx(wise.score(X))


def test_a_run_saved_with_all_names_joins_the_others(models, runs, tmp_path):
    os.remove(runs / "run1" / "model.safetensors")
    torch.save(models[1].state_dict(), runs / "run1" / "pytorch_model.bin")
    collection = CheckpointCollection.from_path(runs)
    assert HEAD not in collection.layout
    state = once(models[1])
    assert same_tensors(collection["run1"], {name: state[name] for name in collection.layout})
    soup = UniformSoup(task="language-modeling").fit(collection, X)
    plain = CheckpointCollection([once(model) for model in models])
    mixed = mix(plain, soup.coef_)
    assert same_tensors(soup.state_dict(), {name: mixed[name] for name in collection.layout})
    soup.save_pretrained(tmp_path / "soup")
    assert Recipe.load(tmp_path / "soup").verify(tmp_path / "soup", collection).ok
    # alone the file keeps its names, but recipes of either collection can be rebuilt from the other
    alone = CheckpointCollection([runs / "run1"])
    assert HEAD in alone.layout
    assert HEAD in CheckpointCollection(collection.select(["run1"])).layout
    best = BestCheckpoint(task="language-modeling").fit(collection.select(["run1"]), X)
    assert best.recipe_.verify(best.state_dict(), alone).ok
    best = BestCheckpoint(task="language-modeling").fit(alone, X)
    assert best.recipe_.verify(best.state_dict(), collection).ok


def test_a_module_in_a_recipe_is_found_in_the_folder_saved_from_it(models, runs):
    soup = uniform({"a": runs / "run0", "b": models[1]})
    folders = CheckpointCollection({"a": runs / "run0", "other": runs / "run1"})
    assert soup.recipe_.verify(soup.state_dict(), folders).ok
    alone = CheckpointCollection({"b": models[1]})
    assert soup.checkpoints_.identity("b") != alone.identity("b")  # for memory=


def test_untied_weights_are_an_error(runs, tmp_path):
    untied = gpt2(tie_word_embeddings=False)
    torch.save(untied.state_dict(), tmp_path / "untied.pt")
    for form in (untied.state_dict(), tmp_path / "untied.pt"):
        with pytest.raises(CheckpointError, match=f"{HEAD!r} has other values than {WORDS!r}"):
            CheckpointCollection([runs / "run0", form])
    wide = {**untied.state_dict(), HEAD: untied.lm_head.weight.double()}
    with pytest.raises(CheckpointError, match="these weights are not tied"):
        CheckpointCollection([runs / "run0", wide])
    # the same values are no ties if the module has none
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.transformer.wte.weight)
    with pytest.raises(CheckpointError, match=f"it adds {HEAD!r}"):
        CheckpointCollection([once(untied), untied.state_dict()], module=untied)


def test_without_a_module_names_of_one_memory_are_one_tensor(models, tmp_path):
    torch.save(models[0].state_dict(), tmp_path / "tied.pt")
    for state in (models[0].state_dict(), tmp_path / "tied.pt"):
        collection = CheckpointCollection([state, once(models[1])])
        assert HEAD not in collection.layout
        assert same_tensors(collection[collection.names[0]], once(models[0]))
    copied = {name: value.clone() for name, value in models[0].state_dict().items()}
    with pytest.raises(CheckpointError, match=f"it adds {HEAD!r}"):
        CheckpointCollection([once(models[1]), copied])
    base = torch.eye(4)
    for other in (base[:2, :2], base.t(), torch.eye(4), base[:0]):  # further views are not ties
        state = {"one": base, "other": other}
        torch.save(state, tmp_path / "views.pt")
        for form in (state, tmp_path / "views.pt"):
            with pytest.raises(CheckpointError, match="adds 'other'"):
                CheckpointCollection([{"one": torch.eye(4)}, form])


def test_tied_weights_in_memory_are_copied_once(models):
    held = CheckpointCollection([models[0]]).held_tensors()
    state = models[0].state_dict()
    assert len({value.data_ptr() for value in held}) == len(state) - 1


class Distributed(torch.Tensor):
    """A tensor without an address, like a DTensor."""

    def data_ptr(self):
        return 0


def test_tensors_without_an_address_are_not_tied():
    values = torch.eye(2), torch.ones(2, 2)
    state = {str(i): value.as_subclass(Distributed) for i, value in enumerate(values)}
    held = CheckpointCollection([state])["checkpoint0"]
    assert all(torch.equal(held[name], state[name]) for name in state)


def test_a_header_that_many_share_is_walked_once():
    """Adapters that add no tensor have that of their base."""

    header = Walked(a=1, b=2)
    entries = [SimpleNamespace(header=header) for _ in range(50)]
    for wanted in (None, {"a", "b", "c"}):
        header.n_walks = 0
        assert drop_copies(entries, None, wanted) == entries
        assert header.n_walks == 1


def test_each_further_name_of_a_tensor_is_compared_once(monkeypatch):
    """Once, with each name that all checkpoints have."""
    compared = []
    monkeypatch.setattr(tied, "same_bits", lambda a, b: compared.append(a) or torch.equal(a, b))
    net = nn.ModuleList([nn.Linear(2, 2)] * 40)
    full = net.state_dict()
    half = {name: full[name] for name in [*full][:40]}
    assert len(CheckpointCollection([half, full], module=net).layout) == 40
    assert len(compared) == 2 * 39
    full["39.bias"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r"'39.bias' has other values than '0.bias' in it"):
        CheckpointCollection([half, full], module=net)
    full = net.state_dict()
    full["1.bias"] = torch.zeros(2)  # which both have
    with pytest.raises(CheckpointError, match=r"'1.bias' has other values than '0.bias' in it"):
        CheckpointCollection([half, full], module=net)
