"""Digests of values: equal for equal values, different for all others."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import make_scorer
from torch import nn

from sksoup.runtime.fingerprint import encode_module, fingerprint

from ..zoo import Net

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(PLAIN, PLAIN)
def test_fingerprints_tell_values_apart(a, b):
    assert fingerprint(a) == fingerprint(a)
    assert (fingerprint(a) == fingerprint(b)) == (repr(a) == repr(b) or str_of(a) == str_of(b))


def str_of(value) -> str:
    """With dicts in one order, as they have none."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k!r}:{str_of(value[k])}" for k in sorted(value, key=repr)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(str_of, value)) + "]"
    return repr(value)


def make_scaled(factor):
    return lambda module, X: factor * module(X)


def test_fingerprints_of_what_a_soup_is_given():
    def one(module, X):
        return module(X)

    def two(module, X):
        return module(X) * 2

    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(make_scaled(2)) == fingerprint(make_scaled(2)) != fingerprint(make_scaled(3))
    assert fingerprint(functools.partial(one, 1)) != fingerprint(functools.partial(one, 2))
    assert fingerprint({"a", "b", "c"}) == fingerprint({"c", "b", "a"}) != fingerprint({"a"})
    assert fingerprint(torch.ones(3)) != fingerprint(torch.ones(3, dtype=torch.bfloat16))
    assert fingerprint(torch.ones(2, 3)) != fingerprint(torch.ones(3, 2))
    assert fingerprint(torch.ones(0)) != fingerprint(torch.ones(()))
    assert fingerprint(np.arange(6).reshape(2, 3).T) != fingerprint(np.arange(6).reshape(3, 2))
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint(1) != fingerprint(True) != fingerprint(1.0)
    loss, other = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)
    assert fingerprint(loss) != fingerprint(other)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
    assert fingerprint(weighted) != fingerprint(nn.CrossEntropyLoss(weight=torch.ones(2)))
    assert fingerprint(Net) != fingerprint(nn.Linear)
    assert fingerprint(nn.CrossEntropyLoss().forward) != fingerprint(other.forward)


def test_code_that_changed_is_noticed():
    """That of a module, and of an object that is called."""

    def edited(name, base, body):
        names: dict = {"__name__": "notebook"}
        exec(f"def {name}(self, x): return {body}", names)
        made = type("Mine", (base,), {name: names[name], "__module__": "notebook"})
        sys.modules["notebook"].Mine = made
        return fingerprint(made())

    sys.modules["notebook"] = types.ModuleType("notebook")
    try:
        for name, base in (("forward", nn.Module), ("__call__", object)):
            digests = [edited(name, base, body) for body in ("x", "2 * x", "x")]
            assert digests[0] == digests[2] != digests[1]
    finally:
        del sys.modules["notebook"]


@pytest.mark.filterwarnings("ignore:Sparse CS:UserWarning")  # of torch
def test_data_that_a_function_reads_by_name_are_part_of_it():
    def of(**values):
        names: dict = {"__name__": "notebook", "torch": torch, **values}
        code = "def forward(module, X):\n    return [module(x * SCALE) for x in X], other(X)"
        exec(code, names)
        return fingerprint(names["forward"])

    array, tensor, nested = np.arange(3), torch.arange(3), {"mean": [1.0, (2, None)], "x": {1}}
    digests = [of(SCALE=value) for value in (1, 2, 1.0, "1", array, tensor, nested)]
    assert len(set(digests)) == len(digests)
    assert of(SCALE=1) == of(SCALE=1, unused=3, X=4)
    assert of(SCALE=array) != of(SCALE=array + 1)
    assert of(SCALE=nested) != of(SCALE={**nested, "x": {2}})
    for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):  # as graphs have them
        sparse = [torch.eye(4).mul(k).to_sparse(layout=layout) for k in (1, 2, 1)]
        found = [of(SCALE=value) for value in sparse]
        assert found[0] == found[2] != found[1]
        assert found[0] != of(SCALE=torch.eye(4))
        assert fingerprint(sparse[0]) == fingerprint(sparse[2]) != fingerprint(sparse[1])
    within: list = [1]
    within.append(within)
    # functions and other objects are not part of it, nor is what can't be told from another
    others = [of(SCALE=value) for value in (len, np, object(), within, threading.Lock(), [print],
                                           torch.ones(2, device="meta"))]  # fmt: skip
    assert len(set(others)) == 1


def test_a_metric_whose_code_changed_is_noticed():
    def metric(body):
        names: dict = {"__name__": "notebook"}
        exec(f"def metric(y, predicted): return {body}", names)
        return names["metric"]

    first, second = metric("(y == predicted).mean()"), metric("(y != predicted).mean()")
    sys.modules["notebook"] = types.ModuleType("notebook")
    try:
        digests = []
        for function in (first, second, first):
            sys.modules["notebook"].metric = function
            digests.append(fingerprint(make_scorer(function)))
    finally:
        del sys.modules["notebook"]
    assert digests[0] == digests[2] != digests[1]


def test_a_function_that_encloses_itself_is_told_from_another():
    """As decorators of transformers leave them: the wrapped forward encloses the wrapper."""

    def wrapped(constant):
        def forward(x):
            return wrapper if x is None else x + constant

        def wrapper(x):
            return forward(x)

        return wrapper

    assert fingerprint(wrapped(1)) == fingerprint(wrapped(1))
    assert fingerprint(wrapped(1)) != fingerprint(wrapped(2))


class Scaled(nn.Module):
    """With settings in private attributes, some of which do not pickle or lead back to itself."""

    def __init__(self, scale=1.0, names=("a", "b", "c")):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self._scale, self.__hidden, self._lock = scale, scale, threading.Lock()
        self._kept = Kept(set(names))
        self._parent = weakref.ref(self)
        self._linear, self._call = [self.fc], self.forward
        self.others = [self]

    def forward(self, x):
        return self.fc(x) * self._scale


class Kept:
    def __init__(self, names):
        self.names = names


def test_private_settings_of_the_users_modules_count():
    """Once a result was taken from memory= for a module with another factor."""
    digests = [sha(Scaled(*given)) for given in [(), (), (2.0,), (1.0, ("a", "b"))]]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    inner = [sha(nn.Sequential(Scaled(scale), nn.ReLU())) for scale in (1.0, 1.0, 2.0)]
    assert inner[0] == inner[1] != inner[2]


def sha(module):
    return fingerprint(list(encode_module(module)))


MODULES = """
import torch
from sksoup.runtime.fingerprint import encode_module, fingerprint
from tests.runtime.test_fingerprint import Scaled

def sha(module):
    return fingerprint(list(encode_module(module)))

print(sha(Scaled()), sha(torch.nn.Transformer(8, 2, 1, 1, 8)))
"""
MODELS = """
import transformers as t
small = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=16)
print(sha(t.BertForSequenceClassification(t.BertConfig(**small))))
print(sha(t.LlamaForCausalLM(t.LlamaConfig(**small))))
print(sha(t.GPT2LMHeadModel(t.GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2))))
print(sha(t.T5ForConditionalGeneration(t.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8,
                                                  num_layers=1, num_heads=2))))
"""


@pytest.mark.parametrize("script", [MODULES, MODULES + MODELS], ids=["torch", "transformers"])
def test_a_module_has_the_same_digest_in_every_process(script):
    if "transformers" in script:
        pytest.importorskip("transformers")
    found = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    ]  # fmt: skip
    assert found[0] == found[1] != ""
