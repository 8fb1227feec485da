"""Stop and resume: what is kept, what is noticed, and what survives any interruption."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointError,
    DivergenceError,
    GreedySoup,
    LearnedSoup,
    MEHLSoup,
    SoupWarning,
    UniformSoup,
)
from sksoup.checkpoints.in_memory import MemoryCheckpoint, content_sha256
from sksoup.checkpoints.protocol import STOP
from sksoup.checkpoints.read import SafetensorsFile
from sksoup.runtime.cache import Cache
from sksoup.runtime.entries import SUFFIX

from ..zoo import Net, PaperMEHL, Zoo, make_states, make_zoo, reads, same_tensors

SOUPS = {
    "best": BestCheckpoint(),
    "greedy": GreedySoup(batch_size=20, batch_norm="auto"),
    "greedy split": GreedySoup(ranking_fraction=0.5, random_state=0, scoring="neg_log_loss"),
    "learned": LearnedSoup(max_epochs=3, batch_size=20, random_state=0),
    "learned streamed": LearnedSoup(layerwise=True, max_epochs=4, random_state=0),
    "HL": MEHLSoup(model_batch_size=None, max_epochs=3, batch_size=20, random_state=0),
    "MEHL": MEHLSoup(model_batch_size=3, max_epochs=2, batch_size=20, random_state=0),
    "MEHL+": MEHLSoup(
        layerwise=True, model_batch_size=3, model_epochs=2, max_epochs=2, batch_size=20,
        normalize=True, batch_norm="auto", random_state=0, accumulate=2,
    ),
    "MEHL from greedy": MEHLSoup(
        center="greedy", model_batch_size=3, max_epochs=2, batch_size=20,
        random_state=0,
    ),
    "MEHL chosen": MEHLSoup(
        center="best", model_batch_size=3, max_epochs=3, batch_size=20, validation_fraction=0.3,
        random_state=0,
    ),
    "MEHL sgd": MEHLSoup(
        model_batch_size=2, max_epochs=2, optimizer="sgd", delta_dtype="bfloat16",
        batch_norm="recalibrate", batch_size=20, random_state=0,
    ),
}  # fmt: skip
every_soup = pytest.mark.parametrize("name", SOUPS)


@pytest.fixture
def files(tmp_path, zoo: Zoo) -> CheckpointCollection:
    return zoo.checkpoints.save(tmp_path / "zoo")


def recipe(name: str, memory, files) -> object:
    soup = clone(SOUPS[name]).set_params(memory=memory)
    if name == "learned streamed":
        soup.set_params(memory_limit=4 * files.nbytes)  # two deltas at a time
    return soup


@contextmanager
def quiet():
    """What a fit may say by the way: that models are streamed, that variances were clamped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)
        yield


@contextmanager
def rows_through(module_type=Net):
    """Count the rows that networks are given."""
    counted = [0]

    def count(module, args, output):
        if isinstance(module, module_type):
            counted[0] += len(args[0])

    handle = register_module_forward_hook(count)
    try:
        yield counted
    finally:
        handle.remove()


def assert_same(a, b):
    assert np.array_equal(a.coef_, b.coef_)
    assert a.history_ == b.history_
    assert same_tensors(a.state_dict(), b.state_dict())
    for attribute in ("path_", "n_rows_evaluated_", "individual_scores_", "temperature_"):
        assert getattr(a, attribute, None) == getattr(b, attribute, None)


@every_soup
def test_a_finished_fit_is_replayed_without_a_pass(tmp_path, files, zoo: Zoo, name):
    with quiet():
        plain = recipe(name, None, files).fit(files, zoo.X, zoo.y)
        first = recipe(name, tmp_path / "memory", files).fit(files, zoo.X, zoo.y)
    assert_same(first, plain)
    assert vars(first.counts_) == vars(plain.counts_)
    with quiet(), rows_through() as rows, reads() as opened:
        again = recipe(name, tmp_path / "memory", files).fit(files, zoo.X, zoo.y)
    assert_same(again, plain)
    assert not any(vars(again.counts_).values())
    assert rows == [1]  # the one that tells the shape of the outputs
    assert max(opened.values()) <= 2  # the last mix; a ranking looks for NaN first


class Stopped(BaseException):
    """Stands for whatever ends a fit."""


@contextmanager
def stopped_after(n: int):
    """End the fit as soon as n results were kept."""
    original, kept = Cache.keep, [0]

    def keep(self, value, *key, everywhere=False):
        original(self, value, *key, everywhere=everywhere)
        kept[0] += 1
        if kept[0] == n:
            raise Stopped

    with patch.object(Cache, "keep", keep), pytest.raises(Stopped):
        yield


@pytest.mark.parametrize("n", [1, 2, 4])
@every_soup
def test_a_fit_that_was_stopped_goes_on_with_the_same_bits(tmp_path, files, zoo: Zoo, name, n):
    with quiet():
        plain = recipe(name, None, files).fit(files, zoo.X, zoo.y)
        soup = recipe(name, tmp_path / "memory", files)
        with stopped_after(n):
            soup.fit(files, zoo.X, zoo.y)
        with pytest.raises(NotFittedError):
            soup.predict(zoo.X)
        assert not [t for t in threading.enumerate() if t.name.startswith("sksoup-reader")]
        with reads() as opened:
            soup.fit(files, zoo.X, zoo.y)
    assert_same(soup, plain)
    done, everything = sum(vars(soup.counts_).values()), sum(vars(plain.counts_).values())
    assert done < everything if n == 4 else done <= everything
    if name in ("HL", "MEHL", "learned"):
        # checked, in the center, measured, a model batch, compared twice, the last mix
        assert max(opened.values()) <= 7


def test_greedy_goes_on_from_any_step(tmp_path):
    """Those that were kept before the stop are read once more, and only if one is left to try."""
    zoo = make_zoo(7, seed=2)
    files = zoo.checkpoints.save(tmp_path / "zoo")
    soup = GreedySoup(min_improvement=-0.1, scoring="neg_log_loss")  # any bit shows
    plain = clone(soup).fit(files, zoo.X, zoo.y)
    assert 2 < len(plain.ingredients_) < 7  # so sums of a few, in another order than the files
    for n in range(1, 7 + 6 + 2):  # scores, candidates, the last mix
        resumed = clone(soup).set_params(memory=tmp_path / f"memory{n}")
        with stopped_after(n):
            resumed.fit(files, zoo.X, zoo.y)
        with reads() as opened:
            resumed.set_params(n_jobs=2 if n % 4 == 0 else None).fit(files, zoo.X, zoo.y)
        assert_same(resumed, plain)
        assert max(opened.values()) <= (3 if n < 13 else 2)


def test_no_seed_goes_on_with_the_one_it_began_with(tmp_path, zoo: Zoo):
    soup = PaperMEHL(model_batch_size=3, max_epochs=1, batch_size=20, memory=tmp_path)
    first = soup.fit(zoo.checkpoints, zoo.X, zoo.y).coef_
    assert np.array_equal(clone(soup).fit(zoo.checkpoints, zoo.X, zoo.y).coef_, first)
    greedy = GreedySoup(ranking_fraction=0.5, memory=tmp_path)
    path = greedy.fit(zoo.checkpoints, zoo.X, zoo.y).path_
    assert clone(greedy).fit(zoo.checkpoints, zoo.X, zoo.y).path_ == path
    assert clone(greedy).fit(zoo.checkpoints, zoo.X, zoo.y).counts_.rows_forward == 0
    other = clone(soup).set_params(memory=tmp_path / "other").fit(zoo.checkpoints, zoo.X, zoo.y)
    assert not np.array_equal(other.coef_, first)


def test_callbacks_see_the_soup_of_replayed_epochs(tmp_path, files, zoo: Zoo):
    """A callback that asks for weights gets those of that epoch, replayed or not."""
    asked: list[dict[str, torch.Tensor]] = []

    def search(problem):
        original = problem.progress

        @contextmanager
        def progress(what, n):
            with original(what, n) as step:

                def looking(weights=None):
                    given = weights() if weights else None
                    given = problem.module.state_dict() if given is None else given
                    asked.append({name: w.clone() for name, w in given.items()})
                    step(weights)

                yield looking

        object.__setattr__(problem, "progress", progress)
        return MEHLSoup._search(soup, problem)

    soup = recipe("MEHL", tmp_path / "memory", files)
    with patch.object(soup, "_search", search, create=True):
        soup.fit(files, zoo.X, zoo.y)
        first, asked[:] = list(asked), []
        soup.fit(files, zoo.X, zoo.y)
    assert len(asked) == len(first) == 6
    assert all(same_tensors(a, b) for a, b in zip(asked, first, strict=True))


# ------------------------------------------------------------------ what is noticed


def count_of(soup, *args, **kwargs) -> int:
    with quiet():
        return sum(vars(soup.fit(*args, **kwargs).counts_).values())


@pytest.mark.parametrize("name", ["greedy", "MEHL"])
def test_whatever_changes_a_result_is_noticed(tmp_path, files, zoo: Zoo, name, monkeypatch):
    memory = tmp_path / "memory"
    soup = recipe(name, memory, files)
    everything = count_of(soup, files, zoo.X, zoo.y)
    assert count_of(clone(soup), files, zoo.X, zoo.y) == 0
    X, y = zoo.X.copy(), zoo.y.copy()
    X[3, 1] += 1e-6
    y[5] = (y[5] + 1) % 3
    assert count_of(clone(soup), files, X, zoo.y) >= everything / 2
    assert count_of(clone(soup), files, zoo.X, y) >= everything / 2
    assert count_of(clone(soup), files, zoo.X, zoo.y, sample_weight=np.ones(60)) > 0
    assert count_of(clone(soup).set_params(batch_size=30), files, zoo.X, zoo.y) > 0
    assert count_of(
        clone(soup).set_params(forward=lambda m, X: 2 * m(X)), files, zoo.X, zoo.y
    ) > count_of(clone(soup).set_params(forward=lambda m, X: 2 * m(X)), files, zoo.X, zoo.y)
    assert count_of(
        clone(soup).set_params(forward=lambda m, X: 3 * m(X)), files, zoo.X, zoo.y
    )  # another body
    if name == "MEHL":
        for other in (
            {"lr": 0.01}, {"random_state": 1}, {"model_batch_size": 4}, {"layerwise": True},
            {"criterion": nn.CrossEntropyLoss(label_smoothing=0.1)}, {"max_epochs": 3},
            {"normalize": True}, {"schedule": "constant"}, {"accumulate": 2}, {"shuffle": False},
            {"delta_dtype": "bfloat16"}, {"weight_decay": 0.1}, {"model_epochs": 2},
        ):  # fmt: skip
            assert count_of(clone(soup).set_params(**other), files, zoo.X, zoo.y) > 0, other
    monkeypatch.setattr("sksoup.runtime.cache.ALGORITHM", 999)
    assert count_of(clone(soup), files, zoo.X, zoo.y) == everything


def test_a_replaced_file_is_noticed_and_the_others_scores_are_kept(tmp_path, files, zoo: Zoo):
    soup = BestCheckpoint(memory=tmp_path / "memory").fit(files, zoo.X, zoo.y)
    path = files.path("checkpoint3")
    other = CheckpointCollection(make_states(7, seed=0)[:1], module=Net).save(tmp_path / "other")
    os.replace(other.path("checkpoint0"), path)
    again = CheckpointCollection.from_path(path.parent, module=Net)
    found = clone(soup).fit(again, zoo.X, zoo.y)
    assert found.counts_.rows_forward == 60
    assert found.individual_scores_["checkpoint3"] == soup.individual_scores_["checkpoint0"]


def test_a_file_with_the_inode_and_the_time_of_another_is_noticed(tmp_path, files, zoo: Zoo):
    """As archives with fixed times are unpacked where files were deleted."""
    soup = BestCheckpoint(memory=tmp_path / "memory").fit(files, zoo.X, zoo.y)
    path, other = files.path("checkpoint3"), files.path("checkpoint0")
    before = path.stat()
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert [after.st_size, after.st_ino, after.st_mtime_ns] == [
        before.st_size, before.st_ino, before.st_mtime_ns
    ]  # fmt: skip
    found = clone(soup).fit(CheckpointCollection.from_path(path.parent, module=Net), zoo.X, zoo.y)
    assert found.individual_scores_["checkpoint3"] == soup.individual_scores_["checkpoint0"]
    assert found.individual_scores_ != soup.individual_scores_


def test_scores_are_shared_by_recipes_and_collections(tmp_path, files, zoo: Zoo):
    BestCheckpoint(memory=tmp_path).fit(files.drop("checkpoint2"), zoo.X, zoo.y)
    found = BestCheckpoint(memory=tmp_path).fit(files, zoo.X, zoo.y)
    assert found.counts_.rows_forward == 60  # of the new one
    greedy = GreedySoup(memory=tmp_path, early_rejection=False).fit(files, zoo.X, zoo.y)
    assert greedy.counts_.rows_forward == 6 * 60  # the candidates


def test_the_halving_of_the_model_batch_is_remembered(tmp_path, files, zoo: Zoo):
    from sksoup.engine.deltas import ModelBatch

    original = ModelBatch.load
    soup = MEHLSoup(model_batch_size=6, max_epochs=1, random_state=0, memory=tmp_path / "memory")

    def load(self, names):
        if len(names) > 3:
            raise torch.OutOfMemoryError("out of memory")
        original(self, names)

    with patch.object(ModelBatch, "load", load), pytest.warns(SoupWarning, match="Memory ran out"):
        soup.fit(files, zoo.X, zoo.y)
    assert soup.model_batch_size_ == 3
    again = clone(soup).fit(files, zoo.X, zoo.y)  # warnings are errors
    assert again.model_batch_size_ == 3
    assert_same(again, soup)
    assert again.counts_.n_forward == 0


# ------------------------------------------------------------------ faults


def entries(memory: Path) -> list[Path]:
    return sorted(memory.rglob(f"*{SUFFIX}"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "garbage"])
@pytest.mark.parametrize("name", ["greedy", "MEHL+"])
def test_a_damaged_entry_is_computed_again(tmp_path, files, zoo: Zoo, name, damage):
    memory = tmp_path / "memory"
    with quiet():
        plain = recipe(name, memory, files).fit(files, zoo.X, zoo.y)
    for path in entries(memory):
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 4
        path.write_bytes(
            {"flip": data, "truncate": data[:-20], "empty": b"", "garbage": b"\x80\x04K\x01."}[
                damage
            ]
        )
    with pytest.warns(SoupWarning, match=r"An entry of memory= is damaged .*computed again"):
        again = recipe(name, memory, files).fit(files, zoo.X, zoo.y)
    assert_same(again, plain)
    with quiet():  # and is whole again
        assert count_of(recipe(name, memory, files), files, zoo.X, zoo.y) == 0


def test_a_full_disk_stops_no_fit(tmp_path, files, zoo: Zoo):
    memory = tmp_path / "memory"
    plain = recipe("MEHL", None, files).fit(files, zoo.X, zoo.y)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with (
        patch("sksoup.runtime.entries.Path.replace", full),
        pytest.warns(
            SoupWarning, match=r"could not store.*No space left.*Free some disk"
        ) as caught,
    ):
        soup = recipe("MEHL", memory, files).fit(files, zoo.X, zoo.y)
    assert sum("could not store" in str(warning.message) for warning in caught) == 1
    assert_same(soup, plain)
    assert not [path for path in memory.rglob("*") if path.is_file()]  # nothing half-written
    assert_same(recipe("MEHL", memory, files).fit(files, zoo.X, zoo.y), plain)


def test_a_memory_that_can_not_be_used_is_refused_before_any_work(tmp_path, files, zoo: Zoo):
    (tmp_path / "file").write_text("no folder")
    with rows_through() as rows, pytest.raises(ValueError, match=r"can't be used: .*Pass a folder"):
        recipe("MEHL", tmp_path / "file" / "memory", files).fit(files, zoo.X, zoo.y)
    assert rows == [0]
    with pytest.raises(TypeError, match=r"memory must be a folder.*got a int"):
        recipe("MEHL", 3, files).fit(files, zoo.X, zoo.y)


def test_a_memory_of_joblib(tmp_path, files, zoo: Zoo):
    memory = joblib.Memory(str(tmp_path / "memory"), verbose=0)
    recipe("MEHL", memory, files).fit(files, zoo.X, zoo.y)
    assert count_of(recipe("MEHL", tmp_path / "memory", files), files, zoo.X, zoo.y) == 0
    nowhere = recipe("MEHL", joblib.Memory(None), files)
    assert count_of(nowhere, files, zoo.X, zoo.y) > 0
    assert "memory" not in nowhere.recipe_.params


def test_what_can_not_be_told_apart_is_refused(tmp_path, files, zoo: Zoo):
    class Local:
        """Neither a function nor something that pickles."""

        def __call__(self, module, X):
            return module(X)

    with pytest.raises(TypeError, match=r"can't detect whether .* has changed.*memory=None"):
        BestCheckpoint(forward=Local(), memory=tmp_path).fit(files, zoo.X, zoo.y)


def test_a_loss_that_is_not_finite_is_not_kept(tmp_path, files, zoo: Zoo):
    soup = recipe("MEHL", tmp_path / "memory", files).set_params(lr=1e300, center="mean")
    for _ in range(2):
        with (
            pytest.warns(SoupWarning, match=r"lr=1e\+300"),
            pytest.raises(DivergenceError, match="Lower lr"),
        ):
            soup.fit(files, zoo.X, zoo.y)
    assert count_of(soup.set_params(lr=0.05), files, zoo.X, zoo.y) > 0


@pytest.mark.parametrize("fault", ["deleted", "replaced", "failing"])
def test_a_checkpoint_lost_in_the_middle(tmp_path, files, zoo: Zoo, fault):
    """The error names the file; with the file back, the fit goes on where it was."""
    memory, path = tmp_path / "memory", files.path("checkpoint4")
    plain = recipe("MEHL", None, files).fit(files, zoo.X, zoo.y)
    backup = tmp_path / "backup"
    original, n = Cache.keep, [0]

    def keep(self, value, *key, everywhere=False):
        original(self, value, *key, everywhere=everywhere)
        n[0] += key[0] == "epoch"
        if n[0] == 2 and path.exists() and not backup.exists():
            os.rename(path, backup)
            if fault == "replaced":
                path.write_bytes(backup.read_bytes())
            elif fault == "failing":
                path.mkdir()

    soup = recipe("MEHL", memory, files).set_params(prefetch=0)
    with (
        patch.object(Cache, "keep", keep),
        pytest.raises(CheckpointError, match=r"checkpoint4.*(can't be|changed)"),
    ):
        soup.fit(files, zoo.X, zoo.y)
    if fault == "failing":
        path.rmdir()
    os.replace(backup, path)
    again = soup.fit(files, zoo.X, zoo.y)
    assert np.array_equal(again.coef_, plain.coef_)
    assert sum(vars(again.counts_).values()) < sum(vars(plain.counts_).values())


def test_a_fit_that_fails_leaves_nothing_of_the_one_before(files, zoo: Zoo):
    soup = GreedySoup().fit(files, zoo.X, zoo.y)
    with (
        patch.object(GreedySoup, "_search", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        soup.fit(files, zoo.X, zoo.y)
    with pytest.raises(NotFittedError):
        soup.predict(zoo.X)
    assert not [name for name in vars(soup) if name in ("coef_", "path_", "module_", "recipe_")]
    soup.fit(files, zoo.X, zoo.y)  # and hashes what was not


def test_a_fit_that_fails_at_its_end_is_none(zoo: Zoo):
    states = [dict(zoo.checkpoints[name]) for name in zoo.checkpoints]
    states[3]["head.weight"] = torch.full_like(states[3]["head.weight"], torch.nan)
    soup = UniformSoup()
    with pytest.raises(CheckpointError, match=r"'head.weight' holds NaN"):
        soup.fit(CheckpointCollection(states, module=Net), zoo.X, zoo.y)  # found while mixing
    assert not [name for name in vars(soup) if name.endswith("_")]
    with pytest.raises(ValueError, match="batch_size"):
        soup.set_params(batch_size=-1).fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(NotFittedError):
        check_is_fitted(soup)


def test_where_a_search_starts_is_noticed(tmp_path, files, zoo: Zoo):
    """The memory is asked for the search from there, not from where the word once led."""

    def fitted(memory, scores, **params):
        collection = CheckpointCollection(
            [files.path(name) for name in files], module=Net, scores=scores
        )
        soup = MEHLSoup(model_batch_size=2, max_epochs=1, random_state=0, memory=memory, **params)
        with quiet():
            return soup.fit(collection, zoo.X, zoo.y).coef_

    for k in (0, 3):
        scores = {name: float(i == k) for i, name in enumerate(files)}
        remembered = fitted(tmp_path / "memory", scores, center="best")
        assert np.array_equal(remembered, fitted(None, scores, center="best"))
    for policy in ("average", "auto"):
        remembered = fitted(tmp_path / "memory", None, center="greedy", batch_norm=policy)
        assert np.array_equal(
            remembered, fitted(None, None, center="greedy", batch_norm=policy)
        )  # fmt: skip


def test_scores_of_another_precision_are_not_taken(tmp_path, files, zoo: Zoo):
    memory = tmp_path / "memory"
    with quiet():
        MEHLSoup(center="best", precision="bf16", max_epochs=1, memory=memory).fit(
            files, zoo.X, zoo.y
        )
    best = BestCheckpoint(scoring="neg_log_loss", memory=memory)
    assert count_of(best, files, zoo.X, zoo.y) > 0
    assert count_of(BestCheckpoint(memory=memory), files, zoo.X, zoo.y) > 0


@pytest.mark.parametrize("is_file", [True, False])
def test_hashing_stops_at_once_and_goes_on_when_asked(files, is_file):
    started, hashed, done = threading.Event(), [], []
    collection = files if is_file else CheckpointCollection([*files.values()], names=[*files])
    kind = SafetensorsFile if is_file else MemoryCheckpoint
    original = kind.sha256

    def slow(self, prefix=""):
        hashed.append(self)
        started.set()
        assert STOP.get().wait(20)
        done.append(original(self, prefix))
        return done[-1]

    with patch.object(kind, "sha256", slow):
        with suppress(KeyboardInterrupt), collection.hashing():
            assert started.wait(20)
            raise KeyboardInterrupt
        # once, Python was aborted at its exit, since such a thread still ran
        assert "sksoup-sha256" not in [thread.name for thread in threading.enumerate()]
        assert len(hashed) == 1
        assert not done
    if not is_file:
        assert len({collection.sha256(name) for name in collection}) == len(collection)
        return
    plain = {name: hashlib.sha256(files.path(name).read_bytes()).hexdigest() for name in files}
    assert {name: files.sha256(name) for name in files} == plain


@pytest.mark.parametrize("name", ["greedy", "learned", "MEHL"])
def test_checkpoints_in_memory_are_hashed_once_and_only_when_needed(tmp_path, zoo: Zoo, name):
    """Without a memory only the recipe hashes them, beside the search."""
    checkpoints = CheckpointCollection(make_states(7, seed=0), module=Net)
    hashed = [0]

    def counting(entry):
        hashed[0] += 1
        return content_sha256(entry)

    soup = recipe(name, None, checkpoints)
    with patch("sksoup.checkpoints.in_memory.content_sha256", counting), quiet():
        with patch.object(CheckpointCollection, "identity", side_effect=AssertionError):
            soup.fit(checkpoints, zoo.X, zoo.y)
        soup.set_params(memory=tmp_path).fit(checkpoints, zoo.X, zoo.y)
    assert hashed[0] <= 7


SCRIPT = """
import os, signal, sys
import numpy as np, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of nohup would ignore it
torch.set_num_threads(1)
from tests.zoo import Net
from sksoup import CheckpointCollection, {kind}
from sksoup.runtime.cache import Cache
folder, stop, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
data = np.load(folder + "/rows.npz")
files = CheckpointCollection.from_path(folder + "/zoo", module=Net)
original, kept = Cache.keep, [0]
def keep(self, value, *key, everywhere=False):
    original(self, value, *key, everywhere=everywhere)
    kept[0] += 1
    if kept[0] == stop:
        os.kill(os.getpid(), getattr(signal, how))
Cache.keep = keep
soup = {soup}.fit(files, data["X"], data["y"])
np.savez(folder + "/found.npz", coef=soup.coef_, n=soup.counts_.n_forward)
"""


@pytest.mark.parametrize(
    ("soup", "how"),
    [
        ("MEHLSoup(model_batch_size=3, max_epochs=2, batch_size=20, random_state=0, "
         "memory=folder + '/memory')", "SIGKILL"),
        ("GreedySoup(batch_size=20, memory=folder + '/memory')", "SIGKILL"),
        ("MEHLSoup(model_batch_size=3, max_epochs=2, batch_size=20, random_state=0, "
         "memory=folder + '/memory')", "SIGINT"),
    ],
)  # fmt: skip
def test_killed_and_started_again(tmp_path, files, zoo: Zoo, soup, how):
    kind = soup.partition("(")[0]
    np.savez(tmp_path / "rows.npz", X=zoo.X, y=zoo.y)
    root = Path(__file__).parents[2]

    def run(stop: int) -> subprocess.CompletedProcess[str]:
        script = SCRIPT.format(kind=kind, soup=soup)
        return subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), str(stop), how],
            capture_output=True, text=True, cwd=root, timeout=100, check=False,
        )  # fmt: skip

    killed = run(4)
    assert killed.returncode == -getattr(signal, how) or "KeyboardInterrupt" in killed.stderr
    assert not (tmp_path / "found.npz").exists()
    again = run(-1)
    assert again.returncode == 0, again.stderr
    found = np.load(tmp_path / "found.npz")
    plain = {"MEHLSoup": recipe("MEHL", None, files), "GreedySoup": GreedySoup(batch_size=20)}[kind]
    plain.fit(files, zoo.X, zoo.y)
    assert np.array_equal(found["coef"], plain.coef_)
    assert found["n"] < plain.counts_.n_forward


def fit_in_worker(soup, files, X, y):
    torch.set_num_threads(1)
    return soup.fit(files, X, y).coef_


def test_concurrent_fits_share_a_memory(tmp_path, files, zoo: Zoo):
    plain = recipe("MEHL", None, files).fit(files, zoo.X, zoo.y).coef_
    soup = recipe("MEHL", tmp_path / "memory", files)
    found = joblib.Parallel(n_jobs=2)(
        joblib.delayed(fit_in_worker)(clone(soup), files, zoo.X, zoo.y) for _ in range(4)
    )
    assert all(np.array_equal(coef, plain) for coef in found)


class Fatal(Net):
    """Ends the process it runs in, if that is a worker, once."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def forward(self, x):
        import multiprocessing

        mark = Path(self.mark)
        if multiprocessing.parent_process() is not None and len(x) > 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def test_a_killed_worker_ends_the_fit_and_the_next_one_succeeds(tmp_path, zoo: Zoo):
    build = functools.partial(Fatal, str(tmp_path / "mark"))
    files = CheckpointCollection(make_states(4, seed=0), module=build).save(tmp_path / "zoo")
    soup = BestCheckpoint(n_jobs=2, memory=tmp_path / "memory")
    with pytest.raises(Exception, match="worker process"), quiet():
        soup.fit(files, zoo.X, zoo.y)
    soup.fit(files, zoo.X, zoo.y)
    plain = BestCheckpoint().fit(files, zoo.X, zoo.y)
    assert soup.individual_scores_ == plain.individual_scores_


def test_modules_with_unsaved_buffers_are_remembered(tmp_path):
    """As Hugging Face's have: their position_ids are not in the state dict."""

    class Shifted(torch.nn.Linear):
        def __init__(self, shift: float = 1.0) -> None:
            super().__init__(3, 2)
            self.register_buffer("shift", torch.full((3,), shift), persistent=False)

        def forward(self, X: torch.Tensor) -> torch.Tensor:
            return super().forward(X + self.shift)

    torch.manual_seed(0)
    states = [Shifted().state_dict() for _ in range(3)]
    X, y = torch.randn(20, 3), torch.arange(20) % 2

    def fit(module) -> BestCheckpoint:
        nets = CheckpointCollection(states, module=module)
        return BestCheckpoint(memory=tmp_path).fit(nets, X, y)

    first, again, other = fit(Shifted), fit(Shifted), fit(functools.partial(Shifted, 2.0))
    assert first.counts_.rows_forward == 60 == other.counts_.rows_forward
    assert again.counts_.rows_forward == 0
    assert again.individual_scores_ == first.individual_scores_


@every_soup
def test_a_fit_is_replayed_by_another_process(tmp_path, files, zoo: Zoo, name):
    """Whose collection has read nothing yet: nothing can be said of what was not read."""
    with quiet():
        first = recipe(name, tmp_path / "memory", files).fit(files, zoo.X, zoo.y)
        anew = CheckpointCollection([files.path(n) for n in files], module=files.build_module)
        again = recipe(name, tmp_path / "memory", anew).fit(anew, zoo.X, zoo.y)
    assert_same(first, again)


def test_numbers_of_numpy_are_kept_and_found(tmp_path, files, zoo: Zoo):
    soup = PaperMEHL(max_epochs=np.int64(10), batch_size=np.int64(20), random_state=np.int64(0),
                    memory=tmp_path)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = clone(soup).fit(files, zoo.X, zoo.y)
        again = clone(soup).fit(files, zoo.X, zoo.y)
    assert sum(vars(again.counts_).values()) == 0
    assert np.array_equal(first.coef_, again.coef_)
