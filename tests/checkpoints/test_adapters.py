"""LoRA adapters: what they are merged by PEFT, where their base is from, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sksoup import CheckpointCollection, CheckpointError, SoupWarning, UniformSoup, mix
from sksoup.__main__ import main
from sksoup.checkpoints.base_model import BaseModel
from sksoup.checkpoints.peft_config import CONFIG
from sksoup.checkpoints.protocol import is_cast
from sksoup.checkpoints.read import SafetensorsFile
from sksoup.engine.objective import load_weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from ..adapters import TARGETS, Net, build, merge, peft_model, rows, save_adapters  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
WEIGHTS = "adapter_model.safetensors"


class Volumes(nn.Module):
    """A three-dimensional convolution, an attention, a BatchNorm, a group-wise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.vol = nn.Conv3d(1, 2, 2)
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.grouped = nn.Conv1d(4, 4, 3, groups=2, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.vol(x.float().reshape(-1, 1, 5, 1, 1).expand(-1, 1, 5, 2, 2) / 20).flatten(1)
        h = self.norm(h)[:, None]
        return self.head(self.att(h, h, h)[0][:, 0])


class Tied(nn.Module):
    """An embedding whose weight is that of the output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.last = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.last.weight = self.emb.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.lin(self.emb(x).mean(dim=1)))


def seeded(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def one(**fields: Any) -> dict[str, Any]:
    """An adapter of the first configuration, without its pattern."""
    return {"rank_pattern": {}, **fields}


KINDS: dict[str, dict[str, Any]] = {
    **{f"only {target}": one(target_modules=[target]) for target in TARGETS},
    "Conv1D said to be transposed": one(target_modules=["conv1d"], fan_in_fan_out=True),
    "all biases": one(bias="all"), "biases of the targets": one(bias="lora_only"),
    "all biases, and a long expression": one(
        bias="all", target_modules=r".*emb|.*lin|.*conv|.*another"
    ),
    "rsLoRA": one(use_rslora=True, r=3), "rank 1": one(r=1),
    "rank above the sizes": one(r=16, target_modules=["lin", "conv"]),
    "ranks by pattern": {"rank_pattern": {"lin": 5, "conv.?": 3}},
    "scales by pattern": one(alpha_pattern={"^emb": 7, "conv2|lin": 2}),
    "both patterns": {"rank_pattern": {"conv": 3, "lin": 1}, "alpha_pattern": {"conv": 5},
                      "use_rslora": True},
    "targets by pattern": one(target_modules=r"(emb|conv2?)"),
    "all that is linear": one(target_modules="all-linear", modules_to_save=None),
    "no head": one(modules_to_save=None),
    "a norm and a head": one(modules_to_save=["norm", "head"]),
    "an embedding as it is": one(target_modules=["lin"], modules_to_save=["emb"]),
    "begins gaussian": one(init_lora_weights="gaussian", target_modules=["lin", "conv1d"]),
    "begins orthogonal": one(init_lora_weights="orthogonal", target_modules=["lin"]),
    "begins anyhow": one(init_lora_weights=False),
}  # fmt: skip


def logits(network: nn.Module, state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    if state is not None:
        network.load_state_dict(state)
    with torch.no_grad():
        return network.eval()(rows()[0])


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def refused(match: str, given: Any, **params: Any) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        CheckpointCollection(given, **params)
    return caught.value


def changed(folder: Path, **fields: Any) -> Path:
    """Other fields in a configuration."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    return folder


def rewritten(folder: Path, change: Any) -> Path:
    """Other tensors in an adapter."""
    state = load_file(folder / WEIGHTS)
    save_file(change(state) or state, folder / WEIGHTS)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """One adapter."""
    peft_model(0).save_pretrained(str(tmp_path / "a0"))
    return tmp_path / "a0"


@contextmanager
def base_reads():
    """Count how often each tensor of a base is read."""
    counted: dict[str, int] = {}
    original = BaseModel.open

    @contextmanager
    def counting(self):
        with original(self) as read:

            def counted_read(name):
                counted[name] = counted.get(name, 0) + 1
                return read(name)

            yield counted_read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseModel, "open", counting)
        yield counted


# ---------------------------------------------------------------- one adapter is what PEFT merges


@pytest.mark.parametrize("what", KINDS)
def test_one_adapter_has_the_logits_of_pefts_own_merge(what, tmp_path):
    model = peft_model(0, **KINDS[what])
    expected = logits(merge(model))
    assert (expected - logits(build())).abs().max() > 0.01
    model.save_pretrained(str(tmp_path / "one"))
    opened = CheckpointCollection([tmp_path / "one"], module=build)
    held = CheckpointCollection([model], module=build)
    for collection in (opened, held):
        (name,) = collection.names
        close(logits(build(), mix(collection, [1.0])), expected)
        close(logits(build(), collection[name]), expected)
    a, b = opened["one"], held["checkpoint0"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["vol"], "modules_to_save": ["head"]},
        {"target_modules": ["head"], "modules_to_save": ["norm"]},
        {"target_modules": ["att.out_proj"], "modules_to_save": ["norm"]},
    ],
)
def test_layers_of_other_networks(fields, tmp_path):
    model = peft_model(0, seeded(Volumes), **one(**fields))
    model.eval()
    model.save_pretrained(str(tmp_path / "one"))
    collection = CheckpointCollection([tmp_path / "one"], module=lambda: seeded(Volumes))
    expected = logits(merge(model))
    close(logits(seeded(Volumes), mix(collection, [1.0])), expected)


def test_the_starts_that_are_taken_leave_the_base_as_it_is():
    for start in (True, "gaussian", "orthogonal"):
        config = peft.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=start)
        model = peft.get_peft_model(build(), config)
        close(logits(merge(model)), logits(build()))
        close(logits(build(), CheckpointCollection([model])["checkpoint0"]), logits(build()))


def test_half_precision_is_within_its_rounding():
    """bf16 factors cost nothing more; of a bf16 base the sum is rounded once, PEFT's twice."""
    model = peft_model(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = value.data.bfloat16().float()
    expected = merge(model).state_dict()
    narrow = copy.deepcopy(model)
    for name, value in narrow.named_parameters():
        if "lora_" in name:
            value.data = value.data.bfloat16()
    found = CheckpointCollection([narrow], module=build)["checkpoint0"]
    for name, value in expected.items():
        close(found[name], value)
    wide = CheckpointCollection([model], module=build)["checkpoint0"]
    base = build().bfloat16()
    found = CheckpointCollection([_on_bf16(model)])["checkpoint0"]
    for name in CheckpointCollection([model]).on_one_base()["checkpoint0"].ranks:
        assert found[name].dtype == torch.bfloat16
        exact = base.state_dict()[name].float() + (wide[name] - build().state_dict()[name])
        off = (found[name].float() - exact).abs()
        assert (off <= 2**-8 * exact.abs() + 1e-6).all()  # half a unit in the last place: 2^-9
    assert found["head.weight"].dtype == torch.bfloat16


def _on_bf16(model: Any) -> Any:
    """The same adapter, its factors in float32, on the base in bfloat16."""
    half = copy.deepcopy(model)
    for name, value in half.get_base_model().state_dict(keep_vars=True).items():
        if "lora_" not in name and value.is_floating_point():
            value.data = value.data.bfloat16()
    return half


# ---------------------------------------------------------------- where adapters come from


def test_folders_files_and_names(tmp_path):
    merged = save_adapters(tmp_path / "runs")
    collection = CheckpointCollection.from_path(tmp_path / "runs", module=build)
    assert collection.names == ("a0", "a1", "a2", "a3")
    assert len(collection.on_one_base()) == 4
    assert "4 checkpoints, 14 tensors" in repr(collection)
    for ways in (str(tmp_path / "runs" / "a*"), str(tmp_path / "runs" / "*" / WEIGHTS)):
        again = CheckpointCollection.from_path(ways, module=build)
        assert len(again.on_one_base()) == 4
        assert [again.identity(n) for n in again] == [collection.identity(n) for n in collection]
    named = CheckpointCollection(
        {"x": tmp_path / "runs" / "a1", "y": tmp_path / "runs" / "a0" / WEIGHTS}, module=build
    )
    assert named.names == ("x", "y")
    close(logits(build(), named["y"]), logits(merged[0]))
    assert named.path("x") == tmp_path / "runs" / "a1"


def test_torch_files_hold_the_same(folder, tmp_path):
    other = tmp_path / "bin"
    other.mkdir()
    shutil.copy(folder / CONFIG, other)
    torch.save(load_file(folder / WEIGHTS), other / "adapter_model.bin")
    a = CheckpointCollection([folder], module=build)["a0"]
    b = CheckpointCollection([other], module=build)["bin"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_models_in_memory_on_their_own_base_or_a_given_one():
    models = [peft_model(k) for k in (0, 3)]
    own, on_given = CheckpointCollection(models), CheckpointCollection(models, module=build)
    for k, model in enumerate(models):
        close(logits(build(), own[f"checkpoint{k}"]), logits(merge(model)))
        assert own.content_sha256(f"checkpoint{k}") == on_given.content_sha256(f"checkpoint{k}")
    other = build()
    other.norm.weight.data += 1
    for given in ({"module": other}, {}):
        models[1] = peft_model(3, base=other) if not given else models[1]
        refused("'norm.weight' of its base differs from that of the others", models, **given)


def test_a_model_in_memory_is_the_base_as_it_was_before_its_head_was_trained(tmp_path):
    """PEFT's unload() leaves the trained head: an adapter without one would have taken it."""
    peft_model(3, modules_to_save=None).save_pretrained(str(tmp_path / "plain"))
    start = build().state_dict()["head.weight"]
    trained = peft_model(0)
    beside = CheckpointCollection(
        [trained, tmp_path / "plain", peft_model(2, modules_to_save=None)]
    )
    assert not torch.equal(beside["checkpoint0"]["head.weight"], start)
    assert torch.equal(beside["plain"]["head.weight"], start)
    assert torch.equal(beside["checkpoint2"]["head.weight"], start)
    on_it = CheckpointCollection([tmp_path / "plain"], module=trained)
    assert torch.equal(on_it["plain"]["head.weight"], start)


def test_a_model_that_has_trained_its_biases_is_no_base_for_others(tmp_path):
    peft_model(3, modules_to_save=None).save_pretrained(str(tmp_path / "plain"))
    for k in (1, 2):
        error = refused("trained it in place", [tmp_path / "plain"], module=peft_model(k))
        assert "'conv.bias'" in str(error)
    peft_model(1).save_pretrained(str(tmp_path / "biased"))
    CheckpointCollection([tmp_path / "biased"], module=peft_model(1))


def test_merged_and_rescaled_models_are_refused():
    model = peft_model(0)
    model.merge_adapter()
    refused("is merged into the base.*unmerge_adapter", [model])
    refused("is merged into the base", [peft_model(0)], module=model)
    model.unmerge_adapter()
    close(logits(build(), CheckpointCollection([model])["checkpoint0"]), logits(merge(model)))
    model.base_model.model.lin.set_scale("default", 3.0)
    refused("'lin' scales its product by 2.4, expected 0.8", [model])


def test_the_active_adapter_counts():
    model = peft_model(0)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lin"]))
    first = CheckpointCollection([model])["checkpoint0"]
    close(logits(build(), first), logits(merge(peft_model(0))))
    model.base_model.set_adapter(["default", "second"])
    refused(r"has 2 active adapters, expected one. Call model.set_adapter\(name\)", [model])


def test_a_network_in_memory_that_is_no_peft_model_is_refused():
    model = peft_model(0)
    for given in (model.state_dict(), model.base_model, model.get_base_model()):
        refused("a factor of a PEFT adapter, and the product of averaged factors is not", [given])
    for name in ("to_q.lora.down", "to_q_lora.up", "q.processor.to_k_lora.down", "proj_lora1.up"):
        given = {f"unet.attn.{name}.weight": torch.ones(2, 2)}  # as diffusers names them
        refused("a factor of a PEFT adapter, and the product of averaged factors is not", [given])
    vera = peft.get_peft_model(build(), peft.VeraConfig(target_modules=["lin"], r=2))
    refused("its 'peft_type' is .*VERA.*, expected 'LORA'", [vera])


# ---------------------------------------------------------------- where the base comes from


def test_ways_to_give_the_base(folder):
    expected = CheckpointCollection([folder], module=build)["a0"]
    for module in (build(), peft_model(3), peft_model(0), lambda: build()):
        found = CheckpointCollection([folder], module=module)["a0"]
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    refused("an adapter of 'an unnamed base', which is not on this machine", [folder])
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        CheckpointCollection([folder], module=lambda: 5)
    with pytest.raises(TypeError, match="needs arguments"):
        CheckpointCollection([folder], module=nn.Linear)


def test_a_factory_of_random_weights_is_no_base(folder, tmp_path):
    refused("changes '.*weight', which the base does not have", [folder], module=Net)

    def random_head() -> Net:
        net = build()
        nn.init.normal_(net.head.weight)
        nn.init.normal_(net.head.bias)
        return net

    held = CheckpointCollection([folder], module=random_head)["a0"]  # the adapter has the head
    close(logits(build(), held), logits(merge(peft_model(0))))
    peft_model(0, modules_to_save=None).save_pretrained(str(tmp_path / "plain"))
    error = refused(
        "initializes it differently each time", [tmp_path / "plain"], module=random_head
    )
    assert "neither it nor the base in memory has 'head.bias', 'head.weight'" in str(error)
    state = torch.random.get_rng_state()
    CheckpointCollection([folder], module=random_head)
    assert torch.equal(torch.random.get_rng_state(), state)


BERT = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip


def bert(head: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = transformers.BertForSequenceClassification if head else transformers.BertModel
        # one without a head has the labels of no task
        return kind(transformers.BertConfig(**{**BERT, "num_labels": 3 if head else 2}))


def lora(base: nn.Module, **fields: Any) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def outputs(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(rows()[0])[0]


@pytest.mark.filterwarnings("default")  # of transformers
@pytest.mark.parametrize("has_head", [True, False])
def test_the_base_is_the_folder_that_the_adapter_names(has_head, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert(has_head).save_pretrained("start")
    base = transformers.AutoModelForSequenceClassification.from_pretrained("start", num_labels=3)
    model = lora(base, task_type="SEQ_CLS", target_modules=["query", "dense"])
    model.save_pretrained("run")
    collection = CheckpointCollection.from_path("run")
    network = collection.build_module()
    assert type(network).__name__ == "BertForSequenceClassification"
    network.load_state_dict(collection["run"])
    close(outputs(network), outputs(merge(model)))
    for module in ("start", Path("start").absolute()):
        named = CheckpointCollection([tmp_path / "run"], module=module)
        assert all(torch.equal(named["run"][n], v) for n, v in collection["run"].items())
    Path("start").rename("moved")
    refused("an adapter of 'start', which is not on this machine.*module=build_base", ["run"])
    CheckpointCollection(["run"], module="moved")


@pytest.mark.filterwarnings("default")
def test_an_adapter_without_a_head_on_a_folder_without_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert(head=False).save_pretrained("start")
    base = transformers.AutoModelForSequenceClassification.from_pretrained("start", num_labels=3)
    lora(base, target_modules=["query"]).save_pretrained("run")
    changed(Path("run"), task_type="SEQ_CLS", base_model_name_or_path="start")
    refused("neither it nor the base .* has 'classifier.bias'.*modules_to_save", ["run"])


@pytest.mark.filterwarnings("default")
def test_a_language_model_and_an_adapter_without_a_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained("gpt")
    base = transformers.AutoModelForCausalLM.from_pretrained("gpt")
    model = lora(base, task_type="CAUSAL_LM", target_modules=["c_attn", "mlp.c_fc"])
    model.save_pretrained("chat")
    collection = CheckpointCollection(["chat"])
    network = collection.build_module()
    load_weights(network, collection["chat"])  # one of two tied tensors is in the file
    close(outputs(network), outputs(merge(model)))
    for task in (None, "NO_SUCH_TASK", ["SEQ_CLS"], 5):
        changed(Path("chat"), task_type=task)
        again = CheckpointCollection(["chat"])
        assert type(again.build_module()).__name__ == "GPT2LMHeadModel"
        assert all(torch.equal(again["chat"][n], v) for n, v in collection["chat"].items())
    tied = lora(transformers.AutoModelForCausalLM.from_pretrained("gpt"), target_modules=["wte"])
    tied.save_pretrained("tied")
    changed(Path("tied"), task_type="CAUSAL_LM")
    refused("changes 'transformer.wte.weight', which is tied to 'lm_head.weight'", ["tied"])


@pytest.mark.parametrize(
    "name",
    [None, "", "org/model", "../../etc", "/no/such/folder", "http://evil.example/x", "a" * 5000,
     "\ud800", "x\x00y", "~nobody/x", ["org/model"], 5, {"a": 1}, "org/../../secret"],
)  # fmt: skip
def test_a_base_that_is_not_here_is_not_fetched(name, folder):
    """`conftest` fails a test that asks the network."""
    changed(folder, base_model_name_or_path=name, revision="main", task_type="SEQ_CLS")
    refused("is not on this machine, and sksoup does not download it. Pass the base", [folder])
    CheckpointCollection([folder], module=build)


def test_a_base_with_packed_weights_is_named_in_a_warning(folder):
    changed(folder, base_model_name_or_path="unsloth/some-8b-bnb-4bit")
    with pytest.warns(SoupWarning, match="'unsloth/some-8b-bnb-4bit', a base with quantized"):
        CheckpointCollection([folder], module=build)


# ---------------------------------------------------------------- adapters that do not fit


def test_tied_tensors_grouped_convolutions_and_attentions_are_refused(tmp_path):
    cases = {
        "emb": (Tied, "changes 'emb.weight', which is tied to 'last.weight'"),
        "last": (Tied, "changes 'last.weight', which is tied to 'emb.weight'"),
        "grouped": (Volumes, "changes 'grouped', which is a convolution with groups"),
        "att": (Volumes, "changes 'att.weight', which the base does not have"),
    }
    for target, (kind, match) in cases.items():
        model = peft_model(0, seeded(kind), **one(target_modules=[target], modules_to_save=None))
        model.save_pretrained(str(tmp_path / target))
        refused(match, [tmp_path / target], module=lambda kind=kind: seeded(kind))
        refused(match, [model])
    saved = peft_model(0, seeded(Tied), **one(target_modules=["lin"], modules_to_save=["last"]))
    saved.save_pretrained(str(tmp_path / "saved"))
    refused("'last.weight', which is tied", [tmp_path / "saved"], module=lambda: seeded(Tied))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"padding_mode": "circular"}, "a convolution with padding_mode='circular', which PEFT"),
        ({"padding": "same", "dilation": 2}, "a convolution with dilation and padding='same'"),
    ],
)
def test_convolutions_whose_padding_peft_ignores_are_refused(tmp_path, settings, match):
    """PEFT's branch adds something else to their output than its merged weights give."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3, **{"padding": 1, **settings})
            self.head = nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x[:, None].float()).flatten(1))

    how = one(target_modules=["conv"], modules_to_save=None)
    model = peft_model(0, seeded(Padded), **how)
    model.save_pretrained(str(tmp_path / "adapter"))
    refused(match, [tmp_path / "adapter"], module=lambda: seeded(Padded))


def drop_b(state):
    return {n: v for n, v in state.items() if "lin.lora_B" not in n}


def without_prefix(state):
    return {n.removeprefix("base_model.model."): v for n, v in state.items()}


def other_shape(state):
    state["base_model.model.lin.lora_A.weight"] = torch.ones(5, 9)


def other_rank(state):
    state["base_model.model.lin.lora_A.weight"] = torch.ones(6, 8)
    state["base_model.model.lin.lora_B.weight"] = torch.ones(12, 6)


def other_head(state):
    state["base_model.model.head.weight"] = torch.ones(4, 72)


def no_module(state):
    state["base_model.model.nowhere.weight"] = torch.ones(4, 72)


def not_known(state):
    state["base_model.model.lin.lora_magnitude_vector"] = torch.ones(12)


def of_integers(state):
    for end in "AB":
        name = f"base_model.model.lin.lora_{end}.weight"
        state[name] = state[name].long()


def of_no_rank(state):
    state["base_model.model.lin.lora_A.weight"] = torch.ones(0, 8)
    state["base_model.model.lin.lora_B.weight"] = torch.ones(12, 0)


def of_numbers(state):
    state["base_model.model.lin.lora_A.weight"] = torch.tensor(1.0)


def nothing(state):
    return {"base_model.model.unused.original_module.weight": torch.ones(2)}


def twice(state):
    state["base_model.model.lin.bias"] = torch.ones(12)
    state["base_model.model.lin.base_layer.bias"] = torch.ones(12)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop_b, r"holds '.*lin.lora_A.weight' without '.*lin.lora_B.weight'"),
        (without_prefix, "does not have a name that PEFT uses, expected 'base_model.model"),
        (
            other_shape,
            r"'lin.weight' has dtype torch.float32 and shape \(12, 8\) in the base, which",
        ),
        (other_rank, "the factors of 'lin' have rank 6, expected 5"),
        (other_head, r"'head.weight' has shape \(4, 72\), expected \(3, 72\) as in"),
        (no_module, "holds 'nowhere.weight', which the base does not have"),
        (not_known, "'base_model.model.lin.lora_magnitude_vector' is not supported"),
        (of_integers, "has dtype torch.int64, expected a floating-point one"),
        (of_no_rank, "does not match the factors|have rank 0"),
        (of_numbers, "expected a matrix"),
        (nothing, r"it holds '.*' without '.*', which PEFT reads"),
        (twice, r"PEFT would not read '.*\.lin.bias'"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change, match, folder):
    rewritten(folder, change)
    error = refused(match, [folder], module=build)
    assert str(folder) in str(error)


def test_an_adapter_of_another_base_is_refused_by_its_shapes(folder):
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 13)

    class Less(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.conv2

    for kind, match in ((Wider, "does not match the factors"), (Less, "the base does not have")):
        error = refused(match, [folder], module=seeded(kind))
        assert "open only adapters of the same base together" in str(error)


@pytest.mark.filterwarnings("default")
def test_a_copy_of_the_embedding_has_to_be_the_bases(tmp_path):
    """peft saves embeddings with factors whole, too, where the vocabulary may be another."""
    for name, off in (("same", 0.0), ("other", 1.0)):
        base = bert()
        base.bert.embeddings.word_embeddings.weight.data += off
        model = lora(base, target_modules=["word_embeddings", "query"])
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=True)
        stored = load_file(tmp_path / name / WEIGHTS)
        assert any(n.endswith("word_embeddings.base_layer.weight") for n in stored)
    same = CheckpointCollection([tmp_path / "same"], module=bert)
    expected = outputs(merge(lora(bert(), target_modules=["word_embeddings", "query"])))
    network = bert()
    network.load_state_dict(mix(same, [1.0]))
    close(outputs(network), expected)
    other = CheckpointCollection([tmp_path / "other"], module=bert)
    with pytest.raises(CheckpointError, match=r"its values of '.*word_embeddings.weight'"):
        mix(other, [1.0])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("stored", "trained"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2],
)
def test_a_copy_of_the_embedding_has_the_dtype_of_training(tmp_path, stored, trained):
    model = lora(bert().to(stored).to(trained), target_modules=["word_embeddings", "query"])
    model.save_pretrained(str(tmp_path / "run"), save_embedding_layers=True)
    copied = {t.dtype for n, t in load_file(tmp_path / "run" / WEIGHTS).items() if "base_lay" in n}
    assert copied == {trained}
    one = CheckpointCollection([tmp_path / "run"], module=lambda: bert().to(stored))
    in_memory = CheckpointCollection([model], module=lambda: bert().to(stored))
    merged = merge(lora(bert().to(stored), target_modules=["word_embeddings", "query"]))
    for found in (mix(one, [1.0]), mix(in_memory, [1.0])):
        network = bert()
        network.load_state_dict(found)
        error = (outputs(network) - outputs(merged.float())).abs().max()
        assert error < (0.03 if torch.bfloat16 in (stored, trained) else 0.004)


@pytest.mark.parametrize(
    ("values", "dtype", "is_one"),
    [
        ([0.1, 2.0], torch.float32, True),
        ([0.1, 2.0], torch.bfloat16, True),
        ([0.1, 2.0], torch.float64, True),
        ([0.1, 2.0], torch.float8_e4m3fn, False),
        ([0.1, 1e5], torch.float16, False),
        ([0.1, torch.nan], torch.float32, True),
        ([0.1, torch.nan], torch.bfloat16, False),
        ([1, 2], torch.int64, True),
        ([1, 2], torch.int32, False),
    ],
)
def test_a_copy_in_another_dtype(values, dtype, is_one):
    original = torch.tensor(values)
    assert is_cast(original, original.to(dtype)) == is_one
    assert not is_cast(original, (original + 1).to(dtype))


def test_a_folder_with_a_whole_model_too_and_one_without_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "both")
    torch.save({}, tmp_path / "both" / "pytorch_model.bin")
    (tmp_path / "none").mkdir()
    shutil.copy(folder / CONFIG, tmp_path / "none")
    refused("of a PEFT adapter and 'pytorch_model.bin', too", [tmp_path / "both"], module=build)
    refused("of a PEFT adapter and no weights", [tmp_path / "none"], module=build)
    with pytest.raises(CheckpointError, match="of a PEFT adapter and no weights"):
        CheckpointCollection.from_path(tmp_path / "none", module=build)


def test_factors_without_their_configuration_are_refused_everywhere(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for k in range(2):
        shutil.copy(folder / WEIGHTS, bare / f"{k}.safetensors")
    shutil.copy(folder / WEIGHTS, tmp_path / WEIGHTS)
    match = "a factor of a PEFT adapter, and the product of averaged factors is not"
    refused(match, [tmp_path / WEIGHTS])
    refused(match, [tmp_path / WEIGHTS], module=build)
    refused(match, [load_file(tmp_path / WEIGHTS)])
    refused(match, [torch.nn.Linear(2, 2), tmp_path / WEIGHTS])
    with pytest.raises(CheckpointError, match=match):
        CheckpointCollection.from_path(bare)
    assert main(["average", str(bare), "-o", str(tmp_path / "out.safetensors")]) != 0
    assert "the product of averaged factors" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
    (bare / "0.safetensors").unlink()
    assert main(["average", str(folder), "-o", str(tmp_path / "out.safetensors")]) != 0
    assert "does not download it" in capsys.readouterr().err


# ---------------------------------------------------------------- many, and how much is read


def test_a_sweep_of_trainer_takes_the_best_of_each_run(tmp_path):
    for run in range(2):
        for k, step in enumerate((10, 20)):
            step_folder = tmp_path / f"run{run}" / f"checkpoint-{step}"
            peft_model(2 * run + k).save_pretrained(str(step_folder))
            state = {
                "global_step": step, "best_metric": 0.9, "log_history": [],
                "best_model_checkpoint": f"out/run{run}/checkpoint-10",
            }  # fmt: skip
            (step_folder / "trainer_state.json").write_text(json.dumps(state))
    best = CheckpointCollection.from_path(tmp_path, which="best", module=build)
    assert best.names == ("run0", "run1")
    close(logits(build(), best["run1"]), logits(merge(peft_model(2))))
    everything = CheckpointCollection.from_path(tmp_path, which="all", module=build)
    assert len(everything.on_one_base()) == 4
    last = CheckpointCollection.from_path(tmp_path, which="last", module=build)
    close(logits(build(), last["run1"]), logits(merge(peft_model(3))))


def test_opening_200_adapters_reads_headers_only(folder, tmp_path, monkeypatch):
    for k in range(200):
        other = tmp_path / "many" / f"run{k}"
        other.mkdir(parents=True)
        for name in (WEIGHTS, CONFIG):
            (other / name).hardlink_to(folder / name)
    reading = CheckpointCollection([folder], module=build)
    opened = []
    original = SafetensorsFile.open

    def counting(self):
        opened.append(self)
        return original(self)

    monkeypatch.setattr(SafetensorsFile, "open", counting)
    with base_reads() as of_base:
        collection = CheckpointCollection.from_path(str(tmp_path / "many" / "*"), module=build)
        assert len(collection.on_one_base()) == len(collection) == 200
        assert opened == []
        assert not of_base
        assert mix(reading, [1.0])
    assert len(opened) == 2  # for the factors, and for the head
    assert set(of_base.values()) == {1}


def test_check_reads_the_base_once(tmp_path):
    save_adapters(tmp_path)
    collection = CheckpointCollection.from_path(tmp_path, module=build)
    with base_reads() as counted:
        collection.check()
    shared = set(collection.layout) - {
        n for one in collection.on_one_base().values() for n in (*one.ranks, *one.whole)
    }
    assert shared == {"norm.weight", "steps"}
    assert {name: counted[name] for name in shared} == dict.fromkeys(shared, 1)
    assert all(n <= 4 for n in counted.values())
    with base_reads() as again:
        collection.check()
    assert not again


def test_adapters_that_add_no_tensor_share_the_header_of_their_base(tmp_path):
    for k in range(2):
        peft_model(0, modules_to_save=None).save_pretrained(str(tmp_path / f"a{k}"))
    collection = CheckpointCollection.from_path(tmp_path, module=build)
    a, b = collection.adapters(collection.names).values()
    assert a.header is b.header is a.base.header


def test_describe_and_healthy_work(tmp_path):
    for k in range(4):
        peft_model(0, lora_alpha=1 + k / 10, modules_to_save=None).save_pretrained(
            str(tmp_path / f"a{k}")
        )
    collection = CheckpointCollection.from_path(tmp_path, module=build)
    whole = CheckpointCollection({name: collection[name] for name in collection})
    ours, theirs = collection.describe().to_dict(), whole.describe().to_dict()
    assert str(collection.describe()) == str(whole.describe())
    assert ours == theirs
    assert collection.healthy() is collection


@pytest.mark.parametrize("where", ["lin.lora_A.weight", "lora_embedding_B", "head.weight"])
def test_what_is_not_finite_is_named(where, tmp_path):
    save_adapters(tmp_path)

    def spoil(state):
        (name,) = (name for name in state if name.endswith(where))
        state[name][0, 0] = torch.nan

    bad = "a2" if "emb" in where else "a3"
    rewritten(tmp_path / bad, spoil)
    collection = CheckpointCollection.from_path(tmp_path, module=build)
    tensor = {"lin.lora_A.weight": "lin.weight", "lora_embedding_B": "emb.weight"}.get(where, where)
    match = rf"{bad}' can't be used: '{tensor}' holds NaN or infinite"
    X, y = rows()
    for act in (
        lambda: mix(collection, [0.25] * 4),
        collection.check,
        lambda: UniformSoup().fit(collection, X, y),
    ):
        with pytest.raises(CheckpointError, match=match):
            act()
    with pytest.warns(SoupWarning, match=f"'{bad}' \\('{tensor}' holds NaN\\)"):
        assert bad not in collection.healthy()
    assert mix(collection, [1.0, 0.0, 0.0, 0.0]).keys() == collection.layout.keys()


def test_a_base_that_is_not_finite_is_named(tmp_path):
    """Where an adapter adds to it, and where none does."""
    save_adapters(tmp_path, 2)
    for module, match in (("lin", "mix of 'lin.weight' holds NaN"), ("norm", "'norm.weight' h")):
        base = build()
        base.get_submodule(module).weight.data.view(-1)[0] = torch.nan
        collection = CheckpointCollection.from_path(tmp_path, module=base)
        with pytest.raises(CheckpointError, match=match):
            mix(collection, [0.5, 0.5])
        with pytest.raises(CheckpointError, match="holds NaN or infinite"):
            collection.check()


def test_a_pickle_holds_paths_and_the_base_once(tmp_path):
    save_adapters(tmp_path)
    collection = CheckpointCollection.from_path(tmp_path, module=build)
    data = pickle.dumps(collection)
    again = pickle.loads(data)
    for name in collection:
        ours, theirs = collection[name], again[name]
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in ours)
    assert len({id(one.base) for one in again.on_one_base().values()}) == 1
    assert len(data) < 4 * sum(t.nbytes for t in build().state_dict().values()) + 20_000
    held = pickle.loads(pickle.dumps(CheckpointCollection([peft_model(0), peft_model(1)])))
    close(logits(build(), held["checkpoint0"]), logits(merge(peft_model(0))))


def test_files_that_change_while_they_are_open_are_noticed(folder):
    collection = CheckpointCollection([folder], module=build)
    rewritten(folder, lambda state: {n: v + 1 for n, v in state.items()})
    with pytest.raises(CheckpointError, match="changed"):
        mix(collection, [1.0])


def test_the_digest_is_that_of_factors_and_scales(folder, tmp_path):
    digests = set()
    for k, fields in enumerate(({}, {"lora_alpha": 8}, {"use_rslora": True}, {"r": 7})):
        other = shutil.copytree(folder, tmp_path / f"copy{k}")
        if "r" in fields:
            continue
        changed(Path(other), lora_dropout=0.5, **fields)
        digests.add(CheckpointCollection([other], module=build).sha256(f"copy{k}"))
    assert len(digests) == 3
    assert CheckpointCollection([folder], module=build).sha256("a0") in digests


def test_nothing_is_said_about_peft_unless_it_is_needed(folder):
    """Folders are opened without peft."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setitem(sys.modules, "peft", None)
        collection = CheckpointCollection([folder], module=build)
        assert np.isfinite(float(mix(collection, [1.0])["lin.weight"].sum()))


@pytest.mark.parametrize("name", ["road_head", "miss_type", "lily_attention", "c3a_block", "hira"])
def test_parts_of_a_network_that_are_named_like_methods_are_no_factors(name):
    states = [{f"heads.{name}.weight": torch.full((2,), float(k))} for k in range(2)]
    assert mix(states, [0.5, 0.5])[f"heads.{name}.weight"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "name",
    ["road_theta", "miss_block", "lily_A.weight", "hira_embedding_B", "gralora_A_general",
     "c3a_kernel", "tinylora_v", "glora_A.X", "delora_lambda", "pvera_lambda_b"],
)  # fmt: skip
def test_factors_of_newer_methods_are_refused(name):
    refused("a factor of a PEFT adapter", [{f"layer.q.{name}": torch.ones(2, 2)}])
