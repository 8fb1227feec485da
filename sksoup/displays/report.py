"""The report on a soup: one HTML file that needs no network."""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from ..checkpoints.survey import MORE, judge
from ..data.tokens import shown_score
from ..tables import Table, printable
from .coefficients import CoefficientsDisplay
from .comparison import ComparisonDisplay
from .greedy_path import GreedyPathDisplay
from .importance import IngredientImportanceDisplay
from .learning_curve import LearningCurveDisplay

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d0d0d0; --soft: #f4f4f4;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --line: #3c4045; --soft: #202327; --mark: #6cb6e6; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; color: var(--mark); }
.wide { overflow-x: auto; } .wide img { min-width: 32rem; }
.verdict { border-left: 4px solid var(--mark); background: var(--soft); padding: .6rem .9rem;
  font-size: 1.1rem; }
pre { overflow-x: auto; overflow-wrap: normal; font-size: .8rem; background: var(--soft);
  padding: .5rem; }
@media (max-width: 30rem) { body { font-size: 15px; padding: .7rem; } h1 { font-size: 1.3rem; } }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: var(--soft); padding: 0 .2rem; font-size: .85rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
li { margin: .3rem 0; } summary { cursor: pointer; }
"""


def render(soup: Any, comparison: Any = None, importance: Any = None) -> str:
    """The report on a fitted soup as HTML.

    ``comparison`` is what `compare_soups` gives, ``importance`` what `ingredient_importance` does.
    """
    recipe = soup.recipe_
    used = recipe.is_used().sum()
    title = f"{recipe.method} of {used} of {len(recipe.ingredients)} checkpoints"
    sections = {
        "Scores": _scores(soup, comparison),
        "Warnings": _list(soup.warnings_),
        "Notes": _list(advice(soup, comparison)),
        "Coefficients": _coefficients(soup),
        "Which checkpoints matter": "" if importance is None else _importance(soup, importance),
        "How the coefficients were found": _search(soup),
        "Checkpoints in the soup": _ingredients(recipe),
        "Reproduce this soup": _reproduction(recipe),
    }
    body = "\n".join(f"<h2>{name}</h2>\n{html}" for name, html in sections.items() if html)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n"
        f"<p>Written on <time>{datetime.date.today().isoformat()}</time> by sksoup "
        f"{_text(recipe.versions.get('sksoup', ''))}.</p>\n"
        f"<p class='verdict'>{_text(verdict(soup, comparison))}</p>\n"
        "<p>The weights of this network are a weighted sum of the weights of the checkpoints, with "
        "the coefficients below. It costs as much to run as one of them.</p>\n"
        f"{body}\n</body></html>\n"
    )


def verdict(soup: Any, comparison: Any = None) -> str:
    """Whether the soup is better than the best checkpoint on test data, in a sentence."""
    if comparison is None or not comparison.n_test:
        return (
            "Whether this soup is better than the best checkpoint is not known: no scores on test "
            "data were given."
        )
    mine = _row_of(soup, comparison)
    found = comparison.verdict if mine is None else comparison.verdict_of(mine)
    if found and mine is not None and sum(r.p_value is not None for r in comparison.results) > 1:
        return f"{found} This is not corrected for the number of methods in the table."
    if found:
        return str(found)
    if mine is not None and mine == comparison.reference:
        return f"This is the best checkpoint. {comparison.verdict}".rstrip()
    return (
        "Whether this soup is better than the best checkpoint is not known: BestCheckpoint was not "
        "among the methods that were compared."
    )


def _row_of(soup: Any, comparison: Any) -> str | None:
    """The soup's name in a comparison, if it is in it."""
    return next((name for name, one in comparison.soups.items() if one is soup), None)


def advice(soup: Any, comparison: Any = None) -> list[str]:
    """Remarks on the soup, each with what to do about it."""
    recipe, collection = soup.recipe_, soup.checkpoints_
    used = [i.name for i, u in zip(recipe.ingredients, recipe.is_used(), strict=True) if u]
    is_judged = any(MORE in warning for warning in soup.warnings_)
    said = [] if is_judged or len(used) < 2 else [judge(collection.relations(used))]
    outside = CoefficientsDisplay(recipe.coef, collection.names, recipe.layer_names).outside
    if outside:
        said.append(
            f"{100 * outside:.1f} % of the coefficients lie outside [0, 1]: the soup "
            f"extrapolates. This can raise the score and can overfit: rely on scores on test "
            f"data, which was not used to find the coefficients."
        )
    path = getattr(soup, "path_", [])
    change = "dropped" if path and "dropped" in path[0] else "kept"  # Pruned-Soup or Greedy-Soup
    lucky = [
        t["candidate"] for t in path[1:]
        if t[change] and t["gain_standard_error"] and t["gain"] < 2 * t["gain_standard_error"]
    ]  # fmt: skip
    if lucky:
        said.append(
            f"{len(lucky)} of the checkpoints were {change} for a gain of less than two standard "
            f"errors, which may be luck. Use more validation data, or raise min_improvement."
        )
    if path and len(used) == 1:
        said.append(
            "Only the best checkpoint was kept, so this is not a mixture. Fine-tune more "
            "checkpoints from the same pretrained weights, or learn coefficients with MEHLSoup."
        )
    if recipe.recalibrated:
        said.append(
            f"{len(recipe.recalibrated)} BatchNorm tensors were re-estimated from the "
            f"validation data: they can't be rebuilt from the checkpoints alone."
        )
    if recipe.temperature != 1.0:
        said.append(
            f"A temperature of {recipe.temperature:.4g} was learned: predict_proba multiplies the "
            f"logits by it, the network itself does not."
        )
    if comparison is None:
        said.append(
            "No comparison was given. To add one, call "
            "soup.report(path, compare_soups(checkpoints, X_val, y_val, X_test, y_test))."
        )
    elif not comparison.n_test:
        said.append("No test data was given: validation scores are optimistic.")
    return said


def _scores(soup: Any, comparison: Any) -> str:
    if comparison is not None:
        mine = _row_of(soup, comparison)
        which = (
            "This soup is not in the table: the methods in it were fitted separately."
            if mine is None
            else f"This soup is the row {mine!r}."
        )
        about = comparison.statement.removesuffix(comparison.verdict).rstrip()  # it is on top
        display = ComparisonDisplay.from_comparison(comparison)
        return (
            f"<p>{_text(about)}</p><p>{_text(which)}</p>"
            f"{_table(comparison.header, comparison.cells())}"
            f"<p>{_text(comparison.legend)}</p>"
            f"{_picture(display, 'Scores of all methods, and differences from the best')}"
        )
    scores = soup.recipe_.scores
    if not scores:
        return "<p>No score was recorded with this soup.</p>"
    best = max(scores, key=scores.__getitem__)
    shown = shown_score(scores[best], soup.task)
    return (
        f"<p>The best single checkpoint, <code>{_text(best)}</code>, scored {shown} "
        f"on the validation data, on which the soup was fitted as well.</p>"
    )


def _coefficients(soup: Any) -> str:
    pictures = {"map": "Coefficients of every layer and checkpoint"}
    if len(np.atleast_2d(soup.coef_)) > 1:
        pictures["histogram"] = "How often each coefficient occurs"
    return "".join(
        _picture(CoefficientsDisplay.from_estimator(soup, kind=kind), text)
        for kind, text in pictures.items()
    )


def _importance(soup: Any, importance: Any) -> str:
    """What is lost without each ingredient; an error where these are another soup's."""
    recipe = soup.recipe_
    used = [i.name for i, u in zip(recipe.ingredients, recipe.is_used(), strict=True) if u]
    if list(importance.scores) != used:
        raise ValueError(
            f"importance is of another soup: it has {len(importance.scores)} ingredients, and not "
            f"the {len(used)} of this one. Give ingredient_importance(soup, X, y)."
        )
    return (
        f"<p>{_text(importance.statement)} Without an ingredient, its share goes to the "
        f"others.</p>{_table(importance.header, importance.cells())}"
        f"{_picture(IngredientImportanceDisplay.from_importance(importance), 'Score lost')}"
    )


def _search(soup: Any) -> str:
    if getattr(soup, "path_", None):
        return _picture(GreedyPathDisplay.from_estimator(soup), "Candidates in the order tried")
    if any("loss" in record for record in soup.history_):
        return _picture(LearningCurveDisplay.from_estimator(soup), "Validation loss at every step")
    return "<p>The method sets them without a search.</p>"


def _ingredients(recipe: Any) -> str:
    scores = {name: f"{score:.4f}" for name, score in recipe.scores.items()}
    used = [
        (one, coef)
        for one, coef, is_used in zip(
            recipe.ingredients, recipe.coef.mean(axis=0), recipe.is_used(), strict=True
        )
        if is_used
    ]
    rows = [
        (one.name, f"{coef:.4f}", scores.get(one.name, "-"), one.sha256[:12]) for one, coef in used
    ]
    header = ("checkpoint", "mean coefficient", "validation score", "SHA-256")
    full = "\n".join(f"{one.sha256}  {printable(one.name)}" for one, _ in used)
    return (
        f"{_table(header, rows, left=(0, 3))}"
        f"<details><summary>Full SHA-256</summary><pre>{escape(full)}</pre></details>"
    )


def _reproduction(recipe: Any) -> str:
    params = "".join(
        f"<li><code>{_text(f'{name}={value!r}')}</code></li>"
        for name, value in recipe.params.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in recipe.versions.items())
    return (
        "<p>To rebuild the weights of the saved soup from the checkpoints and compare them bit for "
        "bit, run <code>sksoup verify FILE FOLDER</code>.</p>"
        f"<details><summary>Parameters</summary><ul>{params}</ul></details>"
        f"<p>{_text(versions)}</p>"
    )


def _text(text: str) -> str:
    """Text in the page, with escapes for what HTML interprets and for control characters."""
    return escape(printable(" ".join(text.split())))


def _list(items: Iterable[str]) -> str:
    """A list; nothing where there are no items."""
    entries = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<ul>{entries}</ul>" if entries else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table that scrolls on a narrow screen."""
    return f"<div class='wide'>{Table(header, rows, left).without_empty().to_html()}</div>"


def _picture(display: Any, text: str) -> str:
    """A display as an image inside the page; its figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    display.figure_.savefig(buffer, format="png", dpi=120)
    plt.close(display.figure_)
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f"<img alt='{_text(text)}' src='data:image/png;base64,{data}'>"
    return f"<p class='wide'>{image}</p>"
