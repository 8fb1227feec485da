"""Adapters that PEFT and sksoup would read in different ways, or that take without end."""

from __future__ import annotations

import copy
import json
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, SoupWarning, UniformSoup
from sksoup.checkpoints import peft_targets
from sksoup.checkpoints.base_model import BaseModel, find_base_folder
from sksoup.checkpoints.on_base import _n_labels
from sksoup.checkpoints.peft_targets import Targets
from sksoup.checkpoints.protocol import TensorInfo
from sksoup.engine import factors
from sksoup.engine.factors import Stack
from sksoup.mixing.adapter import _targets

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
check_target_module_exists = pytest.importorskip(
    "peft.tuners.tuners_utils"
).check_target_module_exists

# of transformers and peft, about their own
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]
P = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.emb = nn.Embedding(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(self.b(self.a(x)))


def build() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def save(folder: Path, base: nn.Module | None = None, **fields: Any) -> Path:
    """An adapter that has been moved away from its base."""
    fields = {"r": 2, "target_modules": ["a", "b"], **fields}
    model = peft.get_peft_model(build() if base is None else base, peft.LoraConfig(**fields))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


def configured(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    return folder


def rewritten(folder: Path, change: Any) -> Path:
    state = load_file(folder / WEIGHTS)
    save_file(change(state), folder / WEIGHTS, {"format": "pt"})
    return folder


def refused(match: str, folder: Path, **params: Any) -> None:
    with pytest.raises(CheckpointError, match=match):
        CheckpointCollection([folder], **({"module": build} | params))


def as_peft_reads(folder: Path) -> dict[str, torch.Tensor]:
    return peft.PeftModel.from_pretrained(build(), str(folder)).merge_and_unload().state_dict()


# ------------------------------------------------------------------ what PEFT would not read


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["a"]},
        {"target_modules": "a"},
        {"target_modules": []},
        {"target_modules": None},
        {"exclude_modules": ["b"]},
        {"exclude_modules": "[b]"},
        {"modules_to_save": ["b"]},
        {"target_modules": ["a", "x.b"]},
    ],
    ids=str,
)
def test_factors_of_modules_that_are_not_selected(tmp_path, fields):
    folder = save(tmp_path / "run")
    CheckpointCollection([folder], module=build)
    refused(
        r"PEFT would not read '.*lora_A.weight': according to adapter_config",
        configured(folder, **fields),
    )


def test_factors_of_layers_that_are_left_out(tmp_path):
    def base():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.ModuleDict({"h": nn.ModuleList([Net(), Net()])})

    folder = save(tmp_path / "run", base())
    configured(folder, layers_to_transform=[0, 1], layers_pattern="h")
    CheckpointCollection([folder], module=base)
    for fields in ({"layers_to_transform": [0]}, {"layers_to_transform": 1},
                   {"layers_to_transform": [0, 1], "layers_pattern": ["layers"]}):  # fmt: skip
        refused("PEFT would not read", configured(folder, **{"layers_pattern": "h"} | fields),
                module=base)  # fmt: skip


def test_all_that_is_linear_is_what_peft_takes_for_it(tmp_path):
    folder = configured(save(tmp_path / "run"), target_modules="all-linear")
    ours, theirs = CheckpointCollection([folder], module=build)["run"], as_peft_reads(folder)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    folder = configured(
        save(tmp_path / "other", target_modules=["emb"]), target_modules="all-linear"
    )
    refused("PEFT would not read", folder)


def test_the_last_layer_is_not_of_all_that_is_linear(tmp_path):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    base = transformers.BertForSequenceClassification(config)
    folder = save(tmp_path / "run", copy.deepcopy(base), target_modules=["query", "classifier"])
    CheckpointCollection([folder], module=base)
    configured(folder, target_modules="all-linear", task_type="SEQ_CLS")
    refused("'classifier' has no factors", folder, module=base)


def embedding_pair(state):
    a, b = f"{P}a.lora_embedding_A", f"{P}a.lora_embedding_B"
    return {**state, a: torch.ones(2, 8), b: torch.ones(8, 2)}


def only_embedding_pair(state):
    return {n: v for n, v in embedding_pair(state).items() if not n.startswith(f"{P}a.lora_A") and
            not n.startswith(f"{P}a.lora_B")}  # fmt: skip


def wrapped_pair(state):
    a, b = f"{P}a.base_layer.lora_A.weight", f"{P}a.base_layer.lora_B.weight"
    return {**state, a: torch.ones(2, 8), b: torch.ones(8, 2)}


def only_wrapped_pair(state):
    return {n.replace(".a.lora", ".a.base_layer.lora"): v for n, v in state.items()}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (embedding_pair, "holds two pairs of factors of 'a'"),
        (wrapped_pair, "holds two pairs of factors of 'a'"),
        (only_embedding_pair, "is not a factor that PEFT uses for 'a', which is not an embedding"),
        (only_wrapped_pair, r"PEFT would not read '.*a\.base_layer\.lora_A"),
        (lambda s: {**s, f"{P}b.bias": torch.ones(8)}, r"PEFT would not read '.*model\.b\.bias'"),
        (lambda s: {**s, f"{P}a.weight": torch.ones(8, 8)}, r"not read '.*a\.weight'"),
        (
            lambda s: (
                {n: v for n, v in s.items() if ".a." not in n} | {f"{P}a.bias": torch.ones(8)}
            ),
            r"PEFT would not read '.*model\.a\.bias'",
        ),
        (
            lambda s: {**s, f"{P}classifier.base_layer.bias": torch.ones(3)},
            "'classifier' has no factors",
        ),
        (
            lambda s: {**s, f"{P}classifier.weight": torch.ones(3, 8, dtype=torch.int32)},
            r"'classifier.weight' has dtype torch.int32, expected torch.float32",
        ),
    ],
)
def test_tensors_that_peft_reads_otherwise(tmp_path, change, match):
    refused(match, rewritten(save(tmp_path / "run"), change))


def test_a_linear_pair_of_an_embedding_is_refused(tmp_path):
    def linear(state):
        return {n.replace("embedding_A", "A.weight").replace("embedding_B", "B.weight"): v
                for n, v in state.items()}  # fmt: skip

    refused("a factor that PEFT uses for 'emb', which is an embedding",
            rewritten(save(tmp_path / "run", target_modules=["emb"]), linear))  # fmt: skip


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("saved", [None, ["classifier"]])
def test_what_peft_writes_is_what_it_reads(tmp_path, bias, saved):
    folder = save(tmp_path / "run", bias=bias, modules_to_save=saved, target_modules=["a", "emb"])
    ours, theirs = CheckpointCollection([folder], module=build)["run"], as_peft_reads(folder)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


NAMES = st.lists(
    st.sampled_from(["lin", "in", "x", "h", "layers", "0", "1", "11"]), min_size=1, max_size=5
).map(".".join)
LISTS = st.lists(NAMES, max_size=3)
PATTERNS = st.sampled_from(
    ["lin", r".*\.lin", r"x\.(0|1)\..*", "lin|x", "^(lin|x\\.0)$", r"h\.0\.lin", r"(.*\.)?in"]
)


@given(
    module=NAMES, targets=LISTS | PATTERNS, excluded=st.none() | LISTS | PATTERNS,
    saved=st.none() | LISTS, layers=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2)),
    pattern=st.none() | st.sampled_from(["h", "layers", ""]) | st.just(["x", "h"]),
)  # fmt: skip
def test_modules_are_selected_by_the_rule_of_peft(
    module, targets, excluded, saved, layers, pattern
):
    fields = {
        "target_modules": targets, "exclude_modules": excluded, "modules_to_save": saved,
        "layers_to_transform": layers, "layers_pattern": pattern,
    }  # fmt: skip
    rule = Targets("'x'", fields)
    rule.check()
    found = check_target_module_exists(SimpleNamespace(**fields, target_parameters=None), module)
    assert rule.selects(module, is_linear=True, is_output=False) == bool(found)


def test_usual_expressions_are_matched_for_every_layer_of_a_language_model(tmp_path):
    parts = {
        "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "mlp": ["gate_proj", "up_proj", "down_proj"],
    }
    layers = nn.ModuleList(
        nn.ModuleDict({
            part: nn.ModuleDict({name: nn.Linear(1, 1) for name in names})
            for part, names in parts.items()
        })
        for _ in range(60)
    )  # fmt: skip
    base = nn.ModuleDict({"model": nn.ModuleDict({"language_model": layers})})
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    for k, pattern in enumerate((
        rf".*\.({names})", rf".*language_model.*\.({names})", r".*(attn|mlp).*(q|k|gate|up)_proj",
        rf"^(?!.*vision).*\.({names})$", r"model\.language.*attn.*(q|v)_proj",
        r".*language_model.*attn.*_proj",
    )):  # fmt: skip
        folder = save(tmp_path / str(k), copy.deepcopy(base), r=1, target_modules=pattern)
        configured(folder, target_modules=pattern)
        CheckpointCollection([folder], module=base)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_long_text_is_looked_at_once(tmp_path, monkeypatch, field):
    """Not for each module of the base."""
    looked, original = [], peft_targets._listed
    monkeypatch.setattr(peft_targets, "_listed", lambda text: looked.append(text) or original(text))
    folder = save(tmp_path / "run")
    given = {field: "a" * 100_000 + "."}
    configured(folder, **given)
    CheckpointCollection([folder], module=build())
    assert looked.count(given[field]) == 1


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"target_modules": {"a": 1}}, "'target_modules' is .*, expected a list of names"),
        ({"target_modules": ["a", 5]}, "'target_modules' is .*, expected a list of names"),
        ({"target_modules": "(a"}, "is not a valid pattern"),
        ({"modules_to_save": ["(x+)+y"]}, r"'modules_to_save' holds '\(x\+\)\+y', expected names"),
        ({"modules_to_save": "head"}, "'modules_to_save' is 'head', expected a list"),
        ({"layers_pattern": ["(x+)+y"], "layers_to_transform": [1]}, "'layers_pattern' holds"),
        ({"layers_pattern": ["x"] * 101}, "'layers_pattern' holds more than 100 names"),
        ({"layers_to_transform": ["1"]}, r"'layers_to_transform' is \['1'\], expected integers"),
        ({"layers_to_transform": [2**61 - 1]}, "expected integers up to 1,048,576"),  # hash: 0
    ],
    ids=str,
)
def test_selections_that_are_not_understood(tmp_path, fields, match):
    refused(match, configured(save(tmp_path / "run"), **fields))


def test_a_soup_whose_names_end_alike_is_read_again(tmp_path):
    """Its configuration lists the names as one long expression."""

    def base():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inner = nn.ModuleDict({f"part{k}": nn.Linear(4, 4) for k in range(80)})
            return nn.ModuleDict({**{n: copy.deepcopy(m) for n, m in inner.items()}, "x": inner})

    class Sum(nn.ModuleDict):
        def forward(self, x):
            return self["part0"](x)

    build_sum = lambda: Sum(base())  # noqa: E731
    names = [f"part{k}" for k in range(80)]
    runs = [save(tmp_path / f"run{k}", build_sum(), target_modules="|".join(names))
            for k in range(2)]  # fmt: skip
    X, y = np.zeros((8, 4), np.float32), np.arange(8) % 4
    soup = UniformSoup().fit(CheckpointCollection(runs, module=build_sum), X, y)
    soup.save_adapter(tmp_path / "soup")
    targets = json.loads((tmp_path / "soup" / CONFIG).read_text())["target_modules"]
    assert len(targets) > 500
    again = CheckpointCollection([tmp_path / "soup"], module=build_sum)["soup"]
    state = soup.state_dict()
    assert all(torch.allclose(again[name], state[name], atol=1e-6) for name in state)


# ------------------------------------------------------------------ several bases


@pytest.fixture
def two_bases(tmp_path) -> Path:
    """Adapters of two folders of models, in one folder."""
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    for k in range(2):
        torch.manual_seed(k)
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / f"base{k}")
        base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / f"base{k}")
        save(tmp_path / "sweep" / f"a{k}", base, target_modules=["query"], task_type="SEQ_CLS")
    return tmp_path


def test_adapters_of_two_bases_are_refused(two_bases):
    with pytest.raises(
        CheckpointError, match=r"a1' can't join .*a0': it is an adapter of .*base1'"
    ):
        CheckpointCollection.from_path(two_bases / "sweep")
    a0, a1 = (two_bases / "sweep" / f"a{k}" for k in range(2))
    configured(a1, base_model_name_or_path="no/where")
    with pytest.raises(CheckpointError, match=r"a1' is an adapter of 'no/where', which is not on"):
        CheckpointCollection([a0, a1])
    (two_bases / "link").symlink_to(two_bases / "base0")
    configured(a1, base_model_name_or_path=str(two_bases / "link"))
    assert len(CheckpointCollection([a0, a1])) == 2


def test_a_base_that_is_given_is_taken_and_other_names_are_told(two_bases):
    paths = [two_bases / "sweep" / f"a{k}" for k in range(2)]
    base = transformers.BertForSequenceClassification.from_pretrained(two_bases / "base0")
    for module in (two_bases / "base0", base):
        with pytest.warns(SoupWarning, match=r"name several bases \(.*base0', .*base1'\) and are"):
            assert len(CheckpointCollection(paths, module=module)) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error", SoupWarning)
            CheckpointCollection(paths[:1], module=module)
    model = peft.PeftModel.from_pretrained(base, str(paths[0]))
    with pytest.warns(SoupWarning, match="name several bases"):
        CheckpointCollection([model, paths[1]])


# ------------------------------------------------------------------ without end


SLOW = pytest.mark.parametrize(
    "pattern",
    [
        "(?i:[" + "".join(f"{chr(256 + k)}-{chr(0xF000)}" for k in range(60)) + "])",
        "[" + "".join(f"{chr(256 + k)}-{chr(0xF000)}" for k in range(60)) + "]",
        r"[\u0100-\uf000]" * 20,
        r"[\x00-\xff]",
        ".a" * 251,
        r"(.*)\1z",
        "(?i:lin)",
        "(a)?(?(1)b|c)",
        "(?P<x>a)",
        "(?#x)a",
        ".?" * 19 + "X",
    ],
    ids=lambda pattern: pattern[:12],
)


@SLOW
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_take_long_to_compile_or_to_match(tmp_path, pattern, field):
    begin = time.perf_counter()
    folder = configured(save(tmp_path / "run"), **{field: {pattern: 2}})
    refused("may take too long to match", folder)
    assert time.perf_counter() - begin < 10


@SLOW
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_targets_that_take_long_to_match_are_left_to_peft(tmp_path, pattern, field):
    """Training libraries write long expressions; factors are taken as they are."""
    begin = time.perf_counter()
    CheckpointCollection([configured(save(tmp_path / "run"), **{field: pattern})], module=build)
    assert time.perf_counter() - begin < 10


def test_patterns_are_bounded_by_the_modules_that_they_are_matched_with(tmp_path):
    base = nn.ModuleDict({f"part{k}": nn.Linear(1, 1) for k in range(1000)})
    folder = save(
        tmp_path / "run", copy.deepcopy(base), r=1, target_modules=[f"part{k}" for k in range(1000)]
    )
    CheckpointCollection([configured(folder, alpha_pattern={"(.*).lin": 3})], module=base)
    configured(folder, alpha_pattern={".?" * 17 + "X": 3})
    refused("too long to match with 1,000 modules", folder, module=base)
    configured(folder, alpha_pattern={}, target_modules=".?" * 11 + "t[0-9]*")
    refused("too long to match with 1,000 modules", folder, module=base)


@pytest.mark.parametrize("start", ["a", "lora_"])
def test_patterns_are_bounded_by_the_longest_name(tmp_path, start):
    name = start + "a" * 850
    base = nn.ModuleDict({name: nn.Linear(1, 1)})
    folder = save(tmp_path / "run", copy.deepcopy(base), r=1, target_modules=[name])
    CheckpointCollection([configured(folder, exclude_modules=".*b")], module=base)
    configured(folder, exclude_modules=".*?a?.*?a?.*?!")
    refused("too long to match with 1 modules", folder, module=base)


def test_a_rank_far_above_the_sizes_is_refused(tmp_path):
    folder = save(tmp_path / "run", r=257)
    refused("'a.weight', of shape .8, 8., have rank 257, more than such a matrix can have", folder)
    CheckpointCollection([save(tmp_path / "other", r=256)], module=build)


@pytest.mark.parametrize(("m", "n", "largest"), [(40, 60, 180), (30, 5, 60)])
def test_inner_products_of_many_columns_are_computed_in_blocks(monkeypatch, m, n, largest):
    """From products of columns, or from the differences if these are fewer numbers."""
    torch.manual_seed(0)
    stack = Stack(torch.randn(m, 60), torch.randn(60, n), torch.arange(60) // 20)
    whole = stack.gram(3)
    deltas = torch.stack([
        (stack.left[:, part] @ stack.right[part]).flatten().double()
        for part in (slice(0, 20), slice(20, 40), slice(40, 60))
    ])  # fmt: skip
    assert torch.allclose(whole, deltas @ deltas.T, rtol=1e-5)
    sizes = []
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: sizes.append(len(a) * b.shape[1]) or multiply(a, b)
    )
    monkeypatch.setattr(factors, "MOST_PRODUCTS", 180)  # three rows
    assert torch.allclose(stack.gram(3), whole)
    assert max(sizes) == largest


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_narrow_factors_are_widened_as_peft_does(tmp_path, dtype):
    folder = save(tmp_path / "run")
    rewritten(folder, lambda s: {n: v.to(dtype) if "lora_A" in n else v for n, v in s.items()})
    ours, theirs = CheckpointCollection([folder], module=build)["run"], as_peft_reads(folder)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


# ------------------------------------------------------------------ odd fields, heads


@pytest.mark.parametrize(
    ("field", "odd"),
    [
        ("task_type", "EVIL"),
        ("task_type", ["SEQ_CLS"]),
        ("auto_mapping", "x"),
        ("auto_mapping", {"base_model_class": ["x"]}),
        ("auto_mapping", {"other": "x"}),
        ("revision", {"a": [1]}),
        ("base_model_name_or_path", {"a": 1}),
    ],
)
def test_odd_fields_are_not_written_to_the_adapter_of_a_soup(tmp_path, field, odd):
    runs = [configured(save(tmp_path / f"run{k}"), **{field: odd}) for k in range(2)]
    X, y = np.zeros((6, 8), np.float32), np.arange(6) % 3
    soup = UniformSoup().fit(CheckpointCollection(runs, module=build), X, y)
    soup.save_adapter(tmp_path / "soup")
    assert json.loads((tmp_path / "soup" / CONFIG).read_text())[field] is None
    as_peft_reads(tmp_path / "soup")


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"classifier": (3, 8), "pre_classifier": (8, 8)}, 3),  # DistilBERT
        ({"classifier": (8, 8), "pre_classifier": (8, 8)}, 8),
        ({"classifier.dense": (8, 8), "classifier.out_proj": (3, 8)}, 3),  # RoBERTa
        ({"logits_proj": (3, 8), "sequence_summary.summary": (8, 8)}, 3),  # XLNet
        ({"word_embeddings": (30, 8), "score": (2, 8)}, 2),
        ({"head": (5, 8), "pooler": (8, 8)}, 5),
        ({"head": (8, 8)}, 8),
        ({}, None),
    ],
)
def test_the_outputs_are_those_of_the_last_layer(shapes, expected):
    header = {f"{P}{n}.weight": TensorInfo(s, torch.float32) for n, s in shapes.items()}
    assert _n_labels(header, "SEQ_CLS") == expected
    assert _n_labels(header, "CAUSAL_LM") is None


def test_copies_of_base_weights_are_compared_with_a_base_that_is_opened_once(tmp_path, monkeypatch):
    base, names = build(), ("a", "b")
    folder = save(tmp_path / "adapter", target_modules=[*names])
    state = load_file(folder / "adapter_model.safetensors")
    copies = {f"{P}{n}.base_layer.weight": getattr(base, n).weight.detach() for n in names}
    save_file(state | copies, folder / "adapter_model.safetensors")
    adapters = CheckpointCollection([folder], module=build)
    opened = []
    inner = BaseModel.open
    monkeypatch.setattr(BaseModel, "open", lambda self: opened.append(1) or inner(self))
    adapters.check()
    assert len(opened) <= 2  # for the tensors, and for all copies


@pytest.mark.parametrize("head", ["RobertaForMaskedLM", "RobertaForSequenceClassification"])
def test_the_base_of_a_classifier_may_have_the_head_of_another_task(tmp_path, head):
    """As bert-base-uncased and roberta-base on the hub; from_pretrained ignores it."""
    config = transformers.RobertaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        vocab_size=20, max_position_embeddings=12, num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, head)(config).save_pretrained(tmp_path / "base")
    for run in ("a", "b"):
        kind = transformers.RobertaForSequenceClassification
        model = kind.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        peft.get_peft_model(model, lora).save_pretrained(str(tmp_path / run))
    adapters = CheckpointCollection([tmp_path / "a", tmp_path / "b"])
    assert not any(name.startswith("lm_head") for name in adapters.layout)
    ids = torch.randint(3, 20, (12, 6))
    X = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    soup = UniformSoup().fit(adapters, X, np.arange(12) % 3)
    assert soup.predict(X).shape == (12,)


names = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join)


@given(st.lists(names, min_size=1, unique=True), st.sets(names))
def test_targets_are_names_unless_another_module_ends_like_one(modules, others):
    adapter = SimpleNamespace(base=SimpleNamespace(modules=["", *others, *modules]))
    ambiguous = any(o.endswith(f".{m}") for m in modules for o in adapter.base.modules)
    assert isinstance(_targets(modules, adapter), str) == ambiguous


def test_targets_of_very_many_modules_are_found_at_once():
    modules = [f"layers.{k}.linear" for k in range(40_000)]
    begin = time.process_time()
    assert _targets(modules, SimpleNamespace(base=SimpleNamespace(modules=modules))) == modules
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("name", ["runs/bert--lr1e-3", "org/model.git", "a-", "a."])
def test_bases_with_names_that_the_hub_does_not_allow(tmp_path, name):
    folder = configured(save(tmp_path / "adapter"), base_model_name_or_path=name)
    assert len(CheckpointCollection([folder], module=build)) == 1
    with pytest.raises(CheckpointError, match="which is not on this machine"):
        CheckpointCollection([folder])


@pytest.mark.parametrize(
    ("revision", "found"),
    [(None, "main"), ("refs/pr/1", "pull"), ("v2", "tag"), ("a" * 40, "main"), ("refs/pr/2", None),
     ("../main", None), ("x" * 300, None), (5, None)],
)  # fmt: skip
def test_the_base_is_of_the_revision_that_is_named(tmp_path, monkeypatch, revision, found):
    cache = tmp_path / "models--org--m"
    for sha, name in (("a", "main"), ("b", "refs/pr/1"), ("c", "v2")):
        folder = cache / "snapshots" / (sha * 40)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        ref = cache / "refs" / name
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(sha * 40)
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    expected = {"main": "a", "pull": "b", "tag": "c"}.get(found)
    base = find_base_folder("org/m", revision)
    assert base == (None if expected is None else cache / "snapshots" / (expected * 40))


@pytest.mark.parametrize("name", ["bert-tiny", "org/m", "{run}/checkpoint-500", "./gone"])
def test_the_folder_around_a_base_that_is_missing_is_not_its_base(tmp_path, monkeypatch, name):
    """As the final model around a checkpoint that Trainer deleted, or the current folder."""
    for folder in (tmp_path, tmp_path / "org", tmp_path / "run"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text('{"model_type": "bert"}')
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert find_base_folder(name.format(run=tmp_path / "run")) is None
    assert find_base_folder(str(tmp_path / "run")) == tmp_path / "run"
    assert find_base_folder("run") == tmp_path / "run"


def test_values_may_be_as_deep_as_json_is_read(tmp_path):
    """Near the limit of recursion the value is read, and its repr may be too deep."""
    folder = save(tmp_path / "run")
    config = json.loads((folder / CONFIG).read_text())
    for field in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"):
        text = json.dumps({**config, field: "here"})
        for depth in range(900, 1000, 2):
            (folder / CONFIG).write_text(text.replace('"here"', "[" * depth + "]" * depth))
            refused("can't be (opened|read)", folder)


@pytest.mark.parametrize("part", ["modules_to_save.default.", "original_module."])
def test_names_of_wrappers_are_left_out_only_beside_plain_ones(tmp_path, part):
    """PEFT misses the plain name, and the head of the base would be taken."""
    folder = save(tmp_path / "run", modules_to_save=["classifier"])
    name, wrapped = f"{P}classifier.weight", f"{P}classifier.{part}weight"
    expected = CheckpointCollection([folder], module=build)["run"]["classifier.weight"]
    rewritten(folder, lambda state: state | {wrapped: state[name] + 1})
    found = CheckpointCollection([folder], module=build)["run"]["classifier.weight"]
    assert torch.equal(found, expected)
    rewritten(folder, lambda state: {n: v for n, v in state.items() if n != name})
    refused(f"it holds '{wrapped}' without '{name}'", folder)


@pytest.mark.parametrize("name", ["//host/share/base", r"\\\\host\\share\\base"])
def test_a_base_on_another_machine_is_not_looked_for(name):
    """Windows would ask that machine, and may send who asks."""
    with patch.object(Path, "exists", side_effect=AssertionError):
        assert find_base_folder(name) is None
