"""Modules that FSDP2 shards over the ranks (gloo, on the CPU): what one process finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from benchmarks import plan
from sksoup import UniformSoup
from sksoup.runtime.shards import materialize, parameters_as_shapes

from .blocks import Blocks, make_llamas, make_wide_zoo, make_zoo
from .sharded_job import SOUPS, fit
from .test_distributed import start, wait


@pytest.fixture
def folder(tmp_path):
    make_zoo(tmp_path)
    return tmp_path


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_shards_find_what_one_process_finds(folder, n_ranks):
    ranks = start(folder, "all", n_ranks, job="sharded_job")
    said = wait(ranks)
    assert [process.returncode for process in ranks] == [0] * n_ranks, "\n".join(said)
    found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(n_ranks)]
    for name in found[0]:
        alone, data = fit(clone(SOUPS[name]), folder, name)
        for other in found[1:]:  # the same bits on every rank
            for what in set(other[name]) - {"counts"}:
                assert other[name][what] == found[0][name][what], (name, what)
        mine = found[0][name]
        np.testing.assert_allclose(mine["coef"], alone.coef_, rtol=0, atol=1e-4)
        for what, expected in {
            "loss": [step for record in alone.history_ for step in record.get("loss", [])],
            "norm": [step for record in alone.history_ for step in record.get("grad_norm", [])],
            "proba": alone.predict_proba(data["X"]),
        }.items():
            np.testing.assert_allclose(mine[what], expected, rtol=1e-4, atol=1e-5)
        assert mine["scores"] == getattr(alone, "individual_scores_", None)
        assert mine["digest"] == alone.recipe_.ingredients[0].sha256
        assert (folder / f"{name}-{n_ranks}.safetensors").exists()


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_a_rank_holds_its_part_of_the_models_and_sends_few_numbers(tmp_path, n_ranks):
    model = make_wide_zoo(tmp_path, 4, width=128, depth=12)
    block = 4 * sum(p.numel() for p in Blocks(128, 1).blocks.parameters())
    ranks = start(tmp_path, "counted", n_ranks, job="sharded_job")
    said = wait(ranks)
    assert [process.returncode for process in ranks] == [0] * n_ranks, "\n".join(said)
    for rank in range(n_ranks):
        found = json.loads((tmp_path / f"found{rank}.json").read_text())
        mehl = found["mehl"]
        assert mehl["peak"] <= (1 + 4) / n_ranks * model + 4 * block  # b = 1
        size = plan.Size("", model / 4, mehl["layers"], block / 4, 1, K=4, b=1)
        planned = plan.held_bytes(size, n_ranks, on_gpu=False, delta_bytes=4)
        assert 0.85 * planned < mehl["peak"] <= planned
        # module, a sum in float64 and what is read of a candidate
        assert found["greedy"]["peak"] <= 5 / n_ranks * model + 4 * block
        assert found["uniform"]["peak"] <= 2 / n_ranks * model + 4 * block
        # b = 1 number for each layer and step; for each epoch loss and score of the steps
        measured = 2 * mehl["steps"]
        assert mehl["sent"] == mehl["steps"] * plan.sent_numbers(1, mehl["layers"]) + measured
        assert found["greedy"]["sent"] == mehl["sent"]  # nothing more
        assert mehl["coef"] == json.loads((tmp_path / "found0.json").read_text())["mehl"]["coef"]


def test_two_ranks_soup_what_does_not_fit_into_one(tmp_path):
    make_wide_zoo(tmp_path, 8, width=256, depth=31)
    (alone,) = start(tmp_path, "limit", 1, job="sharded_job")
    (said,) = wait([alone])
    assert alone.returncode == 1
    assert "can't allocate memory" in said
    ranks = start(tmp_path, "limit", 2, job="sharded_job")
    said = wait(ranks)
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)


def test_a_rank_that_is_lost_ends_the_job_and_memory_resumes_it(folder):
    ranks = start(folder, "killed", 2, job="sharded_job")
    said = ranks[0].communicate(timeout=150)[0]
    wait(ranks)
    assert ranks[0].returncode == 1
    assert "Rank 0 of 2 lost the others" in (folder / "error0.txt").read_text()
    assert "RankError" in said
    again = start(folder, "none", 2, job="sharded_job")
    said = wait(again)
    assert [process.returncode for process in again] == [0, 0], "\n".join(said)
    found = json.loads((folder / "found0.json").read_text())
    undisturbed = start(folder, "undisturbed", 2, job="sharded_job")
    said = wait(undisturbed)
    assert [process.returncode for process in undisturbed] == [0, 0], "\n".join(said)
    fresh = json.loads((folder / "found0.json").read_text())
    assert found["coef"] == fresh["coef"]  # the same bits
    assert found["counts"]["rows_backward"] < fresh["counts"]["rows_backward"]


def test_a_folder_of_transformers_is_souped_in_shards(tmp_path):
    from transformers import LlamaForCausalLM

    make_llamas(tmp_path)
    for n_ranks in (1, 2):
        ranks = start(tmp_path, "llama", n_ranks, job="sharded_job")
        said = wait(ranks)
        assert [process.returncode for process in ranks] == [0] * n_ranks, "\n".join(said)
    found = json.loads((tmp_path / "found1.json").read_text())
    alone, two = (LlamaForCausalLM.from_pretrained(tmp_path / f"soup{n}") for n in (1, 2))
    for (name, one), other in zip(
        alone.state_dict().items(), two.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4, msg=name)
    assert np.isfinite(found["score"])
    assert (tmp_path / "soup2" / "README.md").exists()
    with torch.no_grad():
        ids = torch.from_numpy(np.load(tmp_path / "rows.npz")["ids"])
        loss = float(two(input_ids=ids, labels=ids).loss)
    assert -found["score"] == pytest.approx(loss, abs=1e-4)


def test_a_module_that_was_wrapped_by_hand_is_used_as_it_is(folder):
    ranks = start(folder, "wrapped", 2, job="sharded_job")
    said = wait(ranks)
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    alone, _ = fit(clone(SOUPS["centered"]), folder, "centered")
    found = json.loads((folder / "found0.json").read_text())
    np.testing.assert_allclose(found["coef"], alone.coef_, rtol=0, atol=1e-4)
    half, _ = fit(clone(SOUPS["centered"]).set_params(precision="bf16"), folder, "")
    np.testing.assert_allclose(found["bf16"], half.coef_, rtol=0, atol=0.05)
    assert found["bf16"] != found["coef"]


def test_all_ranks_leave_out_a_stranger_that_one_of_them_has_seen(folder):
    ranks = start(folder, "stranger", 2, job="sharded_job")
    said = wait(ranks)
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    first, second = (json.loads((folder / f"found{k}.json").read_text()) for k in range(2))
    assert first == second
    assert first["center"][1] == 0
    assert any("'checkpoint1'" in warning for warning in first["warnings"])


def test_what_shards_can_not_do_is_refused_on_every_rank(folder):
    ranks = start(folder, "refused", 2, job="sharded_job")
    said = wait(ranks)
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]
    for case in ("NaN", "NaN in greedy"):
        assert found[0].pop(case).startswith("RankError: Rank 1 of 2 stopped with CheckpointError")
        assert "'head.weight' holds NaN" in found[1].pop(case)
    assert found[0] == found[1]
    for name, expected in {
        "compile": "ValueError: compile=True can't be used with a sharded module",
        "workers": "ValueError: n_jobs=2 can't be used with a sharded module",
        "columns": "ValueError: 'embed.weight' is placed as S(1)",
        "tied": "ValueError: 'blocks.3.inner.weight' is tied to 'blocks.0.inner.weight'",
        "interpolate": "TypeError: A sharded module can't be copied",
        "skorch": "TypeError: A sharded module can't be copied",
    }.items():
        assert found[0][name].startswith(expected), found[0][name]


def test_shards_need_a_job():
    with pytest.raises(ValueError, match=r"shard='auto' .* there is no job. Start several"):
        UniformSoup(shard="auto").fit([Blocks()], np.zeros((3, 8)), [0, 1, 2])
    with pytest.raises(ValueError, match="shard must be one of None, 'auto'"):
        UniformSoup(shard=True).fit([Blocks()], np.zeros((3, 8)), [0, 1, 2])


class Masked(nn.Linear):
    """A mask that is not saved, and made from the weight."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("mask", torch.ones_like(self.weight).tril(), persistent=False)


def test_a_buffer_that_is_made_from_a_parameter_is_refused():
    """Once, it was whatever the memory had held before."""
    with parameters_as_shapes():
        module = Masked()
    with pytest.raises(ValueError, match="The buffer 'mask' of Masked is computed from a param"):
        materialize(module, torch.device("cpu"))
