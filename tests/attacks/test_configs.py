"""Hostile config.json: nothing is fetched or run, nothing hangs, and every error names the file."""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, UniformSoup, mix
from sksoup.checkpoints import hub, hub_config
from sksoup.checkpoints.computed import ignored_names
from sksoup.checkpoints.hub_companions import copy_companions, copy_tokenizer
from sksoup.checkpoints.hub_config import prepare_fields, read_config

transformers = pytest.importorskip("transformers")

BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 100, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37,
    "max_position_embeddings": 131072,
}  # fmt: skip
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
DETR = {
    "architectures": ["DetrForObjectDetection"], "model_type": "detr", "d_model": 16,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 4,
    "use_timm_backbone": False, "use_pretrained_backbone": True,
}  # fmt: skip
BACKBONE = {"backbone": "microsoft/resnet-18"}
UPERNET = {"architectures": ["UperNetForSemanticSegmentation"], "model_type": "upernet"}
DPT = {"architectures": ["DPTForDepthEstimation"], "model_type": "dpt"}
KERNEL = "kernels-community/evil"
CLIP = {
    "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 8,
    "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "intermediate_size": 16, "vocab_size": 50, "attn_implementation": KERNEL},
    "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "intermediate_size": 16, "image_size": 8, "patch_size": 4,
                      "_attn_implementation": KERNEL},
}  # fmt: skip


@pytest.fixture
def attempts(monkeypatch):
    """What asks for an address or a connection, which it does not get."""
    found = []

    def refuse(*args, **kwargs):
        found.append(args)
        raise OSError("no network here")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return found


def write(folder: Path, config, tensors=None) -> Path:
    """A folder with weights whose names begin with 'model.', so that opening it builds, too."""
    folder.mkdir(exist_ok=True)
    save_file(tensors or {"model.w": torch.ones(40, 40)}, folder / "model.safetensors")
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    return folder


def build(folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, on what is odd in a config
        return CheckpointCollection([folder]).build_module()


def refused(folder: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        build(folder)
    assert str(folder / "config.json") in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "config",
    [
        DETR | BACKBONE,
        DETR | BACKBONE | {"use_timm_backbone": True},
        DETR | {"backbone": "resnet50", "backbone_kwargs": {"a": 1}},
        UPERNET | BACKBONE,
        UPERNET | {"backbone": "resnet18"},
        DPT | BACKBONE | {"backbone_config": None},
        UPERNET | {"default_backbone": "microsoft/resnet-18"},
        CLIP | {"vision_config": BACKBONE},
        {"architectures": ["TimmWrapperModel"], "model_type": "timm_wrapper",
         "architecture": "hf-hub:evil/model"},
    ],
)  # fmt: skip
def test_a_backbone_that_would_be_fetched_is_refused(config, tmp_path, attempts):
    refused(write(tmp_path / "ft", config), r"refers to another model \('\w+': '.*build_model")
    assert attempts == []


def test_transformers_alone_asks_the_network(tmp_path, attempts):
    """So that the tests above can fail: the fake sees what transformers does by itself."""
    with suppress(Exception):
        transformers.AutoConfig.from_pretrained(write(tmp_path / "ft", DPT | BACKBONE))
    assert attempts


def test_the_switch_refuses_what_no_field_tells(tmp_path, attempts):
    config = DETR | {"backbone": "resnet50", "use_timm_backbone": True, "backbone_kwargs": {"a": 1}}
    error = refused(write(tmp_path / "ft", config), "OfflineModeIsEnabled")
    assert error.__cause__ is not None
    assert attempts == []


def test_the_switch_is_put_back(monkeypatch):
    from huggingface_hub import constants

    for before in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before)
        with suppress(KeyboardInterrupt), hub.offline():
            assert constants.HF_HUB_OFFLINE
            raise KeyboardInterrupt
        assert constants.HF_HUB_OFFLINE is before


def test_a_detector_with_all_its_weights_opens(tmp_path, attempts):
    config = transformers.DetrConfig(**DETR, backbone_config=RESNET | {"out_features": ["stage1"]})
    transformers.DetrForObjectDetection(config).save_pretrained(tmp_path / "ft")
    path = tmp_path / "ft" / "config.json"
    saved = json.loads(path.read_text()) | {"use_pretrained_backbone": True} | BACKBONE
    path.write_text(json.dumps(saved))
    module = build(tmp_path / "ft")
    assert type(module) is transformers.DetrForObjectDetection
    assert hub.read_config(path, {})["use_pretrained_backbone"] is False
    assert attempts == []


@pytest.mark.parametrize("name", [KERNEL, "evil/kernel:f", "flash_attention_2", 3, {"": KERNEL}])
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_kernels_are_not_fetched_but_left_out(field, name, tmp_path, attempts):
    module = build(write(tmp_path / "ft", BERT | {field: name}))
    assert module.config._attn_implementation == "sdpa"
    assert attempts == []


def test_kernels_are_left_out_of_all_parts(tmp_path, attempts):
    hidden = {"attribute_map": {"kernel": "_attn_implementation_internal"}, "kernel": KERNEL}
    for config in (CLIP, BERT | hidden, BERT | {"_attn_implementation_internal": KERNEL}):
        module = build(write(tmp_path / "ft", config))
        for part in (module.config, *module.modules()):
            used = getattr(getattr(part, "config", part), "_attn_implementation", None)
            assert used in (None, "sdpa")
    assert attempts == []


def test_built_in_attention_stays(tmp_path):
    module = build(write(tmp_path / "ft", BERT | {"attn_implementation": "eager"}))
    assert module.config._attn_implementation == "eager"


def test_options_of_timm_that_load_files_are_left_out(tmp_path):
    options = {"checkpoint_path": "/etc/passwd", "pretrained_cfg": {"url": "x"}, "depth": 3}
    path = write(tmp_path / "ft", BERT | {"model_args": options}) / "config.json"
    assert hub.read_config(path, {})["model_args"] == {"depth": 3}


@pytest.mark.parametrize(
    "config",
    [
        BERT | {"auto_map": {"AutoModel": "evil.Model"}},
        BERT | {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}},
        CLIP | {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
        BERT | {"x": [[{"auto_map": {"AutoConfig": "evil.Config"}}]]},
    ],
)
def test_code_at_any_depth_is_refused(config, tmp_path):
    refused(write(tmp_path / "ft", config), "refers to custom code")


def test_only_models_of_transformers_are_built(tmp_path, monkeypatch):
    class Foreign(transformers.BertModel):
        pass

    present = sys.modules["transformers"]  # it puts another module in its own place
    monkeypatch.setattr(present, "ForeignModel", Foreign, raising=False)
    monkeypatch.setattr(present, "nasty", lambda *_: pytest.fail("called"), raising=False)
    for names in (
        ["pipeline"], ["AutoModel"], ["BertConfig"], ["BertTokenizer"], ["models"], ["__name__"],
        ["ForeignModel"], ["nasty"], ["no.such"], [3], [None], 3, None, {}, "BertModel", [],
    ):  # fmt: skip
        refused(write(tmp_path / "ft", BERT | {"architectures": names}), "has the architecture")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**8},
        {"num_hidden_layers": 2_000_000},
        {"num_labels": 10**9},
        {"vocab_size": 10**12},
        {"vocab_size": 10**30},
        {"hidden_size": 10**9},
        {"intermediate_size": 10**11},
        {"max_position_embeddings": 10**13},
        {"type_vocab_size": 10**13},
    ],
)
def test_a_module_is_no_larger_than_its_weights(change, tmp_path):
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(
        write(tmp_path / "ft", BERT | change), "larger than its weights|is more than|can't be built"
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory  # kB
    assert grown < 200_000


def test_a_build_that_takes_too_long_is_not_tried_again(tmp_path, monkeypatch):
    tries = []

    @contextmanager
    def bounded_work(n_tensors, path):
        tries.append(path)
        raise CheckpointError(f"{path} takes too long")
        yield

    monkeypatch.setattr(hub, "bounded_work", bounded_work)
    for k in range(2):
        weights = {f"model.{name}": torch.ones(2) for name in "abc"[: 2 + k]}
        write(tmp_path / f"ft{k}", BERT, weights)
    with pytest.raises(CheckpointError):
        CheckpointCollection([tmp_path / "ft0", tmp_path / "ft1"])
    assert len(tries) == 1
    (tmp_path / "ft1" / "model.safetensors").unlink()
    write(tmp_path / "ft1", BERT, {"model.a": torch.ones(2), "model.b": torch.ones(2)})
    ckpts = CheckpointCollection([tmp_path / "ft0", tmp_path / "ft1"])
    for _ in range(3):
        with pytest.raises(CheckpointError, match="takes too long"):
            ckpts.build_module()
    assert len(tries) == 2
    write(tmp_path / "ft0", BERT | {"hidden_size": 16})  # it was corrected
    with pytest.raises(CheckpointError, match="takes too long"):
        ckpts.build_module()
    assert len(tries) == 3


def test_long_names_are_not_matched_with_patterns(tmp_path):
    """Those of Cohere's speech recognition take quadratic time in the length of a name."""
    sizes = {
        "vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 16, "head_dim": 8,
        "encoder_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "subsampling_conv_channels": 8, "num_mel_bins": 16,
        },
    }  # fmt: skip
    config = {"architectures": ["CohereAsrForConditionalGeneration"], "model_type": "cohere_asr"}
    names = ["model." * 8 + "encoder." * 113 + f"{k}.weight" for k in range(1000)]
    folder = write(tmp_path / "ft", config | sizes, {name: torch.ones(1) for name in names})
    began = time.process_time()
    CheckpointCollection([folder])
    assert time.process_time() - began < 8


def test_long_names_are_not_matched_with_those_that_are_ignored():
    config = {n: v for n, v in BERT.items() if n not in ("architectures", "model_type")}
    module = transformers.BertModel(transformers.BertConfig(**config))
    module._keys_to_ignore_on_load_unexpected = [r".*attention\.self\.position"]  # quadratic
    names = [f"{'a' * 900}{k}" for k in range(3000)]
    began = time.process_time()
    assert ignored_names(module, [*names, "x.attention.self.position"]) == {
        "x.attention.self.position"
    }
    assert time.process_time() - began < 2


@pytest.mark.parametrize("kind", ["[]", '{"a":}'])
def test_the_depth_of_a_config_is_bounded(kind, tmp_path):
    """Copies of deep values would end in a RecursionError, without the file."""
    start, end = kind[:-1], kind[-1]
    for depth in (48, 60, *range(480, 1000, 40)):
        text = json.dumps(BERT)[:-1] + ', "more": ' + start * depth + "1" + end * depth + "}"
        folder = write(tmp_path / "ft", text)
        if depth < 50:
            build(folder)
        else:
            refused(folder, "of depth|can't be read")


@pytest.mark.parametrize("value", [{}, [], [[]], {"model_type": "bert"}, 1], ids=str)
def test_the_values_of_a_config_are_bounded(value, tmp_path):
    text = json.dumps(BERT)[:-1] + ', "more": [' + json.dumps(value)
    many = 600_000 // (2 if value in ([[]], {"model_type": "bert"}) else 1)
    refused(write(tmp_path / "ft", text + f", {json.dumps(value)}" * many + "]}"), "it holds 60")
    labels = {"id2label": {str(k): f"label {k}" for k in range(21_000)}}
    labels["label2id"] = {name: int(k) for k, name in labels["id2label"].items()}
    build(write(tmp_path / "fine", BERT | labels))


def test_tables_that_a_module_does_not_register_are_bounded(tmp_path):
    trocr = {
        "architectures": ["TrOCRForCausalLM"], "model_type": "trocr", "vocab_size": 20,
        "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16,
        "use_learned_position_embeddings": False, "max_position_embeddings": 16,
    }  # fmt: skip
    build(write(tmp_path / "small", trocr))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(
        write(tmp_path / "ft", trocr | {"max_position_embeddings": 2 * 10**7}),
        "elements in results on the way",
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB


@pytest.mark.parametrize("field", ["__dict__", "__module__"])
def test_fields_that_python_uses_are_refused(field, tmp_path):
    refused(write(tmp_path / "ft", BERT | {field: "os"}), "which Python uses for itself")
    nested = CLIP | {"text_config": {field: {"a": 1}}}
    refused(write(tmp_path / "ft", nested), "which Python uses for itself")


@pytest.mark.parametrize("field", ["save_pretrained", "to_json_file", "push_to_hub", "update"])
def test_fields_do_not_replace_functions(field, tmp_path):
    labels = {"id2label": {"0": field, "1": "__background__"}}  # as torchvision's class 0
    labels["label2id"] = {field: 0, "__background__": 1}
    module = build(write(tmp_path / "ft", BERT | labels | {field: "os"}))
    assert callable(getattr(module.config, field))
    assert module.config.label2id == labels["label2id"]
    text = {n: v for n, v in CLIP["text_config"].items() if n != "attn_implementation"}
    module = build(write(tmp_path / "clip", CLIP | {"text_config": {**text, field: {"a": 1}}}))
    assert callable(getattr(module.config.text_config, field))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_config_does_not_make_transformers_copy_source_files(tmp_path):
    """Those of any module that is imported."""
    peft = pytest.importorskip("peft")
    sizes = {n: v for n, v in BERT.items() if n not in ("architectures", "model_type")}
    base = transformers.BertModel(transformers.BertConfig(**sizes))
    base.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_auto_class": "AutoConfig"}))
    for k in range(2):
        net = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
        settings = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        peft.get_peft_model(net, settings).save_pretrained(str(tmp_path / f"a{k}"))
    X = {"input_ids": np.random.default_rng(0).integers(3, 29, (8, 6))}
    adapters = CheckpointCollection([tmp_path / "a0", tmp_path / "a1"])
    UniformSoup().fit(adapters, X, np.array([0, 1] * 4)).save_pretrained(tmp_path / "out")
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert "_auto_class" not in (tmp_path / "out" / "config.json").read_text()


def test_backbones_are_built_without_weights_by_default():
    """In transformers 4, leaving out the field means pretrained ones."""

    class OldConfig:
        def __init__(self, backbone=None, use_pretrained_backbone=True):
            pass

    library = SimpleNamespace(
        CONFIG_MAPPING={"old": OldConfig}, PretrainedConfig=transformers.PretrainedConfig
    )
    config = {"model_type": "old", "backbone_config": {"model_type": "old"}, "id2label": {}}
    prepare_fields(config, library, Path("config.json"))
    assert config["use_pretrained_backbone"] is False
    assert config["backbone_config"]["use_pretrained_backbone"] is False
    assert config["id2label"] == {}


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_layers", "n_layer", "decoder_layers"])
def test_layers_that_share_weights_are_bounded(field, tmp_path):
    """ALBERT's module stays small, but a forward pass takes as long as there are layers."""
    albert = {
        "architectures": ["AlbertModel"], "model_type": "albert", "vocab_size": 20,
        "embedding_size": 4, "hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4,
        "num_hidden_layers": 2,
    }  # fmt: skip
    build(write(tmp_path / "small", albert | {"num_hidden_layers": 48}))
    build(write(tmp_path / "listed", albert | {"which_layers": [*range(100)]}))  # not how many
    refused(write(tmp_path / "ft", albert | {field: 20_000}), f"'{field}' is more than 1001")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [10**6] * 1000},
        {"text_config": {"num_labels": 10**10}},
        {"num_experts": -(10**10)},
    ],
)
def test_counts_are_bounded_before_lists_are_made_of_them(change, tmp_path):
    refused(write(tmp_path / "ft", BERT | change), "is more than 2097152")


def test_a_config_does_not_control_the_terminal(tmp_path, monkeypatch):
    """transformers would log fields that it can't set."""
    logged, library = [], logging.getLogger("transformers")
    handler = logging.StreamHandler()
    monkeypatch.setattr(handler, "emit", logged.append)
    monkeypatch.setattr(library, "handlers", [*library.handlers, handler])
    verbosity = transformers.utils.logging.get_verbosity()
    folder = write(tmp_path / "ft", BERT | {"sub_configs": "\x1b]0;evil\x07"})
    assert "\x1b" not in str(refused(folder, "can't be built"))
    assert logged == []
    assert transformers.utils.logging.get_verbosity() == verbosity


def test_large_numbers_that_make_no_parts_are_fine(tmp_path):
    harmless = {
        "rope_theta": 10**7, "model_max_length": 10**30, "seq_length": 10**9, "use_cache": True,
        "block_size": 1 << 20, "layer_norm_eps": 1e-5, "total_flos": 10**20,
        "problem_type": "evil",
    }  # fmt: skip
    build(write(tmp_path / "ft", LLAMA | {"max_position_embeddings": 10**7}))
    module = build(write(tmp_path / "ft", LLAMA | harmless))
    assert type(module) is transformers.LlamaForCausalLM
    assert next(module.parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    "text",
    [
        "[]", "3", '"text"', "null", "NaN", "{", "", "\udcff".encode("utf-8", "replace").decode(),
        "[" * 100_000, '{"a":' * 100_000, "1" * 5_000, '{"__float__": [1]}',
        '{"x": {"__float__": "evil"}}',
    ],
)  # fmt: skip
def test_what_is_no_config_is_named(text, tmp_path):
    refused(write(tmp_path / "ft", text), "can't be read|can't be used|has the architecture")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "evil"}, {"model_type": None}, {"model_type": ["bert"]},
        {"model_type": "resnet"}, {"hidden_size": -32}, {"hidden_size": "32"},
        {"hidden_size": float("nan")}, {"hidden_size": 1e300}, {"hidden_size": None},
        {"num_attention_heads": 3}, {"num_attention_heads": 0}, {"hidden_act": "evil"},
        {"num_hidden_layers": "2"}, {"num_hidden_layers": 1e8}, {"vocab_size": [1]},
        {"torch_dtype": "evil"}, {"id2label": [1, 2]},
        {"id2label": {"a": "b"}}, {"id2label": 3}, {"num_labels": "3"},
        {"quantization_config": {"quant_method": "gptq"}}, {"pad_token_id": 1000},
        {"hidden_dropout_prob": 7.0}, {"layer_norm_eps": "x"},
    ],
)  # fmt: skip
def test_what_can_not_be_built_is_named(change, tmp_path):
    error = refused(write(tmp_path / "ft", BERT | change), "build_model|can't be")
    if "can't be built by" in str(error):
        assert error.__cause__ is not None


@pytest.mark.parametrize("at", [(), ("text_config",), ("vision", 0)])
def test_quantized_weights_are_not_even_averaged(at, tmp_path):
    """Their numbers and scales were: the result is none of a model."""
    config = {"quantization_config": {"quant_method": "fp8"}}
    for place in reversed(at):
        config = [config] if place == 0 else {place: config}
    folders = [write(tmp_path / name, BERT | config, {"w": torch.ones(2)}) for name in "ab"]
    for opened in (folders, [folder / "model.safetensors" for folder in folders]):
        with pytest.raises(CheckpointError, match=r"a/config\.json' can't be used: .*dequantize"):
            mix(opened, [0.5, 0.5])


def test_the_config_of_many_files_is_read_once_to_open_them(tmp_path, monkeypatch):
    read, texts = hub_config.read_text, []
    for module in ("hub_config", "texts"):  # the latter for read_json
        path = f"sksoup.checkpoints.{module}.read_text"
        monkeypatch.setattr(path, lambda *a: texts.append(1) or read(*a))
    write(tmp_path, BERT)
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for path in paths:
        save_file({"w": torch.ones(2)}, path)
    CheckpointCollection(paths)
    assert len(texts) == 2  # and once to build the module, for its names


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "7", " " * (9 << 20), "pipe"],
                         ids=lambda text: text[:5])  # fmt: skip
def test_a_config_that_can_not_be_read_stops_no_average(text, tmp_path):
    for name in "ab":
        folder = write(tmp_path / name, text, {"w": torch.ones(2)})
        if text == "pipe":
            (folder / "config.json").unlink()
            os.mkfifo(folder / "config.json")
    paths = [tmp_path / name / "model.safetensors" for name in "ab"]
    assert mix(paths, [0.5, 0.5])["w"].tolist() == [1, 1]


def test_layer_types_of_a_wrong_number_are_named(tmp_path):
    config = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    change = {"layer_types": ["full_attention"] * 5}
    refused(write(tmp_path / "ft", config | change), "can't be built by transformers")


def test_an_interruption_passes_through(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.BertModel, "__init__", interrupt)
    folder = write(tmp_path / "ft", BERT, {"w": torch.ones(40)})
    with pytest.raises(KeyboardInterrupt):
        CheckpointCollection([folder]).build_module()


def test_what_is_not_a_regular_file_is_not_read(tmp_path):
    path = write(tmp_path / "ft", BERT) / "config.json"
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    refused(tmp_path / "ft", "larger than 8,388,608 bytes")
    for name in ("pipe", "device"):
        path = write(tmp_path / name, BERT) / "config.json"
        path.unlink()
        os.mkfifo(path) if name == "pipe" else path.symlink_to("/dev/zero")
    program = (
        "import sys; from sksoup import CheckpointCollection\n"
        "for path in sys.argv[1:]:\n"
        "    try: CheckpointCollection([path]).build_module()\n"
        "    except ValueError as error: print(type(error).__name__)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "pipe", tmp_path / "device"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert out.stdout == "CheckpointError\n" * 2


@pytest.fixture
def cached(tmp_path):
    """A model as the cache of the hub has it: links in snapshots to files in blobs."""
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (blobs / f"sha-{name}").write_text(json.dumps({"of": name}))
        (folder / name).symlink_to(f"../../blobs/sha-{name}")
    return folder


def test_companions_in_the_cache_of_the_hub_are_copied(cached, tmp_path):
    (cached / "vocab.txt").write_text("a")
    (cached / "merges.txt").symlink_to("vocab.txt")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(cached)
    copy_companions(tmp_path / "link", tmp_path / "out")
    copied = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert copied == {
        "config.json": '{"of": "config.json"}', "tokenizer.json": '{"of": "tokenizer.json"}',
        "vocab.txt": "a", "merges.txt": "a",
    }  # fmt: skip
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_companions_that_are_elsewhere_are_not_published(cached, tmp_path):
    (tmp_path / "out").mkdir()
    plain = tmp_path / "plain"
    plain.mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_text("x")
    for folder, target in ((cached, "/etc/passwd"), (plain, "../blobs/secret")):
        (folder / "vocab.txt").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"vocab\.txt' can't be copied: it is a link to"):
            copy_companions(folder, tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []  # nothing half-written


def test_companions_that_are_no_files_are_left_out(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    os.mkfifo(source / "tokenizer.json")
    (source / "vocab.txt").symlink_to("/dev/zero")
    copy_companions(source, out)
    assert list(out.iterdir()) == []


def test_a_label_that_is_no_text_is_refused_before_the_fit(tmp_path):
    config = BERT | {"id2label": {"0": "a\ud800", "1": "b"}}
    refused(write(tmp_path / "ft", config), "unpaired surrogate")


HIERA = {"architectures": ["HieraForPreTraining"], "model_type": "hiera"}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"query_stride": [1, 10**30]}, "'query_stride' is more than 2097152,"),
        ({"embed_dim_multiplier": 10**39}, "and the largest 130, expected at most"),
        ({"query_stride": [1] * 101}, "'query_stride' is more than 100,"),
        ({"depths": [0] * 1010}, "'depths' is more than 1001,"),
        ({"downsampling_ratios": [10**9]}, "'downsampling_ratios' is more than 2097152,"),
        ({"masked_unit_size": [10**38] * 40_000}, "its integers have 5,080,"),
        ({"image_size": [32, 4097]}, "'image_size' is more than 4096 pixels"),
        ({"anchor_image_size": [10**5, 8]}, "'anchor_image_size' is more than 4096 pixels"),
    ],
)
def test_products_and_powers_of_integers_are_bounded(tmp_path, fields, match):
    """One call of Python for hours, which nothing can stop."""
    refused(write(tmp_path / "ft", HIERA | fields), match)


def test_fnet_builds_no_matrix_of_scipy(tmp_path):
    linalg = pytest.importorskip("scipy.linalg")
    config = transformers.FNetConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=8,
        tpu_short_seq_length=10**5,
    )  # fmt: skip
    for k in range(2):
        folder = tmp_path / f"run{k}"
        transformers.FNetForSequenceClassification(config).save_pretrained(folder)
        described = json.loads((folder / "config.json").read_text())
        described["use_tpu_fourier_optimizations"] = True
        (folder / "config.json").write_text(json.dumps(described))
    with patch.object(linalg, "dft", side_effect=MemoryError):
        collection = CheckpointCollection([*tmp_path.iterdir()])
    assert collection.module().fnet.embeddings.word_embeddings.weight.shape == (9, 8)


def test_modules_in_modules_are_not_very_deep(tmp_path):
    """Copying them takes calls in each other, of which Python has some thousand."""
    source, out = tmp_path / "source", tmp_path / "out"
    (source / ("a/" * 60)).mkdir(parents=True)
    out.mkdir()
    for folder, listing in ((source, "modules.json"), (source / "a", "router_config.json")):
        names = ["a", "a/" * 49] if folder == source else ["a/" * 48, "a/" * 50]
        listed = {"types": dict.fromkeys(names, "x")} if folder != source else None
        (folder / listing).write_text(json.dumps(listed or [{"path": name} for name in names]))
    with pytest.raises(CheckpointError, match=r"source' can't be used: .* 50 folders deep"):
        copy_companions(source, out)
    assert list(out.iterdir()) == []


def test_weights_are_not_copied_as_a_vocabulary(tmp_path):
    """vLLM would load them with those of the soup."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("vocab.safetensors", "vocab.bin", "vocab.json", "vocab-src.json", "vocab.txt"):
        (source / name).touch()
    copy_tokenizer(source, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "vocab-src.json", "vocab.json", "vocab.txt",
    ]  # fmt: skip


def test_hidden_files_are_not_copied(tmp_path):
    """A .git holds secrets of who cloned the folder, and commands that git runs."""
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "1_Dense" / ".git").mkdir(parents=True)
    out.mkdir()
    for name in (".secrets.json", "config.json", "1_Dense/.env", "1_Dense/.git/config"):
        (source / name).write_text("{}")
    (source / "modules.json").write_text('[{"path": ""}, {"path": "1_Dense"}]')
    for folder in (source, source / "1_Dense"):  # of other weights
        (folder / "model.safetensors.index.json").write_text("{}")
        (folder / "pytorch_model.bin.index.fp16.json").write_text("{}")
    copy_companions(source, out)
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    assert found == ["1_Dense", "config.json", "modules.json"]


def test_only_files_that_modules_have_are_copied(tmp_path):
    """Python would run a package of a soup's folder, and a listed folder may hold data."""
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "torch").mkdir(parents=True)
    out.mkdir()
    for name in ("__init__.py", "data.csv", "m.onnx", "config.json", "vocab.txt"):
        (source / "torch" / name).write_text("{}")
    save_file({"w": torch.ones(2)}, source / "torch" / "model.safetensors")
    (source / "modules.json").write_text('[{"path": ""}, {"path": "torch"}]')
    copy_companions(source, out)
    found = sorted(path.name for path in (out / "torch").iterdir())
    assert found == ["config.json", "model.safetensors", "vocab.txt"]


def test_files_of_git_annex_are_copied(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    objects = source / ".git" / "annex" / "objects"
    objects.mkdir(parents=True)
    out.mkdir()
    (objects / "SHA256E-1.json").write_text("{}")
    (source / "config.json").symlink_to(".git/annex/objects/SHA256E-1.json")
    copy_companions(source, out)
    assert (out / "config.json").read_text() == "{}"
    assert not (out / "config.json").is_symlink()


@pytest.mark.parametrize("link", ["notes.json", "1_Pooling"])
def test_a_link_to_what_is_hidden_is_not_copied(tmp_path, link):
    """git clones such links, too."""
    source = tmp_path / "source"
    (source / ".git").mkdir(parents=True)
    (source / ".git" / "config.json").write_text("token")
    (source / link).symlink_to(".git" if link == "1_Pooling" else ".git/config.json")
    (source / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="outside its folder or hidden"):
        copy_companions(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", [".git", "1_Dense/.git", "./.git", ".hidden/1_Dense"])
@pytest.mark.parametrize("listing", ["modules.json", "router_config.json", "config.json"])
def test_a_hidden_folder_is_no_module(tmp_path, name, listing):
    source = tmp_path / "source"
    (source / name).mkdir(parents=True)
    (tmp_path / "out").mkdir()
    listed = [{"path": name}] if listing == "modules.json" else {"types": {name: "x"}}
    (source / listing).write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="next to it that is not hidden"):
        copy_companions(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_sparse_file_does_not_fill_the_disk(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    write(source, BERT)
    out.mkdir()
    (source / "notes.txt").write_text("small")
    with (source / "vocab.json").open("wb") as file:
        file.truncate(2 << 30)
    for copy in (copy_companions, copy_tokenizer):
        with pytest.raises(
            CheckpointError, match=r"more than 1 GiB \('vocab.json' has 2,147,483,6"
        ):
            copy(source, out)
    assert list(out.iterdir()) == []


GPT_NEO = {"architectures": ["GPTNeoModel"], "model_type": "gpt_neo", "num_layers": 2}


def test_counts_in_lists_of_lists_are_bounded(tmp_path):
    config = GPT_NEO | {"attention_types": [[["global"], 10**9]]}
    refused(write(tmp_path / "ft", config), "'attention_types' is more than")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt_neo", {"attention_types": [[["global"] * 200_000, 2_600]]}),
        ("lfm2", {"full_attn_idxs": [7] * 200_000, "num_hidden_layers": 900}),
    ],
)
def test_lists_that_are_walked_many_times_are_bounded(tmp_path, kind, fields):
    names = {"gpt_neo": "GPTNeoForCausalLM", "lfm2": "Lfm2ForCausalLM"}
    config = {"model_type": kind, "architectures": [names[kind]], **fields}
    refused(write(tmp_path / "ft", config), "a list of 200")


def test_many_labels_in_a_list_beside_many_layers_are_no_attack(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BERT | {"labels": ["x"] * 20_000, "num_hidden_layers": 200}))
    assert read_config(path, {})["num_hidden_layers"] == 200


def test_other_weights_than_those_that_are_opened_are_refused(tmp_path):
    config = BERT | {"transformers_weights": "other.safetensors"}
    refused(write(tmp_path / "ft", config), "refers to other weights")


@pytest.mark.parametrize("name", ["model.layer.\u00b2", "model.layer." + "9" * 900])
def test_names_with_odd_numbers_are_opened(tmp_path, name):
    folder = write(tmp_path / "ft", BERT, {name: torch.ones(3)})
    assert len(CheckpointCollection([folder]).layout) == 1
