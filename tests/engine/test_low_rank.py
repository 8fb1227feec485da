"""The search in factors is the search in whole deltas: combine, project, lengths, memory."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sksoup import CheckpointCollection, LearnedSoup, MEHLSoup
from sksoup.engine.center import Anchor, centered, measure
from sksoup.engine.deltas import ModelBatch
from sksoup.engine.factors import Stack, squared_lengths
from sksoup.engine.low_rank import LowRankBatch
from sksoup.mixing.layers import group_layers
from sksoup.mixing.mix import accumulate
from sksoup.runtime.live_tensors import LiveTensors

pytest.importorskip("peft")

from ..adapters import build, peft_model, rows, save_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*fine-tuned from the same")


class Normed(nn.Module):
    """Layers of every kind, with BatchNorm's buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.body(x))


def build_normed() -> Normed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Normed()


TARGETS = ["body.emb", "body.lin", "body.conv1d", "body.conv", "body.conv2"]
configs = st.fixed_dictionaries(
    {
        "r": st.integers(1, 6),
        "lora_alpha": st.integers(1, 9),
        "target_modules": st.lists(
            st.sampled_from(TARGETS), min_size=1, max_size=5, unique=True
        ),
        "use_rslora": st.booleans(),
        "rank_pattern": st.sampled_from([{}, {"lin": 7}, {"conv.?": 1, "emb": 4}]),
        "alpha_pattern": st.sampled_from([{}, {"body.lin": 0.5}, {"conv1d|emb": 12}]),
        "bias": st.sampled_from(["none", "none", "all", "lora_only"]),
        "modules_to_save": st.sampled_from([None, None, ["head"], ["body.emb"], ["bn", "head"]]),
    }
)  # fmt: skip
LAYERWISE = [False, True, lambda name: name.split(".")[1]]


@st.composite
def cases(draw):
    """Adapters in memory; a center; coefficients; how layers are grouped; b."""
    fields = draw(st.lists(configs, min_size=2, max_size=4))
    models = []
    for k, one in enumerate(fields):
        whole = one["modules_to_save"]
        if whole and whole[0] in one["target_modules"]:
            one = {**one, "modules_to_save": None}
        models.append(peft_model(k, build_normed(), **one))
    n = len(models)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    kind = draw(st.sampled_from(["mean", "one", "some", "random"]))
    weights = {
        "mean": np.ones(n),
        "one": np.eye(n)[draw(st.integers(0, n - 1))],
        "some": np.array([1.0] * (n - 1) + [0.0]),
        "random": rng.normal(size=n),
    }[kind]
    if abs(weights.sum()) < 0.3:
        weights = weights + 1
    return SimpleNamespace(
        models=models,
        anchor=Anchor(weights, clips=draw(st.booleans())),
        layerwise=draw(st.sampled_from(LAYERWISE)),
        b=draw(st.integers(1, n)),
        rng=rng,
    )


def problem_of(checkpoints: CheckpointCollection, layerwise: Any) -> SimpleNamespace:
    module = checkpoints.build_module().eval()
    layers = group_layers(module, checkpoints.layout, layerwise)
    return SimpleNamespace(
        checkpoints=checkpoints, module=module, layers=layers,
        objective=SimpleNamespace(module=module),
    )  # fmt: skip


def found_by(kind: type, checkpoints: CheckpointCollection, case: Any) -> dict[str, Any] | None:
    """What two model batches, one after the other, compute."""
    problem = problem_of(checkpoints, case.layerwise)
    rng = np.random.default_rng(5)
    found: dict[str, Any] = {}
    with centered(problem, case.anchor) as center:
        if center is None:
            return None
        found["factors"] = torch.from_numpy(center.factors)
        args = (center, torch.float32)
        batch = kind(*args) if kind is LowRankBatch else kind(center, case.b, torch.float32)
        names = list(checkpoints.names)
        n_rows = problem.layers.n_searched
        for start in (0, len(names) - case.b):
            batch.load(names[start : start + case.b])
            coef = torch.from_numpy(rng.normal(size=(case.b, n_rows)))
            batch.combine(coef)
            state = problem.module.state_dict()
            found[f"{start} weights"] = {n: state[n].clone() for n in sorted(state)}
            gradient = {
                n: torch.as_tensor(rng.normal(size=tuple(p.shape)), dtype=torch.float32)
                for n, p in sorted(problem.module.named_parameters())
            }
            for name, parameter in problem.module.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(gradient[name])
            found[f"{start} projected"] = batch.project()
            found[f"{start} lengths"] = batch.norms()
            batch.commit(coef)
            again = torch.zeros_like(coef)
            batch.combine(again)  # the next iteration starts where this one ended
            state = problem.module.state_dict()
            found[f"{start} committed"] = {n: state[n].clone() for n in sorted(state)}
        batch.release()
    return found


@settings(max_examples=40)
@given(cases())
def test_factors_give_what_whole_deltas_do(case):
    """Over ranks, scales, patterns, transposes, heads and biases held whole, centers and b < K."""
    adapters = CheckpointCollection(case.models, module=build_normed)
    assert adapters.on_one_base()
    whole = CheckpointCollection({n: adapters[n] for n in adapters}, module=build_normed)
    assert not whole.on_one_base()
    fast, dense = (
        found_by(kind, checkpoints, case)
        for kind, checkpoints in ((LowRankBatch, adapters), (ModelBatch, whole))
    )
    assert fast is not None
    assert dense is not None
    for what, expected in dense.items():
        found = fast[what]
        if isinstance(expected, dict):
            for name, value in expected.items():
                torch.testing.assert_close(
                    found[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
        else:
            size = float(expected.abs().max())
            torch.testing.assert_close(
                found, expected.to(found), rtol=1e-4, atol=1e-5 * size + 1e-6
            )


def test_what_a_center_is_rounded_by_is_no_delta():
    """A head that one adapter alone has: the mean of the others' is theirs, but for rounding."""
    saved = [None, None, None, ["head"]]
    models = [
        peft_model(k, build_normed(), r=1, target_modules=["emb"], bias="none", modules_to_save=one)
        for k, one in enumerate(saved)
    ]
    adapters = CheckpointCollection(models, module=build_normed)
    problem = problem_of(adapters, True)
    rows = [problem.layers.rows[f"body.head.{name}"] for name in ("weight", "bias")]
    with centered(problem, Anchor(np.array([1.0, 1.0, 1.0, 0.0]), clips=False)) as center:
        batch = LowRankBatch(center, torch.float32)
        batch.load(adapters.names)
        lengths = batch.norms()[:, rows]
        assert (lengths[:3] == 1).all()  # of nothing
        assert ((lengths[3] > 0.01) & (lengths[3] != 1)).all()
        batch.release()


@settings(max_examples=25)
@given(cases())
def test_lengths_from_factors_are_those_of_whole_deltas(case):
    """`measure` on factors, against whole tensors, and against float64 written out."""
    adapters = CheckpointCollection(case.models, module=build_normed)
    whole = CheckpointCollection({n: adapters[n] for n in adapters}, module=build_normed)
    layers = group_layers(build_normed(), adapters.layout, case.layerwise)
    names = [n for n, info in adapters.layout.items() if info.is_floating]
    rows_of = dict.fromkeys(adapters.layout, 0)
    found = []
    for checkpoints in (adapters, whole):
        point, _ = accumulate(checkpoints, case.anchor.q[None], rows_of, checkpoints.layout)
        found.append(measure(checkpoints, point, case.anchor.q, names, layers))
    (fast, differing), (dense, differ) = found
    np.testing.assert_allclose(fast, dense, rtol=1e-4, atol=1e-4)
    assert differing >= differ
    if case.layerwise is True:
        states = [adapters[n] for n in adapters]
        for name in ("body.lin.weight", "body.emb.weight", "body.conv2.weight"):
            w = torch.stack([state[name].double() for state in states]).flatten(1)
            delta = w - torch.as_tensor(case.anchor.q) @ w
            expected = torch.linalg.vector_norm(delta, dim=1).numpy()
            np.testing.assert_allclose(fast[:, layers.rows[name]], expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_at_the_center_has_length_zero_and_a_norm_of_one():
    checkpoints = CheckpointCollection([peft_model(k) for k in range(3)], module=build)
    problem = problem_of(checkpoints, True)
    with centered(problem, Anchor(np.eye(3)[1], clips=False)) as center:
        batch = LowRankBatch(center, torch.float32)
        batch.load(checkpoints.names)
        norms = batch.norms()
        lin = problem.layers.rows["lin.weight"]
        assert norms[1].tolist() == [1.0] * problem.layers.n_searched
        assert norms[0, lin] > 1
        batch.release()


def test_what_is_only_rounding_has_length_zero():
    """Copies of one adapter are all at their mean."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator) for size in ((30, 3), (3, 20)))
    stack = Stack(left.repeat(1, 3), right.repeat(3, 1), torch.arange(3).repeat_interleave(3))
    for q in ([1 / 3] * 3, [0.7, 0.2, 0.1], [2.3, -0.9, -0.4]):
        assert squared_lengths(stack, np.array(q)).tolist() == [0.0] * 3
    assert (squared_lengths(stack, np.array([0.5, 0.2, 0.1])) > 0).all()


def test_narrow_factors_are_within_their_rounding():
    """Both factors are rounded to 8 bits: a product is off by 2^-7 of its terms at most."""
    checkpoints = CheckpointCollection([peft_model(k) for k in range(4)], module=build)
    problem = problem_of(checkpoints, False)
    coef = torch.tensor([[0.6], [-0.3], [0.2], [0.4]], dtype=torch.float64)
    with centered(problem, Anchor.mean(4)) as center:
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            batch = LowRankBatch(center, dtype)
            assert {stack.left.dtype for stack in batch._stacks} == {dtype}
            batch.load(checkpoints.names)
            batch.combine(coef)
            weights = {s.name: center.flat.weights[s.where].clone() for s in batch._segments}
            center.flat.grad.copy_(torch.linspace(-1, 1, len(center.flat.grad)))
            found[dtype] = weights, batch.project(), batch.norms()
            terms = {
                s.name: (stack.left.float().abs() @ stack.right.float().abs()).flatten()
                for s, stack in zip(batch._segments, batch._stacks, strict=True)
            }
            batch.release()
    (w, g, n), (w16, g16, n16) = found[torch.float32], found[torch.bfloat16]
    for name, exact in w.items():
        off = (w16[name] - exact).abs()
        assert off.max() > 0
        assert (off <= 2**-7 * terms[name] * coef.abs().max() * 1.1 + 1e-6).all()
    assert ((g16 - g).abs() <= 0.02 * n * math.sqrt(len(center.flat.grad))).all()
    torch.testing.assert_close(n16, n, rtol=2**-7, atol=0)


class Wide(nn.Module):
    """A network whose weights are large beside its adapters, and no layer large beside them."""

    def __init__(self, size: int = 96, depth: int = 8) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, size), nn.Linear(size, 3)
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.head(h)


def wide() -> Wide:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Wide()


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")
    fields = {"rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    for k in range(12):
        model = peft_model(k, wide(), r=2, target_modules=r"layers\..*", **fields)
        model.save_pretrained(str(root / f"a{k}"))
    return root


def wide_rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 4)).astype(np.float32), np.arange(40) % 3


@pytest.mark.parametrize("center", ["mean", "best", "greedy"])
def test_a_search_over_all_adapters_holds_no_block_of_deltas(center, wide_folder):
    """Beside module and gradient at most two models and the factors, heads as whole deltas."""
    collection = CheckpointCollection.from_path(wide_folder, module=wide)
    X, y = wide_rows()
    nbytes = collection.nbytes
    factors = 4 * sum(one.n_numbers for one in collection.on_one_base().values())
    ignored = list(collection.held_tensors())
    soup = MEHLSoup(
        layerwise=True, model_batch_size=None, max_epochs=2, batch_size=20, center=center,
        random_state=0,
    )  # fmt: skip
    in_search = []
    original = LowRankBatch.combine

    def combine(self, coef):
        in_search.append(live.now)
        original(self, coef)

    with patch.object(LowRankBatch, "combine", combine), LiveTensors(ignored) as live:
        soup.fit(collection, X, y)
    assert soup.coef_.shape == (18 + 2, 12)
    product = 3 * 4 * 96 * 96  # of one layer, in float64 and rounded
    beside = live.peak - 2 * nbytes
    assert beside <= 2 * nbytes + factors + product
    assert beside < 12 * nbytes / 3  # deltas alone
    # in the search itself, beside module and gradient: the base and the factors
    assert max(in_search) <= 3 * nbytes + factors + 20_000  # and rows, and coefficients


def test_too_small_a_memory_is_refused_before_anything_is_read(wide_folder):
    collection = CheckpointCollection.from_path(wide_folder, module=wide)
    X, y = wide_rows()
    factors = 4 * sum(one.n_numbers for one in collection.on_one_base().values())
    needed = collection.nbytes + factors
    for kind in (MEHLSoup, LearnedSoup):
        with pytest.raises(ValueError, match="is too small for a search over adapters"):
            kind(memory_limit=needed // 3, center="mean", clip_deltas=None).fit(collection, X, y)
    soup = MEHLSoup(memory_limit=needed, max_epochs=1, center="mean", clip_deltas=None)
    assert soup.fit(collection, X, y).coef_.shape[-1] == 12


def test_auto_takes_all_adapters(wide_folder):
    collection = CheckpointCollection.from_path(wide_folder, module=wide)
    X, y = wide_rows()
    soup = MEHLSoup(model_batch_size="auto", max_epochs=1, random_state=0).fit(collection, X, y)
    assert soup.model_batch_size_ == 12


def test_the_kinds_of_the_other_tests_are_searched(tmp_path):
    save_adapters(tmp_path)
    collection = CheckpointCollection.from_path(tmp_path, module=build)
    X, y = rows()
    soup = LearnedSoup(layerwise=True, max_epochs=2, random_state=0).fit(collection, X, y)
    assert np.isfinite(soup.coef_).all()
