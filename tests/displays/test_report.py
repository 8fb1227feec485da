"""The report: one page, whole in itself, whatever the checkpoints are called."""

from __future__ import annotations

import copy
import datetime
import warnings
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from sksoup import (
    BestCheckpoint,
    CheckpointCollection,
    CheckpointEnsemble,
    GreedySoup,
    MEHLSoup,
    PrunedSoup,
    SoupWarning,
    UniformSoup,
)
from sksoup.displays.report import advice, verdict
from sksoup.inspection import compare_soups, ingredient_importance

from ..zoo import Net, PaperMEHL, Zoo, make_states

HOSTILE = "<script>alert('x')</script>\"&amp;$x_$.."
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Checks that tags are balanced; keeps texts, tags and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.links = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def hostile(zoo: Zoo) -> CheckpointCollection:
    states = make_states(7, seed=0)
    names = [HOSTILE + str(k) for k in range(7)]
    return CheckpointCollection(dict(zip(names, states, strict=True)), module=Net)


@pytest.mark.parametrize(
    "soup",
    [
        GreedySoup(batch_size=20),
        UniformSoup(),
        MEHLSoup(layerwise=True, max_epochs=1, batch_norm="auto", lr=0.3, random_state=0),
    ],
)
def test_a_page_in_itself(hostile, zoo: Zoo, soup, tmp_path):
    soup.fit(hostile, zoo.X, zoo.y)
    soup.report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert all(link.startswith("data:") for link in page.links)  # no network
    assert "http" not in text.replace("http-equiv", "")
    used = [i for i, u in zip(soup.recipe_.ingredients, soup.recipe_.is_used(), strict=True) if u]
    for ingredient in used:
        assert ingredient.name in page.texts
        assert ingredient.sha256[:12] in page.texts
        assert f"{ingredient.sha256}  {ingredient.name}" in "\n".join(page.texts).splitlines()
    assert page.tags.count("img") == (1 if isinstance(soup, UniformSoup) else 2) + (
        isinstance(soup, MEHLSoup)
    )
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text


def test_control_characters_are_shown_as_escapes(zoo: Zoo, tmp_path):
    states = CheckpointCollection(
        {
            f"run {k}\x1b[31m\x07\u202e": zoo.checkpoints[name]
            for k, name in enumerate(zoo.checkpoints)
        },
        module=Net,
    )
    soup = GreedySoup().fit(states, zoo.X, zoo.y)
    soup.report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not {c for c in text if not c.isprintable() and c != "\n"}
    assert r"\x1b[31m\x07\u202e" in text


def test_beside_the_others(zoo: Zoo, tmp_path):
    recipes = {HOSTILE: UniformSoup(), "greedy": GreedySoup()}
    found = compare_soups(zoo.checkpoints, zoo.X, zoo.y, zoo.X[:30], zoo.y[:30], recipes=recipes)
    found.soups["greedy"].report(tmp_path / "report.html", found)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert HOSTILE in page.texts
    assert found.statement in page.texts
    assert all(cell in page.texts for row in found.cells() for cell in row)


def test_the_verdict_is_on_top(zoo: Zoo, tmp_path):
    recipes = {"mean": UniformSoup(), "best": BestCheckpoint()}
    found = compare_soups(zoo.checkpoints, zoo.X, zoo.y, zoo.X, zoo.y, recipes=recipes)
    mean, best = found.soups["mean"], found.soups["best"]
    assert verdict(mean, found) == found.verdict_of("mean") != ""
    assert verdict(best, found) == f"This is the best checkpoint. {found.verdict}"
    apart = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    assert verdict(apart, found) == found.verdict
    no_test = compare_soups(zoo.checkpoints, zoo.X, zoo.y, recipes=recipes)
    assert "no scores on test data were given" in verdict(mean, no_test)
    alone = compare_soups(
        zoo.checkpoints, zoo.X, zoo.y, zoo.X, zoo.y, recipes={"mean": UniformSoup()}
    )
    assert "BestCheckpoint was not among the methods" in verdict(alone.soups["mean"], alone)
    mean.report(tmp_path / "soup.html", found)
    page = Page((tmp_path / "soup.html").read_text())
    assert page.texts.index(found.verdict_of("mean")) < page.texts.index("Scores")
    assert datetime.date.today().isoformat() in page.texts
    assert (
        sum(
            "than the best checkpoint" in text or "differ significantly" in text
            for text in page.texts
        )
        == 1
    )  # one verdict
    assert found.legend in page.texts
    assert "validation score" not in page.texts  # none is known: no empty column


def test_what_to_look_at(zoo: Zoo):
    greedy = GreedySoup(batch_size=20).fit(zoo.checkpoints, zoo.X, zoo.y)
    said = " ".join(advice(greedy))
    assert ("not a mixture" in said) == (len(greedy.ingredients_) == 1)
    assert "No comparison was given. To add one, call soup.report(" in said
    kept = [t for t in greedy.path_[1:] if t["kept"]]
    lucky = [t for t in kept if t["gain"] < 2 * (t["gain_standard_error"] or 0)]
    assert ("may be luck" in said) == bool(lucky)
    mehl = PaperMEHL(max_epochs=1, lr=0.3, batch_norm="recalibrate", random_state=0)
    mehl.fit(zoo.checkpoints, zoo.X, zoo.y)
    said = " ".join(advice(mehl))
    assert "the soup extrapolates" in said
    assert "BatchNorm tensors were re-estimated" in said
    found = compare_soups(zoo.checkpoints, zoo.X, zoo.y, recipes={"mean": UniformSoup()})
    assert "No test data was given" in " ".join(advice(mehl, found))


def test_what_can_not_be_reported(zoo: Zoo, tmp_path):
    soup = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(ValueError, match=r"must have the suffix \.html"):
        soup.report(tmp_path / "report.pdf")
    ensemble = CheckpointEnsemble().fit(zoo.checkpoints, zoo.X, zoo.y)
    with pytest.raises(AttributeError, match="averages logits"):
        ensemble.report(tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_what_fitting_warned_of(tmp_path):
    torch.manual_seed(0)
    start, stranger = nn.Linear(30, 3), nn.Linear(30, 3)
    nets = [copy.deepcopy(start) for _ in range(5)]
    for net in nets:
        net.weight.data += 0.01 * torch.randn_like(net.weight)
    X, y = torch.randn(40, 30), torch.arange(40) % 3
    soup = PaperMEHL([*nets, stranger], max_epochs=1, random_state=0)
    with pytest.warns(SoupWarning, match="fine-tuned from the same") as caught:
        soup.fit(X, y)
    assert caught[0].filename == __file__  # who called fit, however deep the warning is
    assert soup.warnings_ == tuple(str(warning.message) for warning in caught)
    soup.report(tmp_path / "soup.html")
    page = Page((tmp_path / "soup.html").read_text())
    assert "Warnings" in page.texts
    assert sum("fine-tuned from the same" in part for part in page.texts) == 1
    good = PaperMEHL(nets, max_epochs=1, random_state=0).fit(X, y)
    assert good.warnings_ == ()
    good.report(tmp_path / "good.html")
    assert "Warnings" not in Page((tmp_path / "good.html").read_text()).texts


def test_which_ingredients_matter(zoo: Zoo, hostile, tmp_path):
    soup = UniformSoup().fit(hostile, zoo.X, zoo.y)
    path = tmp_path / "soup.html"
    soup.report(path, importance=ingredient_importance(soup, zoo.X, zoo.y))
    page = Page(path.read_text())
    assert "Which checkpoints matter" in page.texts
    assert "score without it" in page.texts
    assert page.tags.count("img") == 2  # coefficients, and this
    soup.report(tmp_path / "plain.html")
    assert "Which checkpoints matter" not in Page((tmp_path / "plain.html").read_text()).texts
    other = UniformSoup().fit(zoo.checkpoints, zoo.X, zoo.y)
    path.unlink()
    with pytest.raises(ValueError, match="importance is of another soup: it has 7 ingredients"):
        soup.report(path, importance=ingredient_importance(other, zoo.X, zoo.y))
    assert not path.exists()


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("soup", [PrunedSoup(), GreedySoup(), UniformSoup(), BestCheckpoint()])
def test_every_soup_of_any_size_has_a_report(zoo: Zoo, hostile, soup, n, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)
        soup.fit(hostile.select(hostile.names[:n]), zoo.X, zoo.y)
    soup.report(tmp_path / "soup.html")
    page = Page((tmp_path / "soup.html").read_text())
    assert "script" not in page.tags
    drops = [tried for tried in getattr(soup, "path_", []) if tried.get("dropped")]
    assert any("were dropped for a gain" in text for text in page.texts) == any(
        t["gain_standard_error"] and t["gain"] < 2 * t["gain_standard_error"] for t in drops
    )
