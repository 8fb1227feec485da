"""Adapters of one base: their mix is the mix of the merged networks, by a rule of its own."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import warnings
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from sksoup import (
    CheckpointCollection,
    CheckpointError,
    GreedySoup,
    Recipe,
    RecipeError,
    UniformSoup,
    mix,
)
from sksoup.__main__ import main
from sksoup.checkpoints.base_model import BaseModel
from sksoup.mixing.verification import digest_of_tensors
from sksoup.recipe import Base

from ..references import mix_reference
from ..zoo import same_tensors

pytest.importorskip("peft")

from ..adapters import build, merge, peft_model, rows, save_adapters

# the adapters are moved far, so that what is wrong is seen
pytestmark = pytest.mark.filterwarnings("ignore:.*fine-tuned from the same")
COEF = [0.7, -0.4, 0.5, 0.2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four adapters of different ranks, targets and scales, with a head of their own each."""
    root = tmp_path_factory.mktemp("adapters")
    save_adapters(root)
    return root


@pytest.fixture
def adapters(folder) -> CheckpointCollection:
    return CheckpointCollection.from_path(folder, module=build)


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


def product(stored: dict[str, torch.Tensor], module: str, scale: float, kind: nn.Module):
    """lambda B A in the layout of the base's weight, in float64: written out from PEFT's names."""
    start = f"base_model.model.{module}.lora_"
    is_embedding = isinstance(kind, nn.Embedding)
    a_name, b_name = ("embedding_A", "embedding_B") if is_embedding else ("A.weight", "B.weight")
    if start + a_name not in stored:
        return None
    a, b = stored[start + a_name].float(), stored[start + b_name].float()
    rank = a.shape[0]
    a, b = a.reshape(rank, -1), b.reshape(-1, rank) * scale  # lambda in float32, in B
    if kind.weight.ndim == 2 and not isinstance(kind, nn.Linear):  # an embedding, or Conv1D
        return a.T.contiguous().double() @ b.T.contiguous().double()
    return (b.double() @ a.double()).reshape(kind.weight.shape)


def scales(folder: Path) -> dict[str, float]:
    """lambda of each module, as PEFT itself has it."""
    k = int(folder.name[1:])
    return {
        name: layer.scaling["default"]
        for name, layer in peft_model(k).get_base_model().named_modules()
        if isinstance(getattr(layer, "scaling", None), dict)
    }


def adapters_reference(base: nn.Module, folders, coef, rows_of) -> dict[str, torch.Tensor]:
    """The rule as the documentation has it, tensor by tensor."""
    modules, states = (
        dict(base.named_modules()),
        [load_file(f / "adapter_model.safetensors") for f in folders],
    )
    of_modules = [scales(f) for f in folders]
    mixed = {}
    for name, w_0 in base.state_dict().items():
        module = name.rpartition(".")[0]
        c = coef[rows_of[name]]
        held = [state.get(f"base_model.model.{name}",
                          state.get(f"base_model.model.{module}.base_layer.{name.rpartition('.')[2]}"))
                for state in states]  # fmt: skip
        if any(value is not None for value in held):  # a head, or a bias: the general rule
            values = [{name: w_0 if value is None else value} for value in held]
            # the dtype of all that are used, also in other layers only
            used = [value[name].dtype for value, of in zip(values, coef.T, strict=True) if of.any()]
            (found,) = mix_reference(values, c, {name: 0}).values()
            mixed[name] = found.to(reduce(torch.promote_types, used))
            continue
        total = w_0.float()
        is_changed = False
        for k, state in enumerate(states):
            if not name.endswith(".weight") or module not in of_modules[k]:
                continue
            both = product(state, module, of_modules[k][module], modules[module])
            if both is not None and c[k] != 0:
                total = total + both.reshape(w_0.shape).float() * c[k]
                is_changed = True
        mixed[name] = total.to(w_0.dtype) if is_changed else w_0
    return mixed


@settings(max_examples=15)
@example(seed=291, dtype=torch.bfloat16, layerwise=True, some=2)  # 1, -0 in one layer
@given(
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layerwise=st.booleans(),
    some=st.integers(1, 4),
)
def test_the_rule_written_out_gives_the_same_bits(seed, dtype, layerwise, some, folder):
    base = build().to(dtype)
    rng = np.random.default_rng(seed)
    names = list(base.state_dict())
    n_rows = len(names) if layerwise else 1
    rows_of = {name: k if layerwise else 0 for k, name in enumerate(names)}
    coef = rng.normal(size=(n_rows, 4)).round(3)
    coef[:, some:] = 0
    coef[:, 0] += 1 - coef.sum(axis=1)
    collection = CheckpointCollection.from_path(folder, module=base)
    expected = adapters_reference(base, sorted(folder.iterdir()), coef, rows_of)
    assert same_tensors(mix(collection, coef, layers=rows_of), {n: expected[n] for n in names})


def test_the_uniform_mix_is_the_mean_of_the_networks_that_peft_merges(folder, adapters):
    merged = [merge(peft_model(k)).state_dict() for k in range(4)]
    mixed = mix(adapters, [0.25] * 4)
    assert mixed.keys() == merged[0].keys()
    for name, value in mixed.items():
        mean = torch.stack([state[name].double() for state in merged]).mean(dim=0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-5)
    some = mix(adapters, COEF)
    for name in mixed.keys() - {"steps"}:
        sums = sum(c * state[name].double() for c, state in zip(COEF, merged, strict=True))
        torch.testing.assert_close(some[name].double(), sums, rtol=1e-5, atol=1e-5)


def test_what_has_a_coefficient_of_zero_is_not_read(folder, tmp_path):
    """Neither an adapter, nor the factors of a layer."""
    shutil.copytree(folder, tmp_path / "copies")
    weights = tmp_path / "copies" / "a0" / "adapter_model.safetensors"
    state = load_file(weights)
    state["base_model.model.lin.lora_A.weight"][0, 0] = torch.nan
    save_file(state, weights)
    broken = CheckpointCollection.from_path(tmp_path / "copies", module=build)
    rows_of = {name: int(name == "lin.weight") for name in broken.layout}
    coef = np.array([[0.25] * 4, [0.0, 0.5, 0.5, 0.0]])
    found = mix(broken, coef, layers=rows_of)
    whole = CheckpointCollection.from_path(folder, module=build)
    assert same_tensors(found, mix(whole, coef, layers=rows_of))
    weights.unlink()
    assert same_tensors(mix(broken, [0.0, 0.5, 0.5, 0.0]), mix(whole, [0.0, 0.5, 0.5, 0.0]))


def test_one_adapter_is_the_same_in_a_mix_and_by_itself(adapters):
    for k, name in enumerate(adapters):
        assert same_tensors(mix(adapters, np.eye(4)[k]), adapters[name])


def test_beside_a_whole_network_the_general_rule_holds(folder):
    whole = merge(peft_model(5)).state_dict()
    mixture = CheckpointCollection(
        {"a": folder / "a0", "whole": whole, "b": folder / "a1"}, module=build
    )
    assert mixture.on_one_base() == {}
    rows_of = dict.fromkeys(mixture.layout, 0)
    for coef in ([0.5, 0.25, 0.25], [0.5, 0.5, 0.0]):
        states = [mixture[name] for name in mixture]
        expected = mix_reference(states, np.array([coef]), rows_of)
        assert same_tensors(mix(mixture, coef), expected)
    # without it the rule for adapters does
    alone = CheckpointCollection([folder / "a0", folder / "a1"], module=build)
    assert same_tensors(mix(mixture, [0.5, 0.0, 0.5]), mix(alone, [0.5, 0.5]))
    X, y = rows()
    soup = GreedySoup().fit(mixture, X, y)
    assert soup.recipe_.verify(soup.state_dict(), mixture).ok


def test_with_a_prefix_the_general_rule_holds(folder, tmp_path):
    """Names of tensors are then not those that the adapters have for them."""
    paths = [folder / "a0", folder / "a1"]
    part = CheckpointCollection(paths, module=build, prefix="lin.")
    assert list(part.layout) == ["weight", "bias"]
    states = [part[name] for name in part]
    rows_of = dict.fromkeys(part.layout, 0)
    assert same_tensors(mix(part, [0.5, 0.5]), mix_reference(states, [0.5, 0.5], rows_of))
    assert part.on_one_base() == {}
    # what one of them adds to is not taken for the base's, which was read with the other
    for k, target in enumerate(("conv", "lin")):
        peft_model(3, target_modules=[target]).save_pretrained(str(tmp_path / f"a{k}"))
    weights = tmp_path / "a1" / "adapter_model.safetensors"
    save_file({n: v * torch.nan for n, v in load_file(weights).items()}, weights)
    broken = CheckpointCollection.from_path(tmp_path, module=build, prefix="lin.")
    with pytest.raises(CheckpointError, match="'weight' holds NaN"):
        broken.check()


def test_a_folder_has_the_same_bits(adapters, tmp_path):
    path = mix(adapters, COEF, out=tmp_path / "mixed")
    written = CheckpointCollection([path])["mixed"]
    mixed = mix(adapters, COEF)
    assert written.keys() == mixed.keys()
    assert all(torch.equal(written[name], mixed[name]) for name in mixed)


def test_the_base_is_read_once_however_many_adapters_there_are(folder, adapters, tmp_path):
    many = CheckpointCollection({f"{k}": folder / f"a{k % 4}" for k in range(12)}, module=build)
    for act in (
        lambda: mix(many, [1 / 12] * 12),
        lambda: mix(many, [1 / 12] * 12, out=tmp_path / "mixed"),
    ):
        with base_reads() as counted:
            act()
        whole = {n for one in many.on_one_base().values() for n in one.whole}
        once = {name: n for name, n in counted.items() if name not in whole}
        assert once == dict.fromkeys(many.layout.keys() - whole, 1)
        # a bias that some adapters hold is read where the others take the base's
        assert all(n <= 12 for n in counted.values())
        assert not {"head.weight", "head.bias"} & counted.keys()


# ---------------------------------------------------------------- recipes


def soup_of(collection: CheckpointCollection) -> UniformSoup:
    X, y = rows()
    return UniformSoup().fit(collection, X, y)


@pytest.mark.parametrize("where", ["folders", "memory"])
def test_a_recipe_rebuilds_and_verifies_the_soup(where, folder, adapters, tmp_path):
    collection = adapters
    if where == "memory":
        collection = CheckpointCollection([peft_model(k) for k in range(4)], module=build)
    soup = soup_of(collection)
    soup.save(tmp_path / "soup.safetensors")
    recipe = Recipe.load(tmp_path / "soup.safetensors")
    assert recipe == soup.recipe_
    assert recipe.base == soup.recipe_.base
    assert recipe.base.without == ("head.bias", "head.weight")
    assert same_tensors(recipe.cook(collection), soup.state_dict())
    findings = recipe.verify(tmp_path / "soup.safetensors", collection)
    assert findings.ok
    assert findings.rounded == ()
    if where == "memory":  # by their content, once they are in folders
        for k in range(4):
            peft_model(k).save_pretrained(str(tmp_path / "later" / f"run{k}"))
        later = CheckpointCollection.from_path(tmp_path / "later", module=build)
        assert same_tensors(recipe.cook(later), soup.state_dict())
    path = recipe.cook(collection, out=tmp_path / "cooked")
    assert recipe.verify(path, collection).ok


def test_the_base_is_the_same_in_memory_and_in_a_file(folder, adapters):
    in_memory = CheckpointCollection([peft_model(k) for k in range(4)])
    bases = {
        Recipe.record("x", c, COEF, layers=dict.fromkeys(c.layout, 0)).base
        for c in (
            adapters,
            in_memory,
            CheckpointCollection.from_path(folder, module=build()),
            CheckpointCollection.from_path(folder, module=peft_model(0)),
        )
    }
    assert len(bases) == 1


def other_base(off: float = 1e-3) -> nn.Module:
    base = build()
    base.norm.weight.data[0] += off
    return base


def test_another_base_is_refused(folder, adapters, tmp_path):
    soup = soup_of(adapters)
    other = CheckpointCollection.from_path(folder, module=other_base())
    for act in (soup.recipe_.cook, lambda c: soup.recipe_.verify(soup.state_dict(), c)):
        with pytest.raises(RecipeError, match=r"The base of 'a0' is not the one .*--base"):
            act(other)
    base = build()  # what all adapters hold themselves may be another
    base.head.weight.data += 1
    heads = CheckpointCollection.from_path(folder, module=base)
    assert same_tensors(soup.recipe_.cook(heads), soup.state_dict())


def test_adapters_of_two_bases_have_no_recipe(folder, adapters):
    one = CheckpointCollection([folder / "a0"], module=build)
    two = CheckpointCollection([folder / "a1"], module=other_base())
    both = CheckpointCollection({"one": one._entries["a0"], "two": two._entries["a1"]})
    assert both.on_one_base() == {}
    with pytest.raises(RecipeError, match="have different bases"):
        Recipe.record("x", both, [0.5, 0.5], layers=dict.fromkeys(both.layout, 0))


def nudged(state: dict[str, torch.Tensor], name: str, n_ulps: int) -> dict[str, torch.Tensor]:
    """One number moved by some units in its last place."""
    value = state[name].clone()
    flat = value.view(-1)
    place = int(flat.abs().argmin())
    for _ in range(n_ulps):
        flat[place] = torch.nextafter(flat[place], torch.tensor(torch.inf))
    return {**state, name: value}


def test_products_may_be_rounded_otherwise_and_nothing_else_may(adapters):
    """As on another processor: the soup's own digest is as recorded, its last bits are not ours."""
    soup = soup_of(adapters)
    state = soup.state_dict()

    def verified(weights):
        recipe = dataclasses.replace(soup.recipe_, weights_sha256=digest_of_tensors(weights))
        return recipe.verify(weights, adapters)

    found = verified(nudged(state, "lin.weight", 1))
    assert found.ok
    assert found.rounded == ("lin.weight",)
    assert "Verified: 13 of 14 tensors are bit for bit" in str(found)
    assert "1 more differ by rounding only: they are sums of products" in str(found)
    assert found.to_dict()["rounded"] == ("lin.weight",)
    # the digest of the soup itself still counts
    recorded = dataclasses.replace(soup.recipe_, weights_sha256=digest_of_tensors(state))
    assert recorded.verify(state, adapters).ok
    assert not recorded.verify(nudged(state, "lin.weight", 1), adapters).ok
    for name in ("norm.weight", "head.weight", "lin.bias", "steps"):
        changed = {**state, name: state[name] + 1} if name == "steps" else nudged(state, name, 1)
        found = verified(changed)
        assert not found.ok
        assert found.differing == {name: "has other values"}
    large = dict(state, **{"lin.weight": state["lin.weight"] * (1 + 1e-5)})
    assert verified(large).differing == {"lin.weight": "has other values"}
    broken = state["lin.weight"].clone()
    broken[0, 0] = torch.nan
    assert not verified({**state, "lin.weight": broken}).ok


def test_the_command_line_takes_a_base(folder, tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    start = transformers.BertForSequenceClassification(config)
    start.save_pretrained("start")
    start.classifier.bias.data += 1
    start.bert.encoder.layer[0].output.dense.bias.data += 1
    start.save_pretrained("other")
    for k in range(3):
        base = transformers.AutoModelForSequenceClassification.from_pretrained("start")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers
            model = peft.get_peft_model(
                base, peft.LoraConfig(r=k + 1, target_modules=["query"], task_type="SEQ_CLS")
            )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(f"runs/run{k}")
    soup, base = "soup.safetensors", ["--base", "start"]
    assert main(["average", "runs", "-o", soup]) == 0  # on the base that they name
    assert main(["average", "runs", "-o", "same.safetensors", *base]) == 0
    assert same_tensors(load_file(soup), load_file("same.safetensors"))
    expected = mix(CheckpointCollection.from_path("runs"), [1 / 3] * 3)
    found = load_file(soup)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert main(["verify", soup, "runs", *base]) == 0
    assert main(["cook", soup, "runs", *base, "-o", "cooked.safetensors"]) == 0
    assert main(["inspect", "runs", *base]) == 0
    capsys.readouterr()
    assert main(["average", "runs", *base, "-o", "start/model.safetensors", "--force"]) == 2
    assert "is one of the checkpoints to be mixed, or part of one" in capsys.readouterr().err
    assert main(["verify", soup, "runs", "--base", "other"]) != 0
    assert "is not the one that the recipe was made with" in capsys.readouterr().err
    Path("start").rename("moved")
    assert main(["verify", soup, "runs"]) != 0
    assert "is not on this machine, and sksoup does not download it" in capsys.readouterr().err
    assert main(["verify", soup, "runs", "--base", "moved"]) == 0
    assert main(["verify", soup, "runs", "--base", "nowhere"]) != 0
    assert "is not a Hugging Face folder" in capsys.readouterr().err


HOSTILE = [
    5, "x", [], True, {}, {"sha256": "0" * 64}, {"without": []}, {"sha256": None, "without": []},
    {"sha256": "0" * 63, "without": []}, {"sha256": "z" * 64, "without": []},
    {"sha256": "0" * 64, "without": "head.weight"}, {"sha256": "0" * 64, "without": [5]},
    {"sha256": "0" * 64, "without": None}, {"sha256": ["0" * 64], "without": []},
    {"sha256": "0" * 64, "without": {"head.weight": 1}},
]  # fmt: skip


def document_of(adapters) -> dict:
    layers = dict.fromkeys(adapters.layout, 0)
    return json.loads(Recipe.record("x", adapters, COEF, layers=layers).to_json())


@pytest.mark.parametrize("value", HOSTILE)
def test_a_base_that_is_none_is_refused(value, adapters):
    document = dict(document_of(adapters), base=value, format_version=1)
    del document["sha256"]
    with pytest.raises(RecipeError, match="is not a complete sksoup recipe"):
        Recipe.from_json(json.dumps(document))


def test_a_changed_base_is_seen(adapters):
    document = document_of(adapters)
    for base in (None, {**document["base"], "sha256": "0" * 64}, {**document["base"], "x": 1}):
        with pytest.raises(RecipeError, match="was changed after it was written"):
            Recipe.from_json(json.dumps({**document, "base": base}))


def test_a_recipe_can_not_leave_the_base_out_of_its_own_hash(folder, adapters):
    """With all names in ``without``, any base would have had the recorded hash."""
    other = CheckpointCollection.from_path(folder, module=other_base())
    recipe = Recipe.record("x", adapters, COEF, layers=dict.fromkeys(adapters.layout, 0))
    nothing = tuple(sorted(adapters.layout))
    empty = next(iter(other.on_one_base().values())).base.content_sha256(nothing)
    for base in (Base(empty, nothing), Base("0" * 64, ("norm.weight",)), Base("0" * 64, ("",))):
        for collection in (adapters, other):
            with pytest.raises(RecipeError, match=r"excludes '.*' from the SHA-256 of its base"):
                dataclasses.replace(recipe, base=base).cook(collection)


def test_a_recipe_of_some_adapters_names_what_they_hold(folder, tmp_path):
    peft_model(3, modules_to_save=None).save_pretrained(str(tmp_path / "plain"))
    both = CheckpointCollection({"a": folder / "a0", "plain": tmp_path / "plain"}, module=build)
    recipe = Recipe.record("x", both, [0.5, 0.5], layers=dict.fromkeys(both.layout, 0))
    assert recipe.base.without == ()
    first = dataclasses.replace(recipe, coef=np.array([[1.0, 0.0]]))
    assert same_tensors(first.cook(both), both["a"])
    copied = copy.copy(both)
    assert same_tensors(recipe.cook(copied), mix(both, [0.5, 0.5]))
    assert first.is_used().tolist() == [True, False]


def test_changed_adapters_are_refused(folder, tmp_path):
    for k in range(2):
        shutil.copytree(folder / f"a{k}", tmp_path / f"a{k}")
    collection = CheckpointCollection.from_path(tmp_path, module=build)
    recipe = Recipe.record("x", collection, [0.5, 0.5], layers=dict.fromkeys(collection.layout, 0))
    config = tmp_path / "a1" / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "lora_alpha": 5}))  # the weights' file is the same
    with pytest.raises(RecipeError, match="'a1' is not the one that the recipe was made of"):
        recipe.cook(CheckpointCollection.from_path(tmp_path, module=build))
    config.write_text(json.dumps({**fields, "lora_dropout": 0.9}))
    recipe.cook(CheckpointCollection.from_path(tmp_path, module=build))
    state = load_file(tmp_path / "a1" / "adapter_model.safetensors")
    save_file(
        {n: v + 1e-3 for n, v in state.items()}, tmp_path / "a1" / "adapter_model.safetensors"
    )
    with pytest.raises(RecipeError, match="'a1' is not the one"):
        recipe.cook(CheckpointCollection.from_path(tmp_path, module=build))
