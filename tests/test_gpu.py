"""What runs differently on CUDA: pinned memory, streams, out of memory. Needs a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from sksoup import CheckpointCollection, GreedySoup, LearnedSoup, MEHLSoup, SoupWarning

from .zoo import Net, Zoo, around, make_states, same_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MEHL = MEHLSoup(layerwise=True, model_batch_size=3, batch_size=20, random_state=0, device="cuda")


@pytest.fixture
def files(tmp_path):
    return CheckpointCollection(make_states(7, seed=0), module=Net).save(tmp_path / "zoo")


@pytest.fixture
def wide(tmp_path):
    """Sixteen models of 16 MB, in files."""
    models = around(nn.Linear(2048, 2048, bias=False), 16)
    named = CheckpointCollection(models, module=lambda: nn.Linear(2048, 2048, bias=False))
    return named.save(tmp_path / "wide")


def test_cuda_gives_the_soup_the_cpu_gives(zoo64: Zoo):
    for soup in (GreedySoup(), LearnedSoup(random_state=0), MEHLSoup(random_state=0)):
        cpu = clone(soup).set_params(device="cpu").fit(zoo64.checkpoints, zoo64.X, zoo64.y)
        gpu = clone(soup).set_params(device="cuda").fit(zoo64.checkpoints, zoo64.X, zoo64.y)
        np.testing.assert_allclose(gpu.coef_, cpu.coef_, atol=1e-6)
        X = torch.as_tensor(zoo64.X).cuda()
        assert (gpu.predict(X) == cpu.predict(zoo64.X)).all()


@pytest.mark.parametrize("prefetch", [1, 4])
def test_pinned_reads_give_the_same_bits(files, zoo: Zoo, prefetch):
    plain = clone(MEHL).set_params(prefetch=0).fit(files, zoo.X, zoo.y)
    soup = clone(MEHL).set_params(prefetch=prefetch).fit(files, zoo.X, zoo.y)
    assert np.array_equal(soup.coef_, plain.coef_)
    assert same_tensors(soup.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "params", [{"delta_dtype": "bfloat16"}, {"accumulate": 2}, {"normalize": True, "lr": 0.01}]
)
def test_options_agree_with_the_cpu(files, zoo: Zoo, params):
    gpu = clone(MEHL).set_params(**params).fit(files, zoo.X, zoo.y)
    cpu = clone(MEHL).set_params(**params, device="cpu").fit(files, zoo.X, zoo.y)
    np.testing.assert_allclose(gpu.coef_, cpu.coef_, atol=1e-4)


def test_autocast_stays_close_and_keeps_the_soup_in_float32(files, zoo: Zoo):
    plain = clone(MEHL).fit(files, zoo.X, zoo.y)
    soup = clone(MEHL).set_params(precision="bf16").fit(files, zoo.X, zoo.y)
    assert {p.dtype for p in soup.module_.parameters()} == {torch.float32}
    np.testing.assert_allclose(soup.coef_, plain.coef_, atol=0.1)


def test_held_out_rows_that_do_not_fit_are_streamed(files, zoo: Zoo, monkeypatch):
    plain = clone(MEHL).fit(files, zoo.X, zoo.y)
    monkeypatch.setattr("sksoup.recipes.validation.fits", lambda rows, device: False)
    soup = clone(MEHL).fit(files, zoo.X, zoo.y)
    assert np.array_equal(soup.coef_, plain.coef_)


def test_models_that_do_not_fit_are_streamed(files, zoo: Zoo):
    soup = LearnedSoup(random_state=0, device="cuda")
    plain = clone(soup).fit(files, zoo.X, zoo.y)
    soup.set_params(memory_limit=files.nbytes * 4)
    with pytest.warns(SoupWarning, match="2 of 7"):
        soup.fit(files, zoo.X, zoo.y)
    np.testing.assert_allclose(soup.coef_, plain.coef_, atol=1e-5)


def test_memory_is_that_of_b_plus_two_models(wide):
    X, y = torch.randn(8, 2048, device="cuda"), torch.arange(8) % 2048
    soup = MEHLSoup(model_batch_size=4, max_epochs=1, device="cuda", random_state=0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    soup.fit(wide, X, y)
    held = torch.cuda.max_memory_allocated() - before
    # the module, its gradient and the linear layer's product of gradients; and what a step adds
    assert held <= (4 + 2 + 3) * wide.nbytes + 2**20


def test_out_of_memory_halves_the_model_batch(wide):
    X, y = torch.randn(8, 2048, device="cuda"), torch.arange(8) % 2048
    expected = MEHLSoup(model_batch_size=8, max_epochs=1, device="cuda", random_state=0)
    expected.fit(wide, X, y)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 15 * wide.nbytes
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        soup = MEHLSoup(model_batch_size=16, max_epochs=1, device="cuda", random_state=0)
        with pytest.warns(SoupWarning, match="model_batch_size=8"):
            soup.fit(wide, X, y)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert soup.model_batch_size_ == 8
    assert np.array_equal(soup.coef_, expected.coef_)
