"""Tensors that models of transformers compute when they are built, which files lack."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sksoup import CheckpointCollection, CheckpointError, MEHLSoup, Recipe, UniformSoup
from sksoup.checkpoints import computed

from ..zoo import around

transformers = pytest.importorskip("transformers")

POSITIONS = "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"
X = {"input_ids": torch.arange(60).reshape(6, 10) % 36 + 3}
Y = torch.arange(36).reshape(6, 6) % 36 + 3
DECODER = {"decoder_input_ids": Y}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three fine-tunings of a tiny random MarianMT model."""
    root = tmp_path_factory.mktemp("marian")
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=40, decoder_vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=20, pad_token_id=1, eos_token_id=2,
        forced_eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    start = transformers.MarianMTModel(config)
    for k, model in enumerate(around(start, 3)):
        model.save_pretrained(root / f"run{k}")
    return root


def load(folder):
    return transformers.MarianMTModel.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model(**X, **DECODER).logits


def fit(checkpoints, **kwargs):
    return UniformSoup(task="language-modeling", **kwargs).fit(checkpoints, X, Y.numpy())


def test_positions_are_those_that_from_pretrained_computes(runs, tmp_path):
    folders = CheckpointCollection.from_path(runs)
    assert not {*POSITIONS} & folders.layout.keys()
    states = [load(folders.path(name)).state_dict() for name in folders]
    mean = load(runs / "run0")
    mean.load_state_dict({n: sum(s[n].double() for s in states) / 3 for n in states[0]})
    config = mean.config
    for module in (None, lambda: transformers.MarianMTModel(config), load(runs / "run0")):
        soup = fit(CheckpointCollection.from_path(runs, module=module))
        assert torch.allclose(logits(soup.module_), logits(mean), atol=1e-6)
    soup.save_pretrained(tmp_path / "soup")
    assert torch.equal(logits(load(tmp_path / "soup")), logits(soup.module_))
    assert Recipe.load(tmp_path / "soup").verify(tmp_path / "soup", folders).ok
    learned = MEHLSoup(task="language-modeling", max_epochs=1, random_state=0)
    learned.fit(folders, X, Y.numpy())
    for name in POSITIONS:
        assert torch.equal(learned.module_.state_dict()[name].cpu(), states[0][name])


def test_modules_with_their_positions_join_folders(runs):
    folders = CheckpointCollection.from_path(runs)
    both = CheckpointCollection([runs / "run0", load(runs / "run1"), runs / "run2"])
    assert both.layout == folders.layout
    assert torch.equal(logits(fit(both).module_), logits(fit(folders).module_))
    wise = fit(folders).interpolate(load(runs / "run0"), 0.5)
    assert wise.recipe_.verify(wise.state_dict(), wise.checkpoints_).ok
    assert POSITIONS[0] in CheckpointCollection([load(runs / "run0")]).layout


@pytest.mark.filterwarnings("default:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_of_a_folder_without_positions(runs, tmp_path):
    peft = pytest.importorskip("peft")
    for k in range(2):
        model = peft.get_peft_model(load(runs / "run0"), peft.LoraConfig(target_modules=["fc1"]))
        model.save_pretrained(tmp_path / f"adapter{k}")
    soup = fit(CheckpointCollection.from_path(tmp_path))
    assert np.isfinite(soup.score(X, Y.numpy()))


class Silent(transformers.BertForSequenceClassification):
    """A model whose new head is loaded without a warning."""

    _keys_to_ignore_on_load_missing = ("classifier",)


def test_tensors_with_random_values_are_still_an_error():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    state = {n: v for n, v in Silent(config).state_dict().items() if "classifier" not in n}
    headless = CheckpointCollection([state, state], module=lambda: Silent(config))
    # the bias is 0 in each new model
    match = r"fit the checkpoints: it has 'classifier\.weight'\. Pass the architecture"
    with pytest.raises(CheckpointError, match=match):
        UniformSoup().fit(headless, np.ones((6, 4), dtype=np.int64), np.arange(6) % 2)


def test_parameters_without_values_are_not_computed(runs, monkeypatch):
    model = load(runs / "run0")
    assert computed.recomputed(model, POSITIONS, lambda: model) == {*POSITIONS}
    model._keys_to_ignore_on_load_missing = None
    assert computed.recomputed(model, POSITIONS, lambda: model) == {*POSITIONS}  # as not saved
    assert computed.recomputed(model.to("meta"), POSITIONS, lambda: model) == set()
    model = load(runs / "run0")
    monkeypatch.setattr(computed, "sharded_parts", lambda module: [module])
    assert computed.recomputed(model, POSITIONS, lambda: model) == set()
