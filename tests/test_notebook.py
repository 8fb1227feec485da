"""What a notebook shows: short, bounded, escaped, without a read of weights."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from sksoup import BestCheckpoint, CheckpointCollection, MEHLSoup, Recipe, UniformSoup
from sksoup.inspection import SoupComparison, compare_soups
from sksoup.mixing.ingredients import Ingredient
from sksoup.tables import MOST_CHARACTERS, MOST_ROWS, shortened

from .zoo import Zoo

HOSTILE = "<script>alert(1)</script>\"'&amp;\x1b[31m\u202e"


class Part(HTMLParser):
    """Balanced tags, texts, and the number of rows of its table."""

    def __init__(self, thing):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(thing._repr_html_())
        self.close()
        assert not self.open
        assert {*self.tags} <= {"div", "style", "p", "b", "table", "tr", "th", "td"}

    def handle_starttag(self, tag, attrs):
        assert {name for name, _ in attrs} <= {"class"}
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] != "style":
            assert data.isprintable()
            self.texts.append(data)


def things(names: list[str], tmp_path) -> list:
    """One of each kind whose names are these."""
    w = [torch.full((2, 2), 1.0 + k % 7) for k in range(len(names))]
    states = {name: {"w": one} for name, one in zip(names, w, strict=True)}
    collection = CheckpointCollection(states, scores=dict.fromkeys(names, 0.5))
    n = len(names)
    coef = np.full((3, n), 1 / n)
    ingredients = tuple(Ingredient(name, "0f" * 32, None, None) for name in names)
    recipe = Recipe(HOSTILE, ingredients, coef, {"w": 0}, ("w", "v", "u"))
    summary = collection.describe()
    return [collection, summary, summary.checkpoints[0], recipe]


def test_hostile_names_are_escaped(tmp_path):
    for thing in things([HOSTILE + str(k) for k in range(3)], tmp_path):
        page = Part(thing)
        assert any("<script>" in text for text in page.texts)
        assert repr(thing).isprintable()


def test_many_checkpoints_are_bounded(tmp_path):
    names = [f"{k:04d}" + "x" * 500 for k in range(300)]
    for thing in things(names, tmp_path):
        page, n = Part(thing), page_rows(thing)
        assert len(thing._repr_html_()) < 8000
        assert len(repr(thing)) < 250
        if n > 1:
            assert page.tags.count("tr") == 1 + MOST_ROWS
            assert "… and 280 more" in page.texts


def page_rows(thing) -> int:
    return len(getattr(thing, "ingredients", getattr(thing, "checkpoints", ()))) or (
        len(thing) if isinstance(thing, CheckpointCollection) else 1
    )


def test_a_collection_is_shown_without_a_read(zoo: Zoo, tmp_path, monkeypatch):
    files = zoo.checkpoints.save(tmp_path / "zoo")
    for path in (tmp_path / "zoo").iterdir():
        path.unlink()  # headers were read when it was opened
    monkeypatch.setattr(CheckpointCollection, "open", None)
    page = Part(files)
    assert repr(files) in page.texts
    assert "checkpoint0.safetensors" in page.texts
    assert "score" not in page.texts  # no empty columns
    assert "file" not in Part(zoo.checkpoints).texts


def test_short_reprs(zoo: Zoo):
    soup = MEHLSoup(layerwise=True, max_epochs=1, random_state=0)
    soup.fit(zoo.checkpoints, zoo.X, zoo.y)
    n = soup.recipe_.is_used().sum()
    rows = len(soup.coef_)
    assert repr(soup.recipe_) == f"Recipe('MEHLSoup', {n} of 7 checkpoints, {rows} layers)"
    page = Part(soup.recipe_)
    largest = soup.recipe_.ingredients[np.abs(soup.recipe_.coef.mean(axis=0)).argmax()]
    assert page.texts.index(largest.name) == page.texts.index("SHA-256") + 1
    assert largest.sha256[:12] in page.texts
    summary = zoo.checkpoints.describe()
    assert repr(summary).startswith("CollectionSummary(7 checkpoints: ")
    first = summary.checkpoints[0]
    assert repr(first) == (
        f"CheckpointSummary('checkpoint0', norm {first.norm:.4g}, distance "
        f"{first.distance:.4g}, cosine {first.cosine:.4f})"
    )
    assert summary.verdict[-1] in Part(summary).texts


def test_a_comparison(zoo: Zoo):
    recipes = {"best": BestCheckpoint(), HOSTILE: UniformSoup()}
    found = compare_soups(
        zoo.checkpoints, zoo.X, zoo.y, zoo.X, zoo.y, recipes=recipes, measure_memory=False
    )
    page = Part(found)
    assert "memory" not in page.texts
    assert all(title in page.texts for title in found.header)
    assert found.cells()[0][1] in page.texts
    assert repr(found) == "SoupComparison(2 methods, 60 validation examples, 60 test examples)"
    assert repr(SoupComparison((), {})) == "SoupComparison(0 methods)"


@pytest.mark.parametrize("n", [0, 59, 60, 61, 10_000])
def test_long_texts_lose_their_middle(n):
    text = "".join(chr(97 + k % 26) for k in range(n))
    short = shortened(text)
    assert len(short) == min(n, MOST_CHARACTERS)
    assert text.startswith(short.partition("…")[0])
    assert text.endswith(short.rpartition("…")[2])
