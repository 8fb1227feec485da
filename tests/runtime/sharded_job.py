"""One rank of a job whose module is in shards, for `test_sharded`."""

from __future__ import annotations

import os
import re
import resource
import signal
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from sksoup import (
    CheckpointCollection,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    RankError,
    SoupWarning,
    UniformSoup,
)
from sksoup.runtime.cache import Cache
from sksoup.runtime.live_tensors import LiveTensors

from ..zoo import PaperMEHL
from .blocks import Blocks
from .distributed_job import run

SOUPS = {
    "uniform": UniformSoup(batch_size=25),
    "greedy": GreedySoup(min_improvement=-0.05, batch_size=25),
    # a pass without a gradient leaves the rest of the module gathered when weights are written
    "aside": MEHLSoup(
        validation_fraction=0.3, model_batch_size=2, max_epochs=3, lr=0.5, batch_size=20,
        random_state=0,
    ),
    # 61 rows in minibatches of 20: the last has one row, so that some ranks have none
    "MEHL+": PaperMEHL(
        layerwise=True, model_batch_size=2, max_epochs=2, batch_size=20, random_state=0
    ),
    "MEHL+ weighted": PaperMEHL(
        layerwise=True, model_batch_size=2, max_epochs=1, batch_size=20, random_state=0,
        accumulate=2, normalize=True,
    ),
    "centered": MEHLSoup(
        layerwise=True, model_batch_size=2, max_epochs=2, batch_size=20, random_state=0,
        ranking_rows=30,
    ),
    "centered bf16": MEHLSoup(
        layerwise=True, max_epochs=1, batch_size=20, random_state=0, delta_dtype="bfloat16",
    ),
    "centered learned": LearnedSoup(max_epochs=2, batch_size=25, random_state=0),
}  # fmt: skip


def fit(soup, folder: Path, name: str, **kwargs):
    data = np.load(folder / "rows.npz")
    files = CheckpointCollection.from_path(folder / "zoo", **{"module": Blocks, **kwargs})
    weight = data["weight"] if "weighted" in name else None
    return soup.fit(files, data["X"], data["y"], sample_weight=weight), data


def fit_all(folder: Path) -> dict[str, object]:
    """Fit all of `SOUPS`, some of them on 4 ranks; report what came out and what it cost."""
    found: dict[str, object] = {}
    some = {2: list(SOUPS), 4: ["greedy", "MEHL+ weighted", "centered"]}
    for name in some[distributed.get_world_size()]:
        soup = SOUPS[name]
        fitted, data = fit(clone(soup).set_params(shard="auto"), folder, name)
        keeps = {"memory": folder / "memory"} if "memory" in soup.get_params() else {}
        again, _ = fit(clone(soup).set_params(shard="auto", **keeps), folder, name)
        replay, _ = fit(clone(again), folder, name)
        assert np.array_equal(again.coef_, fitted.coef_)  # the same bits
        assert again.history_ == fitted.history_
        assert np.array_equal(replay.coef_, fitted.coef_)
        assert np.array_equal(again.predict_proba(data["X"]), fitted.predict_proba(data["X"]))
        fitted.save(folder / f"{name}-{distributed.get_world_size()}.safetensors")
        whole = {n: w.full_tensor() for n, w in fitted.module_.state_dict().items()}
        mixed = fitted.state_dict()
        assert whole.keys() == mixed.keys()
        assert all(torch.equal(whole[n], mixed[n]) for n in mixed)
        found[name] = {
            "coef": fitted.coef_.tolist(),
            "scores": getattr(fitted, "individual_scores_", None),
            "held_out": getattr(fitted, "held_out_scores_", None),
            "loss": [step for record in fitted.history_ for step in record.get("loss", [])],
            "norm": [step for record in fitted.history_ for step in record.get("grad_norm", [])],
            "proba": fitted.predict_proba(data["X"]).tolist(),
            "counts": vars(fitted.counts_),
            "digest": fitted.recipe_.ingredients[0].sha256,
        }
    return found


def fit_with_a_fault(folder: Path, case: str) -> dict[str, object]:
    """Rank 1 is killed in the middle; or nothing happens."""
    memory = None if case == "undisturbed" else folder / "memory"
    soup = clone(SOUPS["MEHL+"]).set_params(shard="auto", memory=memory)
    original, n = Cache.find, [0]

    def find(self, *key):
        n[0] += key[0] == "epoch"
        if n[0] == 4 and distributed.get_rank() == 1 and case == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *key)

    with patch.object(Cache, "find", find):
        fitted, _ = fit(soup, folder, "MEHL+")
    return {"coef": fitted.coef_.tolist(), "counts": vars(fitted.counts_)}


def fit_counted(folder: Path) -> dict[str, object]:
    """The bytes of tensors that were alive at most, and the numbers sent beside FSDP2's own."""
    sent = [0]
    original = distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        sent[0] += tensor.numel()
        return original(tensor, *args, **kwargs)

    found = {}
    for name in ("mehl", "greedy", "uniform"):
        with patch.object(distributed, "all_reduce", counted), LiveTensors() as live:
            soup = wide_soup(name).set_params(shard="auto")
            fitted, _ = fit(soup, folder, name, module=wide_net)
        steps = [record for record in fitted.history_ if "loss" in record]
        found[name] = {
            "peak": live.peak,
            "sent": sent[0],
            "steps": sum(len(record["loss"]) for record in steps),
            "epochs": len(steps),
            "layers": len(np.atleast_2d(fitted.coef_)),
            "coef": fitted.coef_.tolist(),
        }
    return found


def wide_net() -> Blocks:
    return Blocks(width=128, depth=12)


def wide_soup(name: str):
    """Of the least memory."""
    if name == "mehl":
        return PaperMEHL(
            layerwise=True, model_batch_size=1, max_epochs=1, prefetch=0, random_state=0
        )
    return GreedySoup(early_rejection=False) if name == "greedy" else UniformSoup()


def fit_within_limit(folder: Path) -> dict[str, object]:
    """As much data as is there now, and 6 models more.

    The map of a file that is open counts as data, and so does what the allocator has not given
    back: a process alone would take 9, one of two ranks 5.
    """
    build = partial(Blocks, width=256, depth=31)
    size = 4 * sum(p.numel() for p in build().parameters())
    shard = "auto" if distributed.get_world_size() > 1 else None
    small = CheckpointCollection([Blocks()], module=Blocks)
    soup = wide_soup("mehl").set_params(shard=shard, batch_size=16)
    clone(soup).fit(small, torch.randn(61, 8), torch.arange(61) % 3)  # what is taken once
    used = 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + 6 * size,) * 2)
    fitted, _ = fit(soup, folder, "limit", module=build)
    return {"coef": fitted.coef_.tolist()}


def fit_llama(folder: Path) -> dict[str, object]:
    """A folder of transformers: rotary frequencies are in no file, embedding and head are tied."""
    files = CheckpointCollection.from_path(folder / "llama")
    data = np.load(folder / "rows.npz")
    X = {"input_ids": data["ids"], "attention_mask": np.ones_like(data["ids"])}
    soup = MEHLSoup(layerwise=True, task="language-modeling", max_epochs=1, batch_size=4,
                    random_state=0)  # fmt: skip
    if distributed.get_world_size() > 1:
        soup.set_params(shard="auto")
    fitted = soup.fit(files, X)
    fitted.save_pretrained(folder / f"soup{distributed.get_world_size()}")
    return {"coef": fitted.coef_.tolist(), "score": fitted.score(X)}


def fit_wrapped(folder: Path) -> dict[str, object]:
    """A module that the user wrapped."""
    net = Blocks()
    for block in net.blocks[:2]:
        fully_shard(block)
    fully_shard(net)
    fitted, _ = fit(clone(SOUPS["centered"]), folder, "centered", module=net)
    assert fitted.module_ is net
    half, _ = fit(clone(SOUPS["centered"]).set_params(shard="auto", precision="bf16"), folder, "")
    return {"coef": fitted.coef_.tolist(), "bf16": half.coef_.tolist()}


def fit_with_a_stranger(folder: Path) -> dict[str, object]:
    """The best checkpoint is far from the others, in the rows of the last rank only."""
    path = folder / "zoo" / "checkpoint1.safetensors"
    if distributed.get_rank() == 0:
        state = load_file(path)
        state["spare"][-1] = 1e4
        save_file(state, path)
    distributed.barrier()
    scores = {f"checkpoint{k}": float(k == 1) for k in range(5)}
    soup = clone(SOUPS["centered"]).set_params(shard="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)
        fitted, _ = fit(soup, folder, "centered", scores=scores)
    return {
        "center": fitted.center_.tolist(),
        "coef": fitted.coef_.tolist(),
        "warnings": fitted.warnings_,
    }


def fit_refused(folder: Path) -> dict[str, object]:
    """What is refused, with the message of each."""
    path = folder / "zoo" / "checkpoint1.safetensors"
    said = {}
    for name, settings, kwargs in (
        ("compile", {"compile": True}, {}),
        ("workers", {"n_jobs": 2}, {}),
        ("columns", {"shard": None}, {"module": columns()}),
        ("tied", {}, {"module": Tied}),
    ):
        recipe = GreedySoup if "n_jobs" in settings else MEHLSoup
        said[name] = refused(recipe(**{"shard": "auto", **settings}), folder, **kwargs)
    soup, _ = fit(UniformSoup(shard="auto"), folder, "uniform")
    for name, act in {
        "interpolate": lambda: soup.interpolate(dict(Blocks().state_dict()), 0.5),
        "skorch": soup.to_skorch,
    }.items():
        try:
            act()
        except TypeError as error:
            said[name] = f"TypeError: {error}"
    if distributed.get_rank() == 0:
        state = load_file(path)
        state["head.weight"][-1] = torch.nan  # a row of the last rank
        save_file(state, path)
    distributed.barrier()
    said["NaN"] = refused(MEHLSoup(shard="auto"), folder)
    said["NaN in greedy"] = refused(GreedySoup(shard="auto"), folder)
    return said


def refused(soup, folder: Path, **kwargs) -> str:
    try:
        fit(soup, folder, "refused", **kwargs)
    except (ValueError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def columns() -> Blocks:
    """One weight is sharded by columns."""
    net = Blocks()
    fully_shard(net, shard_placement_fn=lambda w: Shard(int(w is net.embed.weight)))
    return net


class Tied(Blocks):
    """The first block and the last share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1].inner.weight = self.blocks[0].inner.weight


CASES = {
    "all": fit_all, "counted": fit_counted, "limit": fit_within_limit, "llama": fit_llama,
    "wrapped": fit_wrapped, "refused": fit_refused, "stranger": fit_with_a_stranger,
}  # fmt: skip


if __name__ == "__main__":
    run(lambda folder, case: CASES.get(case, partial(fit_with_a_fault, case=case))(folder))
