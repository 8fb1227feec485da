"""Hugging Face folders of equal shapes whose config.json describe different networks."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sksoup import CheckpointCollection, CheckpointError, SoupWarning
from sksoup.checkpoints import hub_agreement

CONFIG = {
    "architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_act": "gelu",
    "num_attention_heads": 2, "encoder_attention_heads": [1, 2], "layer_norm_eps": 1e-12,
    "max_position_embeddings": 16,
    "id2label": {"0": "negative", "1": "positive", "2": "neutral"},
    "text_config": {"num_attention_heads": 2, "hidden_dropout_prob": 0.1},
}  # fmt: skip


def folders(root: Path, *changes: dict) -> list[Path]:
    found = []
    for k, change in enumerate([{}, *changes]):
        found.append(root / f"ft{k}")
        found[-1].mkdir(parents=True)
        save_file({"weight": torch.full((3, 2), float(k))}, found[-1] / "model.safetensors")
        config = {name: v for name, v in {**CONFIG, **change}.items() if v is not ...}
        (found[-1] / "config.json").write_text(json.dumps(config))
    return found


def test_deeply_nested_configs_take_no_more_memory_than_their_text():
    config: dict = {f"act_{k}": k for k in range(20_000)}
    for k in range(800):
        config = {f"deep{k}": config}
    text = json.dumps(config)
    other = json.loads(text.replace(": 7,", ": 8,"))
    known = hub_agreement._Known()
    tracemalloc.start()
    assert not list(hub_agreement._differences(Path("a"), config, known))
    found = list(hub_agreement._differences(Path("b"), other, known))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(("deep1", "deep0", "act_7"), 8, 7, Path("a"))]
    assert peak < 10 * len(text)


def test_labels_in_another_order_are_refused(tmp_path):
    labels = {"0": "positive", "1": "negative", "2": "neutral"}
    paths = folders(tmp_path, {}, {"id2label": labels})
    wrong = r"ft2/config.json' has the labels of .*ft0/config.json' in another order.*0 is "
    with pytest.raises(CheckpointError, match=wrong + '"positive", expected "negative"'):
        CheckpointCollection.from_path(tmp_path)
    with pytest.raises(CheckpointError, match="in another order"):
        CheckpointCollection(paths, module=lambda: torch.nn.Linear(2, 3, bias=False))
    with pytest.raises(CheckpointError, match="in another order"):
        CheckpointCollection(paths[:2]).add("start", paths[2])


@pytest.mark.parametrize("first", [..., {"0": "LABEL_0", "1": "LABEL_1"}, {"0": "a", "1": "b"}])
def test_labels_of_all_configs_are_compared(tmp_path, first):
    """Also if those of the first one are the default, or others."""
    labels = {"0": "positive", "1": "negative", "2": "neutral"}
    paths = folders(tmp_path, {"id2label": first}, {}, {"id2label": labels})
    with pytest.raises(CheckpointError, match=r"ft3/config.json' has the labels of .*ft2/config"):
        CheckpointCollection(paths[1:])


def test_fields_that_the_first_config_lacks_are_compared(tmp_path):
    heads = {"num_attention_heads": 4}
    paths = folders(tmp_path, dict.fromkeys(CONFIG, ...) | {"model_type": "bert"}, {}, heads)
    with pytest.raises(CheckpointError, match=r"ft3/config.json' describes another .*ft2/config"):
        CheckpointCollection(paths[1:])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads"),
        ({"text_config": {"num_attention_heads": 1}}, "text_config.num_attention_heads"),
        ({"encoder_attention_heads": [2, 1]}, "encoder_attention_heads"),
    ],
)
def test_another_network_is_refused(tmp_path, change, name):
    folders(tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"describes another network.*\"{name}\" is .*expec"):
        CheckpointCollection.from_path(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": ..., "layer_norm_eps": ..., "num_heads": 5, "id2label": ...},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, "dtype": "float32"},
        {"_name_or_path": "other", "transformers_version": "3.0", "use_cache": False},
        {"text_config": {"num_attention_heads": 2, "hidden_dropout_prob": 0.5}},
        {"text_config": {}, "label2id": {"negative": 2}, "problem_type": "regression"},
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": None, "pad_token_id": 3},
        {"activation_dropout": 0.1, "pooler_dropout": 0.1},
    ],
)
def test_fields_that_say_nothing_about_the_outputs_may_differ(tmp_path, change):
    dropout = {"activation_dropout": 0.0, "pooler_dropout": 0.0}
    folders(tmp_path, {"_name_or_path": "one", "transformers_version": "2.0"} | dropout, change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(CheckpointCollection.from_path(tmp_path)) == 3


def test_other_differences_are_a_warning_that_lists_them(tmp_path):
    labels = {"0": "NEG", "1": "positive", "2": "neutral"}
    folders(tmp_path, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}, {"id2label": labels})
    with pytest.warns(SoupWarning, match="differ") as caught:
        CheckpointCollection.from_path(tmp_path)
    for found in ('"hidden_act" is "relu" in', '"layer_norm_eps" is 1e-05 in', 'output 0 is "NEG"'):
        assert found in str(caught[0].message)
    assert caught[0].filename.endswith("collection.py")  # from_path


def test_configs_of_the_user_are_not_compared(tmp_path):
    """Hyperparameters that a training script wrote beside its weights."""
    own = {"model_type": ..., "architectures": ..., "id2label": ...}
    folders(tmp_path, *[{**own, "num_heads": k, "activation": f"f{k}"} for k in range(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(CheckpointCollection.from_path(tmp_path)) == 4


@pytest.mark.parametrize("name", ["Qwen2Config", "DebertaV2Config", "T5Config", "GemmaConfig"])
def test_an_old_config_beside_the_one_that_transformers_writes(tmp_path, name):
    """What the authors of the models published, and what transformers saves of it."""
    transformers = pytest.importorskip("transformers")
    published = {
        "use_sliding_window": False, "sliding_window": 32768, "pos_att_type": "p2c|c2p",
        "tie_word_embeddings": False, "hidden_act": "gelu",
    }  # fmt: skip
    config = getattr(transformers, name)(**published)
    paths = folders(tmp_path, {})
    old = {**config.to_dict(), **published}
    for path, saved in zip(paths, (old, config.to_dict()), strict=True):
        (path / "config.json").write_text(json.dumps(saved))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(CheckpointCollection(paths)) == 2


@pytest.mark.parametrize("is_valid", [True, False])
def test_equal_texts_are_read_but_parsed_once(tmp_path, monkeypatch, is_valid):
    paths = folders(tmp_path, *[{}] * 9)
    for path in () if is_valid else paths:
        (path / "config.json").write_text("[{")
    parsed = []
    monkeypatch.setattr(
        hub_agreement,
        "_parsed",
        lambda text, parse=hub_agreement._parsed: parsed.append(text) or parse(text),
    )
    CheckpointCollection(paths)
    assert len(parsed) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"id2label": [1], "a": {"b": []}}']
)
def test_configs_that_are_none_are_left_to_their_readers(tmp_path, text):
    paths = folders(tmp_path, {})
    (paths[1] / "config.json").write_text(text)
    assert len(CheckpointCollection(paths)) == 2


@pytest.mark.parametrize("depth", [600, 900, 980, 990])
def test_deeply_nested_configs_are_compared_as_far_as_they_can_be_read(tmp_path, depth):
    paths = folders(tmp_path, {})
    for k, inner in enumerate("12"):
        text = json.dumps({**CONFIG, "a": None}).replace("null", "[" * depth + inner + "]" * depth)
        (paths[k] / "config.json").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(CheckpointCollection(paths)) == 2
