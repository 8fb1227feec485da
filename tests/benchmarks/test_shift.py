"""Rows under distribution shift, and what is measured on them."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss

from benchmarks import photos, zoo
from benchmarks.paper import amounts, page, shift, shift_memory
from benchmarks.shifts import BESIDE, SHIFTS, TYPING, mistyped, shifted_sets
from sksoup import BestCheckpoint, UniformSoup
from sksoup.datasets import make_digits_checkpoints


def images(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    small = torch.as_tensor(digits.images[:200] / 16, dtype=torch.float32)
    whole = torch.nn.functional.interpolate(small[:, None], size=(side, side), mode="bilinear")
    return whole[:, 0], torch.as_tensor(digits.target[:200])


@pytest.mark.parametrize("side", [8, 28])
def test_shifts_keep_labels_and_grow_with_severity(side):
    X, y = images(side)
    sets = shifted_sets(X, y, 150, seed=3)
    assert list(sets) == [f"{name} {severity}" for name in SHIFTS for severity in (1, 2)]
    again = shifted_sets(X, y, 150, seed=3)
    for i, name in enumerate(SHIFTS):
        far = []
        for severity in (1, 2):
            moved, labels = sets[f"{name} {severity}"]
            assert moved.shape == (150, side, side)
            assert moved.dtype == torch.float32
            assert 0 <= moved.min() < moved.max() <= 1
            assert torch.equal(moved, again[f"{name} {severity}"][0])
            rows = np.random.default_rng([3, i, severity]).permutation(200)[:150]
            assert torch.equal(labels, y[rows])
            far.append(float((moved - X[rows]).square().mean()))
        assert 0 < far[0] < far[1] or (name == "move" and far[1] > 0)  # which hits or misses


def test_rows_of_digits_are_shifted_as_images():
    X, y = images(8)
    sets = zoo.shifted_digits((X.reshape(-1, 64).numpy(), y.numpy()), 0)
    assert sets["noise 1"][0].shape == (200, 64)


def test_scores_are_those_of_scikit_learn(tmp_path):
    made = make_digits_checkpoints(tmp_path, 2)
    soup = UniformSoup().fit(made.checkpoints, made.X_val, made.y_val)
    X, y = made.X_test[:500], made.y_test[:500]
    found = shift.scores(soup, X, y)
    assert found["accuracy"] == pytest.approx(100 * soup.score(X, y), abs=1e-3)
    assert found["log_loss"] == pytest.approx(log_loss(y, soup.predict_proba(X)), abs=1e-5)


def test_the_calibration_error_is_that_of_its_bins():
    rng = np.random.default_rng(0)
    confidence, right = rng.uniform(0, 1, 400), rng.uniform(0, 1, 400) < 0.6
    confidence[0] = 1.0
    expected = 0.0
    for low in range(shift.BINS):
        inside = (confidence >= low / shift.BINS) & (
            (confidence < (low + 1) / shift.BINS) | (low == shift.BINS - 1)
        )
        expected += abs(confidence[inside].mean() - right[inside].mean()) * inside.mean()
    assert shift.calibration_error(confidence, right) == pytest.approx(expected)


def test_typing_errors_grow_with_severity_and_touch_letters_alone():
    text, changed = "Quick foxes: 3.14 & 27", []
    for severity in (1, 2):
        rng = np.random.default_rng(0)
        found = [mistyped(text, severity, rng) for _ in range(500)]
        assert found[0] == mistyped(text, severity, np.random.default_rng(0))
        assert {"".join(sorted(c for c in t if c.lower() not in BESIDE)) for t in found} == {
            "".join(sorted(c for c in text if c.lower() not in BESIDE))
        }
        changed.append(1 - found.count(text) / 500)
    expected = [1 - (1 - share) ** 10 for share in TYPING]  # ten letters
    assert changed == pytest.approx(expected, abs=0.06)
    assert BESIDE["q"] == "w"
    assert BESIDE["s"] == "ad"


def test_shifted_texts_are_the_test_rows_retyped_and_later_paragraphs(monkeypatch):
    n = 40
    tokens = {"input_ids": torch.arange(n)[:, None]}
    later = [({"input_ids": torch.zeros(3, 1)}, torch.tensor([0, 1, 1]))] * 2
    labels = torch.arange(n) % 4
    half = {"input_ids": tokens["input_ids"][:20]}, labels[:20]
    rest = {"input_ids": tokens["input_ids"][20:]}, labels[20:]
    words = [f"number {i}" for i in range(n)]
    parts = zoo.Texts(half, half, rest, words, later)
    monkeypatch.setattr(zoo, "mistyped", lambda text, severity, rng: text)
    monkeypatch.setattr(zoo, "tokenized", lambda texts, length: texts)
    rows = zoo.TextRows(n_val=16)
    _, (X, y) = rows.cut(parts, 3)
    sets = rows.shifted(parts, 3)
    assert list(sets) == ["typing 1", "paragraph 1", "typing 2", "paragraph 2"]
    texts, numbers = sets["typing 1"]
    assert texts == [f"number {i}" for i in X["input_ids"][:, 0].tolist()]
    assert torch.equal(numbers, y)
    assert sets["paragraph 2"] is later[1]


@pytest.mark.parametrize("n_pretrain", [0, 50])
def test_photographs_of_one_part_are_in_no_other(tmp_path, monkeypatch, n_pretrain):
    X = torch.rand(200, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(200) % 10
    sizes = {"N_POOL": 40, "N_EACH": (20, 30), "N_VAL": 20, "N_TEST": 50, "N_SHIFTED": 10}
    for name, value in sizes.items():
        monkeypatch.setattr(photos, name, value)
    monkeypatch.setattr(photos, "load_images", lambda folder, part: (X, y))
    monkeypatch.setattr(photos, "LEAST_PROBE", 0.0)
    seen = {}

    def pretrain(rows):
        seen["pretrain"] = rows
        return build()

    def fine_tune(net, X, y, how):
        seen["pool"], seen["epochs"] = (X, y), how.epochs
        net.head.bias.data += how.lr

    monkeypatch.setattr(photos, "fine_tune", fine_tune)
    build = partial(zoo.SmallViT, width=8, depth=1, patch=7, side=28)
    make = photos.Photos("some", build, pretrain, n_pretrain, 2, tuning_seed=1)
    made = make(tmp_path, 2, 5)
    assert seen["epochs"] == 2 * photos.draw(1, 1).epochs
    parts = [seen["pretrain"], seen["pool"], made.more]
    assert [len(labels) for _, labels in parts] == [n_pretrain, 40, 40]
    rows = [{image.numpy().tobytes() for image in images} for images, _ in parts]
    assert len(set.union(*rows)) == n_pretrain + 80
    assert torch.equal(made.val[0], made.more[0][:20])
    assert len(made.shifted()) == 14
    assert made.checkpoints.names == ("ft00", "ft01")
    seen.clear()
    make(tmp_path, 2, 5)
    assert not seen  # what was made is kept
    monkeypatch.setattr(photos, "LEAST_PROBE", 1.1)
    with pytest.raises(SystemExit, match="it is not pretrained"):
        make(tmp_path / "again", 2, 5)


def test_pretraining_changes_all_but_the_head(monkeypatch):
    monkeypatch.setattr(photos, "PRETRAIN_EPOCHS", 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = photos.pretrain_vit(images(28)).state_dict()
        torch.manual_seed(0)
        untrained = photos.PhotoViT().state_dict()
    same = {name for name, w in found.items() if torch.equal(w, untrained[name])}
    assert same == {"head.weight", "head.bias"}
    assert len(photos.GROUPS) == found["head.bias"].numel()


def test_files_of_images_are_read(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + np.array(values.shape, ">i4").tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + values.tobytes()))
    assert photos.read_idx(tmp_path / "x.gz").numpy().tolist() == values.tolist()


def test_missing_images_are_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "IMAGES", photos.IMAGES / "elsewhere")
    monkeypatch.setattr(photos.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"apt-get is not here: unpack Debian's package"):
        photos.fetch(tmp_path)
    monkeypatch.setattr(photos.shutil, "which", lambda name: "/bin/false")

    def fail(*args, **kwargs):
        raise photos.subprocess.CalledProcessError(100, "apt-get")

    monkeypatch.setattr(photos.subprocess, "run", fail)
    with pytest.raises(SystemExit, match="could not be downloaded"):
        photos.fetch(tmp_path)
    assert not (tmp_path / photos.PACKAGE).exists()


def test_augmentation_moves_mirrors_and_erases():
    X, _ = images(28)
    generator = torch.Generator().manual_seed(0)
    how = photos.draw(0, 0)
    plain = photos.augmented(X, replace(how, move=0, erase=0.0), generator)
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, X, strict=True)]
    assert 60 < sum(mirrored) < 140
    assert all(torch.equal(a.flip(-1), b) for a, b, m in zip(plain, X, mirrored, strict=True) if m)
    erased = photos.augmented(X, replace(how, move=0, erase=1.0), generator)
    assert ((erased == 0.5).flatten(1).sum(dim=1) > 0).all()
    moved = photos.augmented(X, replace(how, move=2, erase=0.0), generator)
    assert not torch.equal(moved, X)


def test_the_page_says_what_was_measured(tmp_path):
    def tests(clean: float, noise: float, blur: float) -> dict[str, dict[str, float]]:
        scores = {"clean": clean, "noise 1": noise, "blur 1": blur}
        return {
            n: {"accuracy": a, "log_loss": a / 100, "calibration": 0.05} for n, a in scores.items()
        }

    def seed(plus: float) -> dict[str, dict[str, object]]:
        cost = {"seconds": 3.4, "forward": 5.0, "backward": 2.0}
        return {
            "Best checkpoint": {"tests": tests(80, 60, 40), **cost},
            "Greedy-Soup": {"tests": tests(81, 61, 43), **cost},
            "Centered-Soup+": {"tests": tests(82 + plus, 66, 46), **cost},
            "Learned-Soup": None,
        }

    systems = [seed(0.0), seed(1.0)]
    rows = {row[0]: row[1:] for row in page.shift_scores(systems)}
    assert rows["Greedy-Soup"][:4] == [
        "81.00 ± 0.00", "52.00 ± 0.00", "43.00 ± 0.00", "0.810 ± 0.000",
    ]  # fmt: skip
    assert rows["Centered-Soup+"][0].startswith("82.50 ± ")
    assert rows["Learned-Soup"][0] == "diverged on 2 of 2 seeds"
    gains = {row[0]: row[1:] for row in page.shift_gains(systems)}
    assert list(page.SHIFT_GAINS)[3] == "shifted – Greedy-Soup"
    assert gains["Centered-Soup+"][1:2] + gains["Centered-Soup+"][3:] == [
        "+6.00 ± 0.00", "+4.00 ± 0.00", "3", "5", "2",
    ]  # fmt: skip
    assert gains["Centered-Soup+"][2].startswith("+1.50 ± ")
    counted = {row[0]: row[-1] for row in page.shift_gains(systems, {"Centered-Soup+": 5.12})}
    assert counted["Centered-Soup+"] == "5.1"
    assert counted["Greedy-Soup"] == "–"


def test_amounts_of_rows_and_ingredients(monkeypatch, tmp_path):
    made = make_digits_checkpoints(tmp_path / "zoo", 4)
    rows = made.X_val[:200], made.y_val[:200]
    held = zoo.Zoo(made.checkpoints, rows, (made.X_test[:200], made.y_test[:200]), more=rows)
    monkeypatch.setattr(amounts, "ROWS", (50, 100))
    monkeypatch.setattr(amounts, "INGREDIENTS", (3, 4))
    monkeypatch.setattr(amounts, "SYSTEMS", ("Best checkpoint", "Greedy-Soup"))
    found = amounts.measure(held, 0)
    assert found["ingredients"]["4"] == found["ingredients"]["4"] | {
        "Best checkpoint": pytest.approx(
            100 * BestCheckpoint().fit(made.checkpoints, *rows).score(*held.test)
        )
    }
    assert list(found["rows"]) == ["50", "100"]
    for what in found.values():
        for systems in what.values():
            systems.update({"Centered-Soup": 80.0, "Centered-Soup+": 81.0})
    shutil.copytree(page.common.RESULTS, tmp_path / "results")
    text = json.dumps(
        {"command": "x", "seeds": [1], "minutes": 1, "results": {"photos": [found] * 2}}
    )
    (tmp_path / "results" / "amounts.json").write_text(text)
    built = page.Page(tmp_path / "results")
    assert "validation examples" in built.amounts()
    best = found["rows"]["50"]["Best checkpoint"]
    assert f"{81 - best:+.2f} ± 0.00" in built.amounts()
    built.draw_amounts(tmp_path)
    assert (tmp_path / "paper_amounts.svg").exists()


@pytest.mark.filterwarnings("ignore:'ft00' has the same parameters as the start")
def test_memory_of_every_system_of_the_tables(tmp_path):
    made = make_digits_checkpoints(tmp_path / "zoo", 4)
    rows = made.X_val[:300], made.y_val[:300]
    some = zoo.Zoo(made.checkpoints, rows, rows, start=made.checkpoints["ft00"])
    found = shift_memory.measure(some, 0)
    assert list(found) == list(shift.every_system(some, 0))
    assert found["Best checkpoint"] < found["MEHL-Soup"] < found["HL-Soup"]
    assert found["HL-Soup"] > 4  # all the deltas


def test_which_soup_quotes_the_amounts():
    seeds = page.Page(page.common.RESULTS).found["amounts"]["results"]["photos"]

    def mean(what, n, name):
        return float(np.mean([seed[what][n][name] for seed in seeds]))

    accuracies = [mean("ingredients", n, "Centered-Soup+") for n in seeds[0]["ingredients"]]
    *first, last = [f"{value:.1f}" for value in accuracies]
    text = " ".join((page.README.parent / "docs" / "which.rst").read_text("utf-8").split())
    assert f"its accuracy is {', '.join(first)} and {last} %" in text
    rows = seeds[0]["rows"]
    assert min(mean("rows", n, "Centered-Soup+") - mean("rows", n, page.BEST) for n in rows) > 0
    for n in rows:
        gains = [seed["rows"][n]["Centered-Soup+"] - seed["rows"][n][page.BEST] for seed in seeds]
        value, half = page.common.mean_and_interval(gains)
        assert value - half < 0
