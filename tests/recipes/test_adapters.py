"""Recipes on adapters find what they find on merged networks; soups are given back as adapters."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    CheckpointError,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    Recipe,
    SoupWarning,
    UniformSoup,
    mix,
)
from sksoup.engine.objective import load_weights
from sksoup.mixing import verification
from sksoup.runtime.cache import Cache

from ..zoo import Net64, Zoo, reads, same_tensors

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from ..adapters import TARGETS, build, peft_model, rows, save_adapters  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::sksoup.SoupWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
ROOT = Path(__file__).parents[2]
SOUPS = {
    "uniform": UniformSoup(),
    "best": BestCheckpoint(batch_size=20),
    "greedy": GreedySoup(batch_size=20),
    "greedy by loss": GreedySoup(batch_size=20, scoring="neg_log_loss", min_improvement=-1.0),
    "learned": LearnedSoup(max_epochs=2, batch_size=20, random_state=0),
    "learned+": LearnedSoup(
        layerwise=True, max_epochs=2, batch_size=20, random_state=0, center="mean",
        clip_deltas=None,
    ),
    "HL": MEHLSoup(model_batch_size=None, max_epochs=2, batch_size=20, random_state=0),
    "MEHL": MEHLSoup(
        model_batch_size=2, max_epochs=2, batch_size=20, random_state=0, center="mean",
        clip_deltas=None,
    ),
    "MEHL+": MEHLSoup(
        layerwise=True, model_batch_size=3, max_epochs=2, batch_size=20, random_state=0,
        normalize=True,
    ),
    "MEHL+ on greedy": MEHLSoup(
        layerwise=True, center="greedy", max_epochs=2, batch_size=20, random_state=0,
        validation_fraction=0.3,
    ),
    "HL sgd": MEHLSoup(optimizer="sgd", lr=0.01, max_epochs=2, random_state=0, accumulate=2),
}  # fmt: skip


def build64() -> nn.Module:
    return build().double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    save_adapters(root, 5)
    return root


@pytest.fixture
def adapters(folder) -> CheckpointCollection:
    return CheckpointCollection.from_path(folder, module=build)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows labeled by a mix, so that soups are better than any one of the adapters."""
    X, y = rows(128)
    network = build()
    models = CheckpointCollection([peft_model(k) for k in range(5)], module=build)
    network.load_state_dict(mix(models, [0.3, 0.3, 0.1, 0.2, 0.1]))
    with torch.no_grad():
        labels = network.eval()(X).argmax(dim=1)
    return X, torch.where(torch.arange(len(y)) % 9 == 0, y, labels)


def logits(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(rows()[0])


def reopened(folder: Path, base: Any = build) -> torch.Tensor:
    """The logits of an adapter as peft opens it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=UserWarning, module="peft.tuners")
        return logits(peft.PeftModel.from_pretrained(base(), str(folder)))


# ---------------------------------------------------------------- the same coefficients


@pytest.mark.parametrize("name", SOUPS)
@pytest.mark.parametrize("base", [build64, build])
def test_fits_on_adapters_are_fits_on_merged_networks(name, base, folder, data):
    adapters = CheckpointCollection.from_path(folder, module=base)
    whole = CheckpointCollection({n: adapters[n] for n in adapters}, module=base)
    ours, theirs = (clone(SOUPS[name]).fit(c, *data) for c in (adapters, whole))
    bound = 1e-5 if base is build64 else 1e-3  # a few steps of float32 beside one another
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=0, atol=bound)
    assert ours.ingredients_ == theirs.ingredients_
    if hasattr(ours, "lr"):
        assert len(ours.ingredients_) > 1  # so that there was something to compare
    assert same_tensors(ours.state_dict(), mix(adapters, ours.coef_, layers=ours.layers_))
    assert ours.recipe_.verify(ours.state_dict(), adapters).ok
    torch.testing.assert_close(
        torch.as_tensor(ours.predict_proba(data[0])),
        torch.as_tensor(theirs.predict_proba(data[0])), rtol=0, atol=10 * bound,
    )  # fmt: skip


def test_an_ensemble_of_adapters(folder, adapters, data):
    whole = CheckpointCollection({n: adapters[n] for n in adapters}, module=build)
    ours, theirs = (CheckpointEnsemble().fit(c, *data) for c in (adapters, whole))
    np.testing.assert_allclose(
        ours.predict_proba(data[0]), theirs.predict_proba(data[0]), rtol=0, atol=1e-6
    )


def with_new_heads(far: float = 1.0) -> CheckpointCollection:
    """Adapters as of runs that each began with a head of their own; one may have diverged."""
    models = []
    for k in range(4):
        model = peft_model(
            0, target_modules=["lin", "conv1d"], rank_pattern={}, lora_alpha=0.1 * (1 + k)
        )
        head = model.get_submodule("base_model.model.head.modules_to_save.default")
        torch.manual_seed(k)
        nn.init.normal_(head.weight, std=0.05)
        if k == 2:
            for name, value in model.named_parameters():
                value.data *= far if "lora_B" in name else 1
        models.append(model)
    return CheckpointCollection(models, module=build)


@pytest.mark.parametrize(
    "soup", [UniformSoup(), GreedySoup(), MEHLSoup(center="mean", clip_deltas=None, max_epochs=1)]
)
def test_new_heads_are_no_reason_to_warn(soup, data):
    """Only they are read whole where factors are searched; they alone would look unrelated."""
    collection = with_new_heads()
    soup = clone(soup).fit(collection, *data)
    assert not [said for said in soup.warnings_ if "fine-tuned from the same" in said]
    assert "good to mix" in " ".join(collection.describe().verdict)
    assert collection.healthy() is collection


def test_a_diverged_adapter_is_warned_of(data):
    soup = GreedySoup().fit(with_new_heads(1e4), *data)
    assert "'checkpoint2'" in " ".join(soup.warnings_)


def test_low_precision(adapters, data):
    """Forward passes in bfloat16: the same search, to the bits that are left."""
    fits = [
        MEHLSoup(max_epochs=2, batch_size=20, random_state=0, precision=precision,
                 delta_dtype=dtype, device="cpu").fit(adapters, *data)
        for precision, dtype in (("fp32", None), ("bf16", None), ("fp32", "bfloat16"))
    ]  # fmt: skip
    for other in fits[1:]:
        assert np.abs(other.coef_ - fits[0].coef_).max() < 0.05
        assert not np.array_equal(other.coef_, fits[0].coef_)
        assert other.recipe_.verify(other.state_dict(), adapters).ok


# ---------------------------------------------------------------- stop and go on


class Stopped(Exception):
    pass


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", ["greedy", "learned+", "MEHL", "MEHL+", "MEHL+ on greedy"])
def test_a_fit_that_was_stopped_goes_on_with_the_same_bits(name, n, adapters, data, tmp_path):
    plain = clone(SOUPS[name]).fit(adapters, *data)
    soup = clone(SOUPS[name]).set_params(memory=tmp_path)
    original, kept = Cache.keep, [0]

    def keep(self, value, *key, everywhere=False):
        original(self, value, *key, everywhere=everywhere)
        kept[0] += 1
        if kept[0] == n:
            raise Stopped

    with patch.object(Cache, "keep", keep), pytest.raises(Stopped):
        soup.fit(adapters, *data)
    soup.fit(adapters, *data)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert same_tensors(soup.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", ["best", "greedy", "learned+", "MEHL", "MEHL+ on greedy"])
def test_a_replay_reads_no_factors(name, adapters, folder, data, tmp_path):
    soup = clone(SOUPS[name]).set_params(memory=tmp_path).fit(adapters, *data)
    again = CheckpointCollection.from_path(folder, module=build)
    # a search reads them by this; the last mix, and a look for NaN, by themselves
    with (
        patch("sksoup.engine.factors.read_stacks", None),
        patch("sksoup.engine.low_rank.read_stacks", None),
    ):
        if hasattr(soup, "lr"):
            with pytest.raises(TypeError):
                clone(soup).set_params(memory=None).fit(again, *data)
        with reads() as opened:
            replay = clone(soup).fit(again, *data)
    assert max(opened.values()) <= 2
    assert not any(vars(replay.counts_).values())
    assert np.array_equal(replay.coef_, soup.coef_)
    assert same_tensors(replay.state_dict(), soup.state_dict())
    other = CheckpointCollection.from_path(folder, module=peft_model(3, lora_alpha=9))
    clone(soup).fit(other, *data)  # the same base, as another object
    changed = build()
    changed.norm.weight.data += 1
    base_changed = clone(soup).fit(CheckpointCollection.from_path(folder, module=changed), *data)
    assert any(vars(base_changed.counts_).values())


IN_JOBS = {  # written here and read there, so that jobs import little
    "greedy": "GreedySoup(batch_size=20, min_improvement=-1.0)",
    "learned+": "LearnedSoup(layerwise=True, max_epochs=2, batch_size=25, random_state=0, "
    "center='mean', clip_deltas=None)",
    "MEHL+": "MEHLSoup(layerwise=True, model_batch_size=2, max_epochs=2, batch_size=20, "
    "center='mean', clip_deltas=None, random_state=0)",
}
JOB = """
import json, os, signal, sys, warnings
from datetime import timedelta
import numpy as np, torch
from torch import distributed
from sksoup import CheckpointCollection, GreedySoup, LearnedSoup, MEHLSoup
from sksoup.mixing import verification
from sksoup.runtime.cache import Cache
from tests.zoo import Net64
warnings.simplefilter("ignore")
torch.set_num_threads(1)
folder, case = sys.argv[1:]
data = np.load(folder + "/rows.npz")
def base():
    torch.manual_seed(0)
    return Net64()
files = CheckpointCollection.from_path(folder + "/adapters", module=base)
X, y, found = data["X"], data["y"], {}
"""
KILLED = """
original, kept = Cache.keep, [0]
def keep(self, value, *key, everywhere=False):
    original(self, value, *key, everywhere=everywhere)
    kept[0] += 1
    if kept[0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Cache.keep = keep
eval(case).set_params(memory=folder + "/memory").fit(files, X, y)
"""
RANK = """
distributed.init_process_group("gloo", timeout=timedelta(seconds=100))
for name, text in json.loads(case).items():
    soup = eval(text)
    found[name] = soup.fit(files, X, y).coef_.tolist()
    if hasattr(soup, "shard"):
        soup.set_params(shard="auto").fit(files, X, y)
        found[name + " sharded"] = soup.coef_.tolist()
with open(f"{folder}/found{distributed.get_rank()}.json", "w") as file:
    file.write(json.dumps(found))
distributed.barrier()
os._exit(0)  # gloo's threads abort now and then where they are to end
"""


def base64() -> Net64:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net64()


@pytest.fixture
def job(tmp_path, zoo: Zoo) -> tuple[Path, CheckpointCollection]:
    """A folder with adapters of a small network in float64, and rows."""
    for k in range(4):
        model = peft_model(
            k, base64(), target_modules=["hidden"], rank_pattern={}, alpha_pattern={}, bias="none"
        )
        model.save_pretrained(str(tmp_path / "adapters" / f"a{k}"))
    np.savez(tmp_path / "rows.npz", X=zoo.X.astype(np.float64), y=zoo.y)
    return tmp_path, CheckpointCollection.from_path(tmp_path / "adapters", module=base64)


def test_killed_and_started_again(job, zoo: Zoo):
    folder, files = job
    X, text = zoo.X.astype(np.float64), IN_JOBS["MEHL+"]
    run = [sys.executable, "-c", JOB + KILLED, str(folder), text]
    killed = subprocess.run(run, cwd=ROOT, timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    # what was kept is found by another process, on another object of the same base
    soup = eval(text).set_params(memory=folder / "memory").fit(files, X, zoo.y)
    plain = eval(text).fit(files, X, zoo.y)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert same_tensors(soup.state_dict(), plain.state_dict())
    assert 0 < soup.counts_.n_forward < plain.counts_.n_forward


def test_two_ranks_find_what_one_process_finds(job, zoo: Zoo):
    folder, files = job
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", JOB + RANK, str(folder), json.dumps(IN_JOBS)],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=150)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]  # the same bits on every rank
    for name, coef in found[0].items():
        alone = eval(IN_JOBS[name.removesuffix(" sharded")])
        alone.fit(files, zoo.X.astype(np.float64), zoo.y)
        assert len(alone.ingredients_) > 1
        np.testing.assert_allclose(np.array(coef), alone.coef_, rtol=0, atol=1e-8)


# ---------------------------------------------------------------- as one adapter


MIXES: dict[str, list[dict[str, Any]]] = {
    "all kinds": [{}, {}, {}, {}],
    **{
        f"only {target}": [{"target_modules": [target], "rank_pattern": {}, "r": r, "bias": "none"}
                           for r in (1, 3)]
        for target in TARGETS
    },
    "different targets": [
        {"target_modules": ["lin"], "rank_pattern": {}}, {"target_modules": ["emb", "conv2"]},
    ],
    "biases": [{"bias": "all"}, {"bias": "lora_only"}, {"bias": "none"}],
    "biases of targets only": [{"bias": "lora_only", "target_modules": ["lin"]},
                               {"bias": "none", "target_modules": ["lin"]}],
    "no head": [{"modules_to_save": None, "bias": "none"}] * 2,
    "some heads": [{"modules_to_save": None, "bias": "none"}, {"bias": "none"}],
    "heads and norms": [{"modules_to_save": ["head", "norm"], "bias": "none"}, {"bias": "none"}],
    "a whole embedding": [{"modules_to_save": ["emb", "head"], "target_modules": ["lin"]}, {}],
    "rsLoRA": [{"use_rslora": True}, {"use_rslora": False, "bias": "none"}],
    "ranks above the sizes": [{"r": 16, "target_modules": ["lin", "conv", "conv1d"]}] * 3,
}  # fmt: skip


def by_hand(collection: CheckpointCollection) -> UniformSoup:
    """A soup with a coefficient of its own for each adapter in each tensor."""
    soup = UniformSoup().fit(collection, *rows())
    coef = np.random.default_rng(0).normal(size=(len(collection.layout), len(collection)))
    soup.coef_ = coef / coef.sum(axis=1, keepdims=True).clip(0.5)
    soup.coef_[:, 0] += 1 - soup.coef_.sum(axis=1)
    soup.layers_ = {name: k for k, name in enumerate(collection.layout)}
    load_weights(soup.module_, mix(collection, soup.coef_, layers=soup.layers_))
    soup.recipe_ = Recipe.record("by hand", collection, soup.coef_, layers=soup.layers_)
    return soup


@pytest.mark.parametrize("what", MIXES)
def test_a_saved_adapter_has_the_logits_of_the_soup(what, tmp_path):
    models = [peft_model(k, **one) for k, one in enumerate(MIXES[what])]
    collection = CheckpointCollection(models, module=build)
    soup = by_hand(collection)
    errors = soup.save_adapter(tmp_path / "soup")
    assert set(errors.values()) <= {0.0}
    expected = logits(soup.module_)
    torch.testing.assert_close(reopened(tmp_path / "soup"), expected, rtol=1e-5, atol=1e-5)
    # and is itself an adapter that can be mixed, and a recipe
    again = CheckpointCollection([tmp_path / "soup"], module=build)
    network = build()
    network.load_state_dict(again["soup"])
    torch.testing.assert_close(logits(network), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "soup" / "adapter_config.json").read_text())
    targets = {n for one in collection.on_one_base().values() for n in one.ranks}
    assert config["fan_in_fan_out"] is ("conv1d.weight" in targets)
    heads = {"no head": None, "heads and norms": ["head", "norm"],
             "a whole embedding": ["emb", "head"]}  # fmt: skip
    assert config["modules_to_save"] == heads.get(what, ["head"])
    recipe = Recipe.load(tmp_path / "soup" / "recipe.json")
    assert same_tensors(recipe.cook(collection), soup.state_dict())
    assert "This adapter equals the soup exactly" in (tmp_path / "soup" / "README.md").read_text()


def test_ranks_add_up_and_stay_below_the_size(tmp_path):
    fields = {"target_modules": ["lin"], "bias": "none", "modules_to_save": None}
    models = [peft_model(k, r=r, rank_pattern={}, **fields) for k, r in enumerate((2, 3))]
    soup = UniformSoup().fit(CheckpointCollection(models, module=build), *rows())
    soup.save_adapter(tmp_path / "sum")
    stored = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    assert stored["base_model.model.lin.lora_A.weight"].shape == (5, 8)
    models = [peft_model(k, r=7, rank_pattern={}, **fields) for k in range(3)]
    soup = UniformSoup().fit(CheckpointCollection(models, module=build), *rows())
    assert soup.save_adapter(tmp_path / "most")["lin.weight"] == 0.0
    stored = load_file(tmp_path / "most" / "adapter_model.safetensors")
    assert stored["base_model.model.lin.lora_A.weight"].shape == (8, 8)
    torch.testing.assert_close(
        reopened(tmp_path / "most"), logits(soup.module_), rtol=1e-5, atol=1e-5
    )


class Ambiguous(nn.Module):
    """Modules whose names end in others' names, with a dot before and without one."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.mylin = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.x = nn.ModuleDict({"lin": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
        self.head, self.overhead = nn.Linear(8, 3), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.mylin(torch.tanh(self.lin(self.emb(x).mean(dim=1)))))
        return self.head(self.overhead(self.x["head"](torch.tanh(self.x["lin"](h)))))


def ambiguous() -> Ambiguous:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Ambiguous()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"lin", "modules_to_save": None},
        {"target_modules": r"x\.lin", "modules_to_save": None},
        {"target_modules": r"(lin|x\.lin)", "modules_to_save": None, "rank_pattern": {"^lin": 5}},
        {"target_modules": r"(lin|x\.lin|mylin)", "modules_to_save": None,
         "rank_pattern": {"^lin": 3}},
        {"target_modules": r"(lin|x\.head)", "modules_to_save": ["overhead"]},
        {"target_modules": r"mylin", "modules_to_save": ["x.head"]},
        {"target_modules": r"(lin|mylin)", "modules_to_save": None, "bias": "lora_only"},
    ],
)  # fmt: skip
def test_names_that_end_in_others_are_told_apart(fields, tmp_path):
    models = [
        peft_model(k, ambiguous(), **{"rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
                   | {"r": 2 + k} | fields)
        for k in range(2)
    ]  # fmt: skip
    soup = UniformSoup().fit(CheckpointCollection(models, module=ambiguous), *rows())
    soup.save_adapter(tmp_path / "soup")
    torch.testing.assert_close(
        reopened(tmp_path / "soup", ambiguous), logits(soup.module_), rtol=1e-5, atol=1e-5
    )


class Attention(nn.Module):
    """Modules within modules, with biases of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.att, self.rnn = nn.MultiheadAttention(8, 2, batch_first=True), nn.GRU(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(self.emb(x))
        return self.head(self.rnn(self.att(h, h, h)[0])[0].mean(dim=1))


def attention() -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention()


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("saved", [None, ["head"], ["head.2"], ["att"], ["rnn", "att"]])
def test_modules_within_modules_are_saved_as_peft_wraps_them(saved, bias, tmp_path):
    fields = {"target_modules": ["lin"], "rank_pattern": {}, "alpha_pattern": {}}
    models = [
        peft_model(k, attention(), **fields, modules_to_save=saved, bias=bias) for k in range(2)
    ]
    for collection in (
        CheckpointCollection(models, module=attention),
        CheckpointCollection(models[:1]),
    ):
        soup = UniformSoup().fit(collection, *rows())
        folder = tmp_path / f"of{len(collection)}"
        soup.save_adapter(folder)
        torch.testing.assert_close(
            reopened(folder, attention), logits(soup.module_), rtol=1e-5, atol=1e-5
        )


# ---------------------------------------------------------------- of less rank


@pytest.fixture(scope="module")
def fitted(folder) -> MEHLSoup:
    collection = CheckpointCollection.from_path(folder, module=build)
    soup = MEHLSoup(layerwise=True, max_epochs=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return soup.fit(collection, *rows())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_errors_of_a_rank_are_those_of_a_dense_svd(rank, fitted, tmp_path):
    errors = fitted.save_adapter(tmp_path / "soup", rank=rank)
    base, state = build().state_dict(), fitted.state_dict()
    again = CheckpointCollection([tmp_path / "soup"], module=build)["soup"]
    assert set(errors) == {
        n for n in state if n.endswith("weight") and n[:4] not in ("norm", "head")
    }
    for name, error in errors.items():
        delta = (state[name].double() - base[name].double()).flatten(1)
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        left_out = torch.linalg.vector_norm(s[rank:]) / torch.linalg.vector_norm(s)
        assert error == pytest.approx(float(left_out), abs=1e-5)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        found = (again[name].double() - base[name].double()).flatten(1)
        torch.testing.assert_close(found, best, rtol=0, atol=1e-5 * float(s[0]) + 1e-6)
    card = (tmp_path / "soup" / "README.md").read_text()
    worst = max(errors, key=errors.get)
    assert f"| `{worst}` | {errors[worst]:.3g} |" in card
    assert max(errors.values()) > 0.01
    reopened(tmp_path / "soup")


def test_another_score_is_warned_of(fitted, data, tmp_path):
    X, y = data
    full = fitted.score(X, y)
    near = fitted.save_adapter(tmp_path / "near", rank=1)
    small = copy.copy(fitted)
    small.module_ = build()
    small.module_.load_state_dict(CheckpointCollection([tmp_path / "near"], module=build)["near"])
    less = small.score(X, y)
    assert less != full
    match = f"adapter of this rank scores {less:.4f}, the soup {full:.4f}"
    with pytest.warns(SoupWarning, match=match) as caught:
        assert fitted.save_adapter(tmp_path / "warned", rank=1, X=X, y=y) == near
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", SoupWarning)
        fitted.save_adapter(tmp_path / "whole", X=X, y=y)
        fitted.save_adapter(tmp_path / "high", rank=60, X=X, y=y)
    assert fitted.score(X, y) == full


def test_what_no_adapter_can_hold_is_refused_by_name(folder, adapters, fitted, data, tmp_path):
    whole = dict(adapters["a1"])
    beside = CheckpointCollection({"a": folder / "a0", "full": whole}, module=build)
    soup = UniformSoup().fit(beside, *data)
    with pytest.raises(CheckpointError, match="its ingredient 'full' is a whole model"):
        soup.save_adapter(tmp_path / "no")
    # one that has no part in it does no harm
    alone = copy.copy(soup)
    alone.coef_ = np.array([1.0, 0.0])
    assert alone.save_adapter(tmp_path / "alone")
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="rank == "):
            fitted.save_adapter(tmp_path / "no", rank=wrong)
    for wrong in (2.5, "8"):
        with pytest.raises(TypeError, match="rank must be an instance of"):
            fitted.save_adapter(tmp_path / "no", rank=wrong)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        fitted.save_adapter(tmp_path / "there")
    assert not (tmp_path / "no").exists()


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.bn, self.head = nn.Embedding(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bn(self.emb(x).mean(dim=1)))


def with_batch_norm() -> WithBatchNorm:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WithBatchNorm()


def test_re_estimated_statistics_are_refused_and_averaged_ones_are_not(data, tmp_path):
    models = [
        peft_model(k, with_batch_norm(), target_modules=["emb", "head"], rank_pattern={},
                   alpha_pattern={}, bias="none", modules_to_save=["bn"])
        for k in range(2)
    ]  # fmt: skip
    collection = CheckpointCollection(models, module=with_batch_norm)
    soup = UniformSoup(batch_norm="recalibrate").fit(collection, *data)
    with pytest.raises(CheckpointError, match=r"'bn.running_mean' was re-estimated from data"):
        soup.save_adapter(tmp_path / "no")
    soup = UniformSoup().fit(collection, *data)
    soup.save_adapter(tmp_path / "soup")
    torch.testing.assert_close(
        reopened(tmp_path / "soup", with_batch_norm), logits(soup.module_), rtol=1e-5, atol=1e-5
    )


def test_peft_is_asked_for_only_to_write_adapters(fitted, folder, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"save_adapter needs peft.*pip install 'sksoup\[peft\]'"):
        fitted.save_adapter(tmp_path / "no")
    collection = CheckpointCollection.from_path(folder, module=build)
    soup = GreedySoup().fit(collection, *data)
    soup.save(tmp_path / "soup.safetensors")
    assert Recipe.load(tmp_path / "soup.safetensors").verify(soup.state_dict(), collection).ok
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------- as a whole model


@pytest.mark.filterwarnings("default")  # of transformers
def test_a_whole_model_of_transformers_with_the_head_of_the_adapters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained("start")
    for k in range(3):
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            "start", num_labels=3
        )
        fields = {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}
        model = peft.get_peft_model(base, peft.LoraConfig(r=k + 1, **fields))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(f"runs/run{k}")
    collection = CheckpointCollection.from_path("runs")
    X, y = rows()
    soup = LearnedSoup(max_epochs=2, random_state=0).fit(collection, X.numpy(), y.numpy())
    soup.save_pretrained("whole")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("whole")
    assert type(loaded).__name__ == "BertForSequenceClassification"
    assert loaded.config.num_labels == 3
    with torch.no_grad():
        expected = soup.module_.eval()(X).logits
        assert torch.equal(loaded.eval()(X).logits, expected)
    assert Recipe.load("whole").verify("whole", collection).ok
    assert not list(Path("whole").glob("adapter_*"))
    # and is a checkpoint again
    again = CheckpointCollection(["whole"])
    assert same_tensors(again["whole"], {n: soup.state_dict()[n] for n in again.layout})
    # on a base in memory, the configuration is that of the module
    base = transformers.AutoModelForSequenceClassification.from_pretrained("start", num_labels=3)
    held = CheckpointCollection.from_path("runs", module=base)
    UniformSoup().fit(held, X.numpy(), y.numpy()).save_pretrained("of-module")
    assert json.loads(Path("of-module/config.json").read_text())["model_type"] == "bert"
    # as one adapter, on the same base
    soup.save_adapter("one")
    base = transformers.AutoModelForSequenceClassification.from_pretrained("start", num_labels=3)
    opened = peft.PeftModel.from_pretrained(base, "one")
    assert opened.peft_config["default"].base_model_name_or_path == "start"
    assert opened.peft_config["default"].task_type == "SEQ_CLS"
    with torch.no_grad():
        torch.testing.assert_close(opened.eval()(X).logits, expected, rtol=1e-5, atol=1e-5)
    found = CheckpointCollection(["one"])["one"]  # on the base that it names
    for name, value in soup.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_verify_notices_a_base_that_changes(folder, data, tmp_path, monkeypatch):
    """Its size, time and inode may be put back, its change time can't."""
    base = tmp_path / "base.safetensors"
    save_file(build().state_dict(), base)
    adapters = CheckpointCollection.from_path(folder, module=build)
    stamps = verification._stamps(adapters)
    assert all(str(adapters.path(name)) in stamps for name in adapters)
    fake = SimpleNamespace(base=SimpleNamespace(path=base))
    monkeypatch.setattr(CheckpointCollection, "adapters", lambda self, names: {"a": fake})
    before = verification._stamps(adapters)[str(base)]
    base.write_bytes(base.read_bytes())
    assert verification._stamps(adapters)[str(base)] != before
